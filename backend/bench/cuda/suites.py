"""What is measured: points, each one shape on one budget of multiprocessors, gathered in sections."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moebius.bench.workload import Workload

SUITES = ("decode", "smoke")
DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
DECODE_MAX_TOKENS = 128  # M of the decode sizes up to it, as a server would fix it
PREFILL_TOKENS = (512, 1024, 2048, 4096, 8192)
LEAST_SMS = 4
PAYLOADS = ("bf16", "fp8_e4m3")


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        section: "decode", "prefill", "sms" or "sweep".
        workload: the shape; `max_num_tokens` is M, which may be above T.
        num_sms: budget of each rank; 0 for all multiprocessors shared out among the ranks.
        modes: of "graph" and "eager".
        with_baseline: whether the exchange in torch is timed beside it.
    """

    section: str
    workload: Workload
    num_sms: int = 0
    modes: tuple[str, ...] = ("graph", "eager")
    with_baseline: bool = True

    def sms(self, on_device: int, ranks_there: int) -> int:
        """The budget in multiprocessors, at least one."""
        return self.num_sms or max(on_device // ranks_there, 1)

    @property
    def name(self) -> str:
        """As progress shows it."""
        one = self.workload
        sms = f" {self.num_sms} SMs" if self.num_sms else ""
        return f"{self.section} R={one.ranks} T={one.tokens} {one.payload} {one.layout}{sms}"


def sms_budgets(on_device: int) -> list[int]:
    """4, 8, 16, ... and all."""
    budgets, budget = [], LEAST_SMS
    while budget < on_device:
        budgets.append(budget)
        budget *= 2
    return [*budgets, on_device]


def decode_suite(base: Workload, on_device: int, ranks_there: int) -> list[Point]:
    """Every section, the ones that the engine is judged by first.

    Args:
        base: R, E, K, H, routing and seed.
        on_device: multiprocessors.
        ranks_there: ranks that share a device, R or one.
    """
    of = _maker(base)
    points = [
        Point("decode", of(tokens, payload, layout, DECODE_MAX_TOKENS))
        for layout, sizes in (("expert_major", DECODE_TOKENS), ("token_major", (1, 8, 32, 128)))
        for payload, tokens in itertools.product(PAYLOADS, sizes)
    ]
    points += [
        Point("prefill", of(tokens, payload, "token_major"), modes=("eager",))
        for tokens, payload in itertools.product(PREFILL_TOKENS, PAYLOADS)
    ]
    # No more than each rank's share, or their kernels would not fit the device together.
    most = {base.ranks: max(on_device // ranks_there, 1)}
    points += [
        Point("sms", of(128, payload, "expert_major", 0, ranks), sms, ("graph",), with_baseline=False)
        for ranks in dict.fromkeys((base.ranks, 1))
        for payload, sms in itertools.product(PAYLOADS, sms_budgets(most.get(ranks, on_device)))
    ]
    return points


def smoke_suite(base: Workload, on_device: int, _ranks_there: int) -> list[Point]:
    """One small shape of every section, seconds in all: only to see it work."""
    of = _maker(base)
    return [
        *(Point("decode", of(tokens, "fp8_e4m3", "expert_major", 8)) for tokens in (1, 4, 8)),
        Point("decode", of(4, "bf16", "token_major", 8)),
        Point("sms", of(8, "bf16", "expert_major", 0, 1), min(LEAST_SMS, on_device), ("graph",), with_baseline=False),
        Point("prefill", of(16, "bf16", "token_major"), modes=("eager",)),
    ]


def sweep_points(base: Workload, lists: Mapping[str, Sequence[Any]], sms: Sequence[int]) -> list[Point]:
    """The product of all lists."""
    shapes = [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]
    return [Point("sweep", dataclasses.replace(base, **shape), budget) for shape in shapes for budget in sms]


def _maker(base: Workload) -> Any:
    def make(tokens: int, payload: str, layout: str, most: int = 0, ranks: int = 0) -> Workload:
        return dataclasses.replace(
            base,
            tokens=tokens,
            payload=payload,
            layout=layout,
            max_num_tokens=max(tokens, most),
            ranks=ranks or base.ranks,
        )

    return make


@dataclasses.dataclass(frozen=True)
class Counts:
    """How often a point is repeated; the same on every rank, so computed from its bytes and never from times.

    Attributes:
        rounds: in a graph.
        replays: of it.
        eager_rounds: behind one gate.
        eager_repeats: of those.
    """

    rounds: int
    replays: int
    eager_rounds: int
    eager_repeats: int


LEAST_ROUND_US = 30.0
BYTES_PER_US = 2.5e6  # less than any GPU that this is meant for moves
QUEUE = 900  # kernels that a GPU takes before a launch waits; its launch queue has 1024


def counts(moved: int, lanes: int, seconds: float) -> Counts:
    """Repetitions that fill about `seconds` in each mode.

    Args:
        moved: bytes of a round on one device.
        lanes: ranks on it.
        seconds: of a mode.
    """
    round_us = max(LEAST_ROUND_US, moved / BYTES_PER_US)
    rounds = max(2, min(20, round(4000 / round_us)))
    # A kernel and, at a join, two events: an eager round of all lanes must fit the queue with others.
    eager = max(1, min(8, rounds, QUEUE // (8 * lanes)))

    def times(of: int) -> int:
        return max(8, min(100, int(seconds * 1e6 / (of * round_us))))

    return Counts(rounds, times(rounds), eager, times(eager) // 2 or 1)
