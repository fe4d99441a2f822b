"""What one rank of the sweep does: rounds without experts over moebius, over gloo and by memcpy, in turn."""

from __future__ import annotations

import dataclasses
import functools
from time import perf_counter_ns as now
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.all_to_all import AllToAll
from moebius.errors import MoebiusError

from .baseline import GlooAllToAll, dequantise_fp8
from .bound import CopyBound, Traffic
from .timing import Instants, quiet_gc
from .wire import Wire, measure
from .workload import DTYPES, Workload, generator, input_dtype, route

if TYPE_CHECKING:
    from collections.abc import Callable

    from .ranks import RankContext

ROUTINGS_DRAWN = 8  # distinct rounds that a configuration repeats
MIN_ROUNDS, MAX_ROUNDS = 40, 4000
BLOCKS = 10
WARMUP_ROUNDS = 8
# Identity experts: a token comes back times the sum of its weights, 1. Rounded at most three times (row, sum of a rank,
# sum of the ranks), half a unit each, on partial sums below the token; FP8 itself is up to 1/16 off.
CHECK_UNITS = 2.0
FP8_ERROR = 1 / 16


@dataclasses.dataclass
class RoundTimes:
    """Instants of every round: begin, end of dispatch, end of combine.

    Attributes:
        moebius: ours.
        gloo: the baseline's.
        copy: the bound's.
        engine: that ran.
        wire: bytes that moebius wrote to other ranks in a round.
    """

    moebius: Instants
    gloo: Instants
    copy: Instants
    engine: str
    wire: Wire


class _Rounds:
    """Inputs of a configuration, and a round over either exchange."""

    def __init__(self, context: RankContext, workload: Workload) -> None:
        self.context, self.workload, self.config = context, workload, workload.config()
        rank = context.rank
        shape = (workload.tokens, workload.hidden)
        dtype = input_dtype(self.config)
        self.inputs = [
            torch.randn(shape, generator=generator(workload.seed, 7, rank, step)).to(dtype)
            for step in range(ROUTINGS_DRAWN)
        ]
        self.routes = [route(workload, rank, step) for step in range(ROUTINGS_DRAWN)]
        num_local = self.config.num_local_experts(context.num_ranks)
        most = self.config.max_num_tokens * context.num_ranks
        rows = (num_local, most) if self.config.layout == "expert_major" else (most,)
        self.expert_out = torch.ones(*rows, workload.hidden, dtype=DTYPES[self.config.output_dtype])

    def run(self, exchange: Any, number: int) -> tuple[int, int, int]:
        """One timed round; its experts' rows are there already."""
        x, (topk_ids, topk_weights) = self.inputs[number % ROUTINGS_DRAWN], self.routes[number % ROUTINGS_DRAWN]
        self.context.start_line.wait()
        begin = now()
        received = exchange.dispatch(x, topk_ids, topk_weights)
        middle = now()
        rows = self.expert_out
        exchange.combine(rows if rows.dim() == 3 else rows[: len(received.x)], received)
        return begin, middle, now()

    def untimed(self, exchange: AllToAll, number: int) -> Callable[[], Tensor]:
        """Dispatch; what combines it."""
        received = exchange.dispatch(self.inputs[number], *self.routes[number])
        return lambda: exchange.combine(self.expert_out, received)

    def check(self, exchange: Any, name: str) -> None:
        """One round with identity experts: every token must come home as it went.

        Raises:
            MoebiusError: it did not.
        """
        x, (topk_ids, topk_weights) = self.inputs[0], self.routes[0]
        received = exchange.dispatch(x, topk_ids, topk_weights)
        rows = self._identity(received)
        out = exchange.combine(rows, received)
        error = (
            ((out.float() - x.float()).abs() / x.float().abs().amax(1, keepdim=True)).max().item() if len(x) else 0.0
        )
        limit = CHECK_UNITS * torch.finfo(out.dtype).eps + (FP8_ERROR if self.config.payload == "fp8_e4m3" else 0.0)
        if not error <= limit:
            raise MoebiusError(f"{name} returned wrong tokens: error {error:.4g}, at most {limit:.4g} expected")

    def _identity(self, received: Any) -> Tensor:
        dtype = DTYPES[self.config.output_dtype]
        x = received.x if received.scales is None else dequantise_fp8(received.x, received.scales, dtype)
        rows = x.to(dtype).contiguous()
        if self.config.layout == "expert_major":
            return rows
        weight = torch.where(received.topk_ids >= 0, received.topk_weights, 0.0).sum(1, keepdim=True)
        # Rows of the token_major layout that hold no token may hold anything, NaN too.
        return torch.where(weight > 0, rows.float() * weight, 0.0).to(dtype)


def run_rounds(
    context: RankContext, *, workload: Workload, traffic: list[tuple[Traffic, Traffic]], seconds: float
) -> RoundTimes:
    """Time one configuration for about `seconds`. Collective."""
    rounds = _Rounds(context, workload)
    with AllToAll(context.group, rounds.config) as ours, quiet_gc(), torch.inference_mode():
        gloo = GlooAllToAll(context.group, rounds.config)
        copies = CopyBound(context, traffic[context.rank])
        rounds.check(ours, "moebius")
        rounds.check(gloo, "gloo")
        wire = measure(ours, [functools.partial(rounds.untimed, ours, i) for i in range(ROUTINGS_DRAWN)])
        turns: list[tuple[Instants, Callable[[int], Any], int]] = []
        for run in (lambda i: rounds.run(ours, i), lambda i: rounds.run(gloo, i), lambda i: copies.run(1)[0]):
            turns.append(([], run, _rounds_in(context, run, seconds / 3)))
        for block in range(BLOCKS):
            for times, run, count in turns if block % 2 == 0 else reversed(turns):
                for number in range(count * block // BLOCKS, count * (block + 1) // BLOCKS):
                    times.append(run(number))
        return RoundTimes(moebius=turns[0][0], gloo=turns[1][0], copy=turns[2][0], engine=ours.engine, wire=wire)


def _rounds_in(context: RankContext, run: Callable[[int], Any], seconds: float) -> int:
    """Warm up, and agree on how many rounds fit: rank 0 says."""
    begin = now()
    for number in range(WARMUP_ROUNDS):
        run(number)
    each = (now() - begin) / WARMUP_ROUNDS / 1e9
    count = torch.tensor([max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / each)))])
    dist.broadcast(count, 0, group=context.group)
    return int(count.item())
