"""The host executor of the kernels: small kernels, right and with mistakes planted, and rounds of the project's own."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import kernels

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/simt"
EXECUTOR = sorted((ROOT / "csrc/simt").glob("*.cpp"))
ENGINE = [ROOT / "csrc/cuda/engine.cpp", *(ROOT / f"csrc/cuda/{kernel}.cu" for kernel in kernels.KERNELS)]
FLAGS = ["-std=c++17", "-g1", "-ffp-contract=off", "-pthread", "-DMOEBIUS_SIMT", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
OPTIONS = {
    "O2": ["-O2"],
    "asan-ubsan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "ucontext": ["-O1", "-DMOEBIUS_SIMT_UCONTEXT"],
}


class Builds:
    """Compiles each file once for each set of options."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def program(self, name: str, options: str) -> Path:
        own = sorted(HERE.glob(f"{name}*.cpp")) + (ENGINE if name == "rounds" else [])
        program = self.folder / f"{name}-{options}"
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            objects = list(workers.map(lambda source: self._object(source, options), [*own, *EXECUTOR]))
        _run(_compiler(), *FLAGS, *OPTIONS[options], *map(str, objects), "-o", str(program))
        return program

    def _object(self, source: Path, options: str) -> Path:
        target = self.folder / f"{source.stem}-{options}.o"
        if not target.exists():
            _run(_compiler(), *FLAGS, *OPTIONS[options], "-x", "c++", "-c", str(source), "-o", str(target))
        return target


def _compiler() -> str:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return compiler


def _run(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    return ran.stdout


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Builds:
    return Builds(tmp_path_factory.mktemp("simt"))


@pytest.mark.parametrize(("options", "seeds"), [("O2", 200), ("asan-ubsan", 8), ("ucontext", 8)])
def test_planted_mistakes_are_caught_and_only_they(options: str, seeds: int, builds: Builds) -> None:
    out = _run(str(builds.program("exchange", options)), str(seeds))
    assert out.count(", ok\n") == 22


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("name", "checks"), [("litmus", 6), ("machine", 8), ("streams", 6)])
def test_rules(name: str, checks: int, options: str, builds: Builds) -> None:
    assert _run(str(builds.program(name, options))).count(" ok\n") == checks


@pytest.mark.parametrize(("options", "seeds"), [("O2", 200), ("asan-ubsan", 10)])
def test_rounds_of_the_kernels(options: str, seeds: int, builds: Builds) -> None:
    assert f"{seeds} seeds of 4 rounds ok" in _run(str(builds.program("rounds", options)), "0", str(seeds), "4")
