"""Time samples of a collective, and their percentiles.

All ranks enter a timed call together, through a barrier in shared memory that is not timed (`start_line`), and one
round gives one sample: the time of its slowest rank, from call to return. Clocks are CLOCK_MONOTONIC, which processes
of one machine share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

PERCENTILES = (0.0, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0)
MIN_SAMPLES_P999 = 1000  # below, the 99.9th percentile would be the maximum under another name
CURVE_POINTS = 240

Instants = list[tuple[int, ...]]  # a row a round: nanoseconds of CLOCK_MONOTONIC


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest sample that at least `percent` % of the ascending samples do not exceed (nearest rank)."""
    if len(ordered) == 0:
        return math.nan
    # The epsilon keeps 99.9 % of 1000 at the 999th sample: 0.999 * 1000 is above 999 in binary.
    return float(ordered[max(math.ceil(percent / 100.0 * len(ordered) - 1e-9), 1) - 1])


@dataclasses.dataclass(frozen=True)
class Stats:
    """What the samples of one operation say, in microseconds."""

    samples: int
    mean_us: float
    percentiles: dict[str, float]
    curve_us: list[float]

    @property
    def p50_us(self) -> float:
        """The median."""
        return self.percentiles["50"]

    @property
    def p99_us(self) -> float:
        """The 99th percentile."""
        return self.percentiles["99"]

    @property
    def p999_us(self) -> float | None:
        """The 99.9th percentile; None where the samples are too few to know it."""
        return self.percentiles["99.9"] if self.samples >= MIN_SAMPLES_P999 else None

    def to_json(self) -> dict[str, object]:
        """Everything, the named percentiles first."""
        return {
            "samples": self.samples,
            "p50_us": self.p50_us,
            "p99_us": self.p99_us,
            "p999_us": self.p999_us,
            "mean_us": self.mean_us,
            "percentiles_us": self.percentiles,
            "curve_us": self.curve_us,
        }


def summarise(samples_us: Iterable[float]) -> Stats:
    """Percentiles of samples, and the curve (evenly spaced quantiles) that a plot draws."""
    ordered = sorted(samples_us)
    named = {f"{percent:g}": round(percentile(ordered, percent), 3) for percent in PERCENTILES}
    curve = [round(percentile(ordered, 100.0 * i / CURVE_POINTS), 3) for i in range(CURVE_POINTS + 1)]
    return Stats(len(ordered), round(statistics.fmean(ordered), 3) if ordered else math.nan, named, curve)


def slowest_us(ranks: Sequence[Sequence[tuple[int, ...]]], *spans: tuple[int, int]) -> list[float]:
    """One sample a round from the instants of every rank: the time that its slowest rank spent in `spans`.

    Args:
        ranks: instants of each.
        *spans: (begin, end) columns of the instants.
    """

    def spent(row: tuple[int, ...]) -> int:
        return sum(row[end] - row[begin] for begin, end in spans)

    return [max(map(spent, rows)) / 1e3 for rows in zip(*ranks, strict=True)]


@contextlib.contextmanager
def quiet_gc() -> Iterator[None]:
    """Keep the garbage collector out of timed rounds, as `timeit` does."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
