"""The host executor of the kernels: small kernels, right and with mistakes planted, over many seeds."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/simt"
EXECUTOR = sorted((ROOT / "csrc/simt").glob("*.cpp"))
FLAGS = ["-std=c++17", "-g", "-ffp-contract=off", "-pthread", "-DMOEBIUS_SIMT", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
OPTIMISED = ["-O2"]
SANITIZED = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(program: Path, sources: list[Path], options: list[str]) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    # One process per file: the sanitizers make compilation slow.
    objects = [program.with_name(f"{program.name}-{source.stem}.o") for source in [*sources, *EXECUTOR]]
    for source, compiled in zip([*sources, *EXECUTOR], objects, strict=True):
        command = [compiler, *FLAGS, *options, "-c", str(source), "-o", str(compiled)]
        subprocess.run(command, check=True, timeout=300)
    link = [compiler, *FLAGS, *options, *map(str, objects), "-o", str(program)]
    subprocess.run(link, check=True, timeout=300)
    return program


def run(program: Path, *arguments: str) -> str:
    ran = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    return ran.stdout


@pytest.mark.parametrize(("options", "seeds"), [(OPTIMISED, "200"), (SANITIZED, "8")], ids=["O2", "asan-ubsan"])
def test_planted_mistakes_are_caught_and_only_they(options: list[str], seeds: str, tmp_path: Path) -> None:
    program = build(tmp_path / "exchange", [HERE / "exchange.cpp", HERE / "exchange_test.cpp"], options)
    out = run(program, seeds)
    assert "NOT OK" not in out
    assert out.count(", ok\n") == 22
