"""Every interleaving of the protocol, by spin: moebius.pml is the model, docs/protocol-model.md what it taught."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
ORDERS = ("plain", "dispatch_only", "two_batches", "staggered", "ahead", "mixed", "swapped")
# What a refutation's assertion looks like.
NEWER, DEADLOCK, CELL, UNANSWERED = ">>3)<=", "(done|stopped)==", "inbox[", "heard==sent_to"


@dataclass(frozen=True)
class Case:
    """One exhaustive search: all who-sends-rows-to-whom, both layouts, up to `stops` ranks stopping anywhere."""

    order: str
    ranks: int
    stops: int = 1
    define: str = ""
    refuted_by: str = ""

    def __str__(self) -> str:
        """A test id."""
        return f"{self.define or 'holds'}-{self.order}-R{self.ranks}-stops{self.stops}"

    @property
    def defines(self) -> list[str]:
        """The options of the model."""
        more = [f"-D{self.define}"] if self.define else []
        return [f"-DR={self.ranks}", f"-DORDER=ORDER_{self.order}", f"-DSTOPS={self.stops}", *more]


@dataclass(frozen=True)
class Verdict:
    """What a search found."""

    output: str
    errors: int
    states: int
    trail: str

    @property
    def exhaustive(self) -> bool:
        """Nothing was cut off: neither depth nor memory, no approximate storage."""
        cut = ("max search depth too small", "out of memory", "memory limit", "Search not completed")
        return "Full statespace search" in self.output and not any(word in self.output for word in cut)


HOLDS = [
    *(Case(order, ranks) for ranks in (3, 2) for order in ORDERS),
    Case("dispatch_only", 3, stops=2),
    Case("mixed", 3, define="HEARSAY"),
    Case("plain", 2, define="ANY_ROWS"),
]
REFUTED = [
    Case("ahead", 2, define="NO_CLOSING", refuted_by=NEWER),
    Case("dispatch_only", 2, define="NO_CLOSING", refuted_by=CELL),
    Case("ahead", 2, define="NO_EMPTY_COMBINE", refuted_by=NEWER),
    Case("plain", 2, define="NO_EPOCH", refuted_by=CELL),
    Case("plain", 3, define="NO_ABORT", refuted_by=DEADLOCK),
    Case("plain", 3, define="NO_OVERTAKE", refuted_by=NEWER),
    Case("dispatch_only", 3, define="NO_OVERTAKE", refuted_by=NEWER),
    Case("staggered", 3, define="NO_LOOK_AT_DEAD", refuted_by=UNANSWERED),
]


def run(command: list[str], folder: Path, timeout: float) -> str:
    """Output of a command that must succeed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


def search(case: Case, folder: Path) -> Verdict:
    """Build the verifier of a case and run it."""
    for part in HERE.glob("*.pml"):
        shutil.copy(part, folder)
    run(["spin", *case.defines, "-a", "moebius.pml"], folder, 60)
    # SAFETY: assertions, no cycles (no step is ever undone). NOREDUCE: `provided` excludes partial order reduction.
    # -E: a stopped rank ends anywhere; the model asserts instead that all others end.
    flags = ["-DSAFETY", "-DNOREDUCE", "-DCOLLAPSE", "-DMEMLIM=3000"]
    speed = "-O0" if case.ranks == 2 or case.refuted_by else "-O2"  # compiling takes longer than a small search
    run(["gcc", speed, "-w", *flags, "-o", "pan", "pan.c"], folder, 120)
    output = run(["./pan", "-E", "-m5000", "-w24"], folder, 400)
    errors, states = re.search(r"errors: (\d+)", output), re.search(r"(\S+) states, stored", output)
    assert errors, output
    assert states, output
    trail = ""
    if int(errors[1]):
        trail = run(["spin", *case.defines, "-t", "-p", "moebius.pml"], folder, 60)
    return Verdict(output, int(errors[1]), int(float(states[1])), trail)


@pytest.fixture(scope="session")
def searches(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Case, Future[Verdict]]]:
    """Search all selected cases, as many at a time as there are cores."""
    missing = [tool for tool in ("spin", "gcc") if shutil.which(tool) is None]
    if missing:
        reason = f"the model needs {' and '.join(missing)} (apt install spin gcc)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = [given["case"] for given in params if isinstance(given.get("case"), Case)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {case: pool.submit(search, case, tmp_path_factory.mktemp(str(case))) for case in cases}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", HOLDS, ids=str)
def test_holds(searches: dict[Case, Future[Verdict]], case: Case) -> None:
    """No overwrite before read, nothing lost, doubled or stale, no live rank given up, and all who live end."""
    verdict = searches[case].result()
    assert verdict.errors == 0, f"{verdict.output}\n{verdict.trail[-6000:]}"
    assert verdict.exhaustive, verdict.output
    assert verdict.states > 10_000  # it did go through it


@pytest.mark.parametrize("case", REFUTED, ids=str)
def test_mutation_is_refuted(searches: dict[Case, Future[Verdict]], case: Case) -> None:
    """The check is able to fail: without any one of its parts the protocol breaks, and in the expected way."""
    verdict = searches[case].result()
    assert verdict.errors == 1, verdict.output
    violated = next(line for line in verdict.output.splitlines() if "assertion violated" in line)
    assert case.refuted_by in violated, violated
