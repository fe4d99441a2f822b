"""What the records of a run say: latencies of requests and rounds, where the time went, the SLO, the knee.

Every latency of a request counts from its scheduled arrival, not from when it was taken in, and a request that was not
served counts with the time that it had waited at the cutoff: what is slow cannot hide by keeping others from being
measured (coordinated omission).
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import statistics
from typing import TYPE_CHECKING, Any

from .load_rank import CUTOFF, LAYER_MARKS
from .timing import Stats, summarise

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .load_rank import Leg, LegRecord

WARMUP_SHARE = 0.2  # of a leg, from empty to its usual load: longer than requests take, or tokens seem unserved
MIN_THROUGHPUT = 0.95  # of what is offered; less, and the queue grows
PARTS = ("queueing", "communication", "wait for ranks", "compute", "scheduling")
_WIDTH = len(LAYER_MARKS)


@dataclasses.dataclass(frozen=True)
class Slo:
    """What users were promised.

    Attributes:
        ttft_ms: from the scheduled arrival to the first token, at most.
        tpot_ms: mean time of each token after it, at most.
    """

    ttft_ms: float
    tpot_ms: float

    def is_met(self, ttft_us: float, tpot_us: float | None) -> bool:
        """By one request; `tpot_us` is None when it has no second token."""
        return ttft_us <= 1e3 * self.ttft_ms and (tpot_us is None or tpot_us <= 1e3 * self.tpot_ms)


@dataclasses.dataclass
class Samples:
    """What is summarised, all in microseconds; joined over the legs of a rate.

    Attributes:
        ttft: of every request due in the window.
        tpot: of those that had two tokens or more; a lower bound where they were cut off.
        queue: from the scheduled arrival to the tick of the first step.
        round: from the last rank's call of dispatch to the last return, and the same of combine, added.
        step: from the tick to the last rank's end.
        skew: from the first rank's call of dispatch to the last's.
        batch: tokens of all ranks in a step.
        parts: by name, of the requests that ended, microseconds from arrival to last token.
        offered: tokens that the requests of the window need.
        served: tokens made in the window.
        good: requests within the SLO.
        unfinished: requests cut off.
        seconds: length of the windows.
    """

    ttft: list[float] = dataclasses.field(default_factory=list)
    tpot: list[float] = dataclasses.field(default_factory=list)
    queue: list[float] = dataclasses.field(default_factory=list)
    round: list[float] = dataclasses.field(default_factory=list)
    step: list[float] = dataclasses.field(default_factory=list)
    skew: list[float] = dataclasses.field(default_factory=list)
    batch: list[int] = dataclasses.field(default_factory=list)
    parts: dict[str, list[float]] = dataclasses.field(default_factory=lambda: {name: [] for name in PARTS})
    offered: int = 0
    served: int = 0
    good: int = 0
    unfinished: int = 0
    seconds: float = 0.0

    def add(self, leg: Leg, ranks: Sequence[LegRecord], slo: Slo) -> None:
        """Take in one leg, from the record of each rank."""
        begin = ranks[0].begin_ns
        low, high = begin + WARMUP_SHARE * leg.seconds * 1e9, begin + leg.seconds * 1e9
        self.seconds += (1.0 - WARMUP_SHARE) * leg.seconds
        waits = self._steps(low, high, ranks)
        sums = [
            (list(itertools.accumulate(wait, initial=0)), list(itertools.accumulate(_calls(r.rows), initial=0)),
             list(itertools.accumulate((row[-1] - row[1] for row in r.rows), initial=0)))
            for r, wait in zip(ranks, waits, strict=True)
        ]  # fmt: skip
        for number, request in enumerate(leg.requests):
            due = begin + request.t * 1e9
            if not low <= due < high:
                continue
            self.offered += request.output
            rank = number % len(ranks)
            self._request(due, request.output, number, ranks[rank], begin + CUTOFF * leg.seconds * 1e9, slo, sums[rank])

    def _steps(self, low: float, high: float, ranks: Sequence[LegRecord]) -> list[list[int]]:
        """Samples of the steps; returns, by rank and step, the nanoseconds in which it waited for later ranks."""
        waits: list[list[int]] = [[] for _ in ranks]
        for step, of_ranks in enumerate(zip(*(record.rows for record in ranks), strict=True)):
            counts = low <= ranks[0].ticks[step] < high
            waited = [0] * len(ranks)
            for at in range(2, len(of_ranks[0]) - 1, _WIDTH):
                spent = 0
                for call in (at, at + 2):
                    last = max(row[call] for row in of_ranks)
                    spent += max(row[call + 1] for row in of_ranks) - last
                    for rank, row in enumerate(of_ranks):
                        waited[rank] += min(last, row[call + 1]) - row[call]
                if counts:
                    self.round.append(spent / 1e3)
                    self.skew.append((max(row[at] for row in of_ranks) - min(row[at] for row in of_ranks)) / 1e3)
            for rank, nanoseconds in enumerate(waited):
                waits[rank].append(nanoseconds)
            if counts:
                size = sum(record.sizes[step] for record in ranks)
                self.step.append((max(row[-1] for row in of_ranks) - ranks[0].ticks[step]) / 1e3)
                self.batch.append(size)
                self.served += size
        return waits

    def _request(
        self, due: float, output: int, number: int, record: LegRecord, cutoff: float, slo: Slo,
        sums: tuple[list[int], list[int], list[int]],
    ) -> None:  # fmt: skip
        first, last = record.first_step[number], record.last_step[number]
        if first < 0:
            self.unfinished += 1
            self.ttft.append((cutoff - due) / 1e3)
            self.queue.append((cutoff - due) / 1e3)
            return
        first_end = record.rows[first][-1]
        ttft = (first_end - due) / 1e3
        queue = (record.ticks[first] - due) / 1e3
        self.ttft.append(ttft)
        self.queue.append(queue)
        end = record.rows[last][-1] if last >= 0 else cutoff
        tpot = (end - first_end) / 1e3 / (output - 1) if output > 1 else None
        if last < 0:
            self.unfinished += 1
            return  # its tokens are fewer than `output`: no time per token to speak of
        if tpot is not None:
            self.tpot.append(tpot)
        self.good += slo.is_met(ttft, tpot)
        wait, calls, steps = ((column[last + 1] - column[first]) / 1e3 for column in sums)
        parts = {"queueing": queue, "communication": calls - wait, "wait for ranks": wait, "compute": steps - calls}
        parts["scheduling"] = (end - due) / 1e3 - sum(parts.values())
        for name, spent in parts.items():
            self.parts[name].append(spent)

    def to_json(self, with_curve: bool = False) -> dict[str, Any]:
        """Everything summarised; milliseconds where the name says so, else microseconds."""
        stats = {name: summarise(getattr(self, name)) for name in ("ttft", "tpot", "queue", "round", "step", "skew")}
        requests = len(self.ttft)
        return {
            "requests": requests,
            "unfinished": self.unfinished,
            "steps": len(self.step),
            "mean_batch": round(statistics.fmean(self.batch), 2) if self.batch else 0.0,
            "offered_tokens_per_s": round(self.offered / self.seconds, 1),
            "served_tokens_per_s": round(self.served / self.seconds, 1),
            "throughput_share": round(self.served / self.offered, 4) if self.offered else 1.0,
            "goodput_per_s": round(self.good / self.seconds, 2),
            "good_share": round(self.good / requests, 4) if requests else None,
            "parts_us": {
                name: round(statistics.fmean(spent), 2) if spent else 0.0 for name, spent in self.parts.items()
            },
            **{name: _json(one, with_curve and name in ("round", "step")) for name, one in stats.items()},
        }


def _calls(rows: Iterable[tuple[int, ...]]) -> Iterable[int]:
    """By step, nanoseconds inside dispatch and combine."""
    for row in rows:
        ends, begins = row[3:-1:2], row[2:-1:2]
        yield sum(map(operator.sub, ends, begins))


def _json(stats: Stats, with_curve: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"samples": stats.samples, "mean_us": stats.mean_us}
    if stats.samples:
        content |= {
            "p50_us": stats.p50_us, "p90_us": stats.percentiles["90"], "p99_us": stats.p99_us,
            "p999_us": stats.p999_us, "max_us": stats.percentiles["100"],
        }  # fmt: skip
    else:  # NaN is no JSON
        content = {"samples": 0, "mean_us": None} | dict.fromkeys(("p50_us", "p90_us", "p99_us", "p999_us", "max_us"))
    return content | ({"curve_us": stats.curve_us} if with_curve and stats.samples else {})


def is_sustained(point: dict[str, Any], slo: Slo) -> bool:
    """Whether a rate's p99 TTFT is within the SLO, and what was served keeps up with what was offered."""
    p99 = point["ttft"]["p99_us"]
    return p99 is not None and p99 <= 1e3 * slo.ttft_ms and point["throughput_share"] >= MIN_THROUGHPUT


def find_knee(points: Sequence[dict[str, Any]], slo: Slo) -> float | None:
    """The highest rate that is sustained; None when none is."""
    return max((point["rate"] for point in points if is_sustained(point, slo)), default=None)


def geometric(lowest: float, highest: float, count: int) -> list[float]:
    """`count` rates at equal ratios, three digits each."""
    ratio = (highest / lowest) ** (1.0 / max(count - 1, 1))
    return [float(f"{lowest * ratio**i:.3g}") for i in range(count)]
