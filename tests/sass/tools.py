"""The compiler and the disassembler, and what to say where one is missing."""

import functools
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 240


@functools.cache
def nvcc() -> str | None:
    """CUDA's compiler: where setup.py looks for it."""
    homes = (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda")
    return shutil.which("nvcc") or next((found for home in homes if (found := shutil.which(f"{home}/bin/nvcc"))), None)


@functools.cache
def disassembler(name: str) -> str | None:
    """`cuobjdump` or `nvdisasm`: the pinned wheels bring them without putting them on PATH."""
    folders = [Path(sysconfig.get_path(kind)) / "nvidia" / "cu13" / "bin" for kind in ("purelib", "platlib")]
    found = next((str(folder / name) for folder in folders if (folder / name).exists()), None)
    return found or shutil.which(name)


def missing() -> str:
    """What there is not, in words; "" when all is there."""
    if nvcc() is None:
        return "no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
    for name in ("cuobjdump", "nvdisasm"):
        if disassembler(name) is None:
            return f"no {name}: pip install -r requirements-dev.txt"
    return ""


@functools.cache
def nvcc_version() -> str:
    """Its release, the last two lines of what it says."""
    return run([str(nvcc()), "--version"]).strip().rpartition("release")[2]


def run(command: list[str]) -> str:
    """Standard output; the disassemblers find each other on PATH."""
    tools = [str(Path(found).parent) for name in ("cuobjdump", "nvdisasm") if (found := disassembler(name))]
    environment = {**os.environ, "PATH": os.pathsep.join([*tools, os.environ.get("PATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def compile_once(command: list[str]) -> tuple[int, str]:
    """Exit status of nvcc, and all that it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    return done.returncode, done.stdout + done.stderr
