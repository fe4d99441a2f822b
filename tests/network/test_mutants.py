"""The programs pass as the sources are, and fail with each of the planted bugs."""

from __future__ import annotations

import concurrent.futures
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.network.mutants import MUTANTS, SEMANTICS, Mutant

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc/cpu"
PROGRAMS = {"rounds": ROOT / "tests/sanitize/core_test.cpp", "semantics": ROOT / "tests/network/semantics_test.cpp"}
# As little optimised as it can be while templates of vectors stay bearable: compiling is what takes the time.
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-pthread", f"-I{ROOT / 'csrc'}"]
MOST_RUNS = 8  # of one mutant; threads are free to miss a race now and then
JOBS = 2


def call(*command: str | Path, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


class Bench:
    """The objects of the sources as they are, and programs with one of them replaced."""

    def __init__(self, compiler: str, folder: Path) -> None:
        self._compiler = compiler
        self.folder = folder
        self.sources = [*sorted(CPU.rglob("*.cpp")), *PROGRAMS.values()]
        with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
            objects = pool.map(lambda source: self.compile(source, folder / f"{source.stem}.o"), self.sources)
            self.objects = dict(zip(self.sources, objects, strict=True))

    def compile(self, source: Path, to: Path) -> Path:
        built = call(self._compiler, *FLAGS, f"-I{CPU.parent}", "-c", source, "-o", to)
        assert built.returncode == 0, built.stderr[-3000:]
        return to

    def link(self, program: str, to: Path, replaced: dict[Path, Path] | None = None) -> Path:
        objects = self.objects | (replaced or {})
        left_out = {path for name, path in PROGRAMS.items() if name != program}
        parts = [made for source, made in objects.items() if source not in left_out]
        linked = call(self._compiler, "-pthread", *parts, "-o", to)
        assert linked.returncode == 0, linked.stderr[-3000:]
        return to

    def plant(self, mutant: Mutant) -> Path:
        """The program that has the bug."""
        original = CPU / mutant.file
        text = original.read_text()
        assert text.count(mutant.text) == 1, f"{mutant.name}: the text occurs {text.count(mutant.text)} times"
        changed = self.folder / f"{mutant.name}.cpp"
        changed.write_text(text.replace(mutant.text, mutant.replacement))
        made = self.compile(changed, self.folder / f"{mutant.name}.o")
        program = "semantics" if mutant.case == SEMANTICS else "rounds"
        return self.link(program, self.folder / mutant.name, {original: made})

    def runs_needed(self, mutant: Mutant) -> int | None:
        """Runs until the bug is caught; None if it never is."""
        program = self.plant(mutant)
        for run in range(1, MOST_RUNS + 1):
            try:
                if call(program, *filter(None, [mutant.case]), timeout_s=60.0).returncode != 0:
                    return run
            except subprocess.TimeoutExpired:
                return run
        return None


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return Bench(compiler, tmp_path_factory.mktemp("mutants"))


def test_the_network_keeps_its_promises(bench: Bench) -> None:
    ran = call(bench.link("semantics", bench.folder / "semantics"))
    assert (ran.returncode, ran.stdout) == (0, "all ok\n"), ran.stderr[-3000:]


def test_every_planted_bug_is_caught(bench: Bench) -> None:
    program = bench.link("rounds", bench.folder / "rounds")
    for case in sorted({mutant.case for mutant in MUTANTS} - {SEMANTICS}):
        ran = call(program, case)
        assert (ran.returncode, ran.stdout) == (0, f"{case} ok\n"), ran.stderr[-3000:]
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        needed = dict(zip((mutant.name for mutant in MUTANTS), pool.map(bench.runs_needed, MUTANTS), strict=True))
    survived = [name for name, runs in needed.items() if runs is None]
    late = {name: runs for name, runs in needed.items() if runs is not None and runs > 1}
    print(f"\nmutants: {len(needed) - len(survived)} of {len(needed)} caught; more than one run for {late or 'none'}")
    assert not survived
