"""Plants each mistake, one at a time, and looks whether it is seen."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from tests.helpers import kernels

from . import combine, dispatch_recv, dispatch_send, joined, rows, shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .mutant import Mutant

FILES = (dispatch_send, dispatch_recv, rows, combine, shared, joined)
MUTANTS: list[Mutant] = [mutant for file in FILES for mutant in file.MUTANTS]
FIRST_SEED = 1
HALVES = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Attributes:
        mutant: it.
        is_caught: whether a seed was wrong that is right without it.
        num_seeds: that it took.
        said: by the program.
        seconds: to build and to run it.
    """

    mutant: Mutant
    is_caught: bool
    num_seeds: int
    said: str
    seconds: float

    def __str__(self) -> str:
        fate = f"caught, {self.num_seeds:3} seeds" if self.is_caught else "SURVIVED" + " " * 10
        lines = [line for line in self.said.splitlines() if line and not line.startswith("repeat:")]
        why = re.sub(r"^.*?good ones: ", "", lines[0]) if lines else ""
        return f"{self.mutant.name:32} {self.mutant.case:14} {fate} {self.seconds:5.1f} s  {why[:150]}"


def changed(mutant: Mutant, text: str) -> str:
    """The file with the mistake in it."""
    for before, after in ((mutant.text, mutant.replacement), *mutant.also):
        num_found = text.count(before)
        assert num_found == 1, f"{mutant.name}: {before!r} stands in {mutant.file} {num_found} times"
        text = text.replace(before, after)
    return text


def judge(built: kernels.Built, mutant: Mutant) -> Verdict:
    """Build one and run it, until it is caught."""
    start = time.monotonic()
    # In the kernels of single halves; what is meant for another one names it.
    half = Path(mutant.file).stem
    planted = mutant.kernels or ((half,) if half in kernels.KERNELS else HALVES)
    program = built.with_changed(mutant.file, changed(mutant, built.texts[mutant.file]), planted)
    is_right, said = kernels.run(program, mutant.case, FIRST_SEED, mutant.num_seeds, mutant.timeout_s)
    program.unlink()
    assert "no case " not in said, f"{mutant.name}: {said}"
    wrong = re.search(r"WRONG at seed (\d+), after (\d+) good ones", said)
    num_seeds = int(wrong[2]) + 1 if wrong else 0
    if not is_right and wrong:
        is_right, said_without = kernels.run(built.program, mutant.case, int(wrong[1]), 1)
        assert is_right, f"{mutant.case} is wrong without a mutant\n{said_without}"
        return Verdict(mutant, True, num_seeds, said, time.monotonic() - start)
    return Verdict(mutant, not is_right, num_seeds, said, time.monotonic() - start)


def judge_all(mutants: Sequence[Mutant]) -> list[Verdict]:
    """Judge them side by side, as many as there are cores."""
    built = kernels.Built(kernels.OPTIMISED)
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        return list(workers.map(lambda mutant: judge(built, mutant), mutants))


def score(verdicts: Sequence[Verdict]) -> str:
    """One line."""
    caught = [verdict for verdict in verdicts if verdict.is_caught]
    seeds = " ".join(str(verdict.num_seeds) for verdict in caught)
    return f"mutants: {len(caught)} of {len(verdicts)} caught, seeds needed: {seeds}"
