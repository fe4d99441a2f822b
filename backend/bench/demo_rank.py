"""What one rank of the demo does: steps of the layer over moebius and over gloo in turn, each of them checked."""

from __future__ import annotations

import dataclasses
import functools
import io
import statistics
from time import perf_counter_ns as now
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.all_to_all import AllToAll

from .baseline import GlooAllToAll, Marks
from .bound import CopyBound, Traffic
from .moe_layer import Experts, Received, Router, shared_expert, step_input, tolerance, worst_error
from .timing import Instants, quiet_gc
from .wire import Wire, measure
from .workload import DTYPES, Workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from .ranks import RankContext

SIDES = ("moebius", "gloo")
# Instants of a step, in order; the operations are the spans between them.
MARKS = ("begin", "dispatch_begin", "dispatch_end", "combine_begin", "combine_end", "end")
HALVES = ("dispatch send", "dispatch receive", "combine send", "combine receive")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How many of what.

    Attributes:
        steps: timed steps on each side.
        block: steps of one side before the other has its turn.
        warmup: steps on each side before.
        copies: of the bound, per block.
        timeline: rounds taken apart for the time line.
        seconds: after which no further block begins.
    """

    steps: int
    block: int
    warmup: int
    copies: int
    timeline: int
    seconds: float

    @property
    def blocks(self) -> int:
        """Blocks a side."""
        return -(-self.steps // self.block)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A rank's share of what one process computed, for the steps that the demo runs round and round.

    Attributes:
        topk_ids: [S, T, K] int32.
        y: [S, T, H] fp32.
        scale: [S, T] fp32.
    """

    topk_ids: Tensor
    y: Tensor
    scale: Tensor

    def pack(self) -> bytes:
        """As bytes for a pipe: a tensor itself would travel as a shared file."""
        buffer = io.BytesIO()
        torch.save(dataclasses.asdict(self), buffer)
        return buffer.getvalue()

    @classmethod
    def unpack(cls, packed: bytes) -> Reference:
        """The inverse of `pack`."""
        return cls(**torch.load(io.BytesIO(packed), weights_only=True))


@dataclasses.dataclass
class Checked:
    """The outcome of the checks of one side.

    Attributes:
        steps: that were checked.
        wrong_routing: whose experts were not the reference's, exactly.
        wrong_output: beyond the tolerance.
        worst: largest error, as a fraction of the largest term of the token's sum.
    """

    steps: int = 0
    wrong_routing: int = 0
    wrong_output: int = 0
    worst: float = 0.0


@dataclasses.dataclass
class RankRecord:
    """Everything a rank measured.

    Attributes:
        steps: by side, a row of `MARKS` per step.
        copies: per round, begin and end of dispatch's bytes, begin and end of combine's.
        checked: by side.
        timeline: by side, per round the (part, end in nanoseconds) of each part, after ("begin", ..).
        engine: that ran.
        heap_bytes: of the symmetric heap.
        wire: bytes written to other ranks in a round.
    """

    steps: dict[str, Instants]
    copies: Instants
    checked: dict[str, Checked]
    timeline: dict[str, list[Marks]]
    engine: str
    heap_bytes: int
    wire: Wire


class _Rank:
    """The layer's share of this rank, over either exchange."""

    def __init__(self, context: RankContext, workload: Workload, intermediate: int, shard: Reference) -> None:
        self.context, self.config = context, workload.config()
        self.num_local = self.config.num_local_experts(context.num_ranks)
        self.router = Router(workload)
        self.experts = Experts(workload, intermediate, context.rank * self.num_local, self.num_local)
        self.shared = shared_expert(workload, intermediate)
        self.limit = tolerance(self.config)
        pool = range(len(shard.y))
        self.topk_ids, self.expected, self.scale = shard.topk_ids, shard.y, shard.scale
        self.inputs = [step_input(workload, context.rank, step) for step in pool]
        most = self.config.max_num_tokens * context.num_ranks
        shape = (self.num_local, most) if self.config.layout == "expert_major" else (most,)
        self.expert_out = torch.zeros(*shape, workload.hidden, dtype=DTYPES[self.config.output_dtype])
        self.checked = {side: Checked() for side in SIDES}

    def rows_for(self, received: Received) -> Tensor:
        """Where the experts write: as many rows as were shown to them."""
        return self.expert_out if received.x.dim() == 3 else self.expert_out[: len(received.x)]

    def step(self, exchange: Any, side: str, number: int) -> tuple[int, ...]:
        """Run one step, check it, and return its instants, `MARKS`."""
        start_line = self.context.start_line
        x = self.inputs[number % len(self.inputs)]
        start_line.wait()
        begin = now()
        topk_ids, topk_weights = self.router(x)
        start_line.wait()
        dispatch_begin = now()
        received = exchange.dispatch(x, topk_ids, topk_weights)
        dispatch_end = now()
        rows = self.experts(received, self.rows_for(received))
        shared = self.shared(x)
        start_line.wait()
        combine_begin = now()
        routed = exchange.combine(rows, received)
        combine_end = now()
        y = routed + shared
        end = now()
        self._check(side, number % len(self.inputs), topk_ids, y)
        return begin, dispatch_begin, dispatch_end, combine_begin, combine_end, end

    def _check(self, side: str, entry: int, topk_ids: Tensor, y: Tensor) -> None:
        outcome = self.checked[side]
        error = worst_error(y, self.expected[entry], self.scale[entry])
        outcome.steps += 1
        outcome.wrong_routing += not torch.equal(topk_ids, self.topk_ids[entry])
        outcome.wrong_output += error > self.limit
        outcome.worst = max(outcome.worst, error)


def run_demo(
    context: RankContext,
    *,
    workload: Workload,
    intermediate: int,
    traffic: list[tuple[Traffic, Traffic]],
    schedule: Schedule,
    shard: bytes,
) -> RankRecord:
    """Run the whole demo on this rank. Collective.

    Args:
        context: of the rank.
        workload: the shape.
        intermediate: I, channels inside an expert.
        traffic: bytes of dispatch and combine, by rank.
        schedule: how many of what.
        shard: this rank's `Reference`, packed.
    """
    rank = _Rank(context, workload, intermediate, Reference.unpack(shard))
    with AllToAll(context.group, rank.config) as ours, quiet_gc(), torch.inference_mode():
        exchanges = {"moebius": ours, "gloo": GlooAllToAll(context.group, rank.config)}
        copies = CopyBound(context, traffic[context.rank])
        times: dict[str, Instants] = {side: [] for side in SIDES}
        for side in SIDES:
            for number in range(schedule.warmup):
                rank.step(exchanges[side], side, number)
        copies.run(schedule.copies, rank.experts.touch)
        copied: Instants = []
        begin_ns = now()
        for block in range(schedule.blocks):
            first, last = block * schedule.block, min((block + 1) * schedule.block, schedule.steps)
            for side in SIDES if block % 2 == 0 else reversed(SIDES):
                for number in range(first, last):
                    times[side].append(rank.step(exchanges[side], side, number))
            copied += copies.run(schedule.copies, rank.experts.touch)
            if context.rank == 0:
                context.progress((block + 1, {side: _round_us(times[side][first:last]) for side in SIDES}))
            if _time_is_up(context, begin_ns, schedule.seconds):
                break
        return RankRecord(
            steps=times,
            copies=copied,
            checked=rank.checked,
            timeline={
                "moebius": _timeline(rank, schedule.timeline, lambda i, marks: _in_halves(rank, ours, i, marks)),
                "gloo": _timeline(
                    rank, schedule.timeline, lambda i, marks: _gloo_parts(rank, exchanges["gloo"], i, marks)
                ),
            },
            engine=ours.engine,
            heap_bytes=ours.heap_bytes,
            wire=measure(ours, [functools.partial(_untimed, rank, ours, i) for i in range(len(rank.inputs))]),
        )


def _time_is_up(context: RankContext, begin_ns: int, seconds: float) -> bool:
    """Whether rank 0 says so, for all ranks must stop at the same block."""
    is_up = torch.tensor([now() - begin_ns > seconds * 1e9])
    dist.broadcast(is_up, 0, group=context.group)
    return bool(is_up.item())


def _round_us(times: Instants) -> float:
    """Median of dispatch plus combine on this rank."""
    return statistics.median(row[2] - row[1] + row[4] - row[3] for row in times) / 1e3


def _timeline(rank: _Rank, rounds: int, one: Callable[[int, Marks], None]) -> list[Marks]:
    taken: list[Marks] = []
    for number in range(rounds):
        taken.append([])
        one(number % len(rank.inputs), taken[-1])
    return taken


def _untimed(rank: _Rank, ours: AllToAll, entry: int) -> Callable[[], Tensor]:
    ids = rank.topk_ids[entry]
    received = ours.dispatch(rank.inputs[entry], ids, torch.full(ids.shape, 1.0 / ids.shape[1]))
    return lambda: ours.combine(rank.rows_for(received), received)


def _in_halves(rank: _Rank, ours: AllToAll, entry: int, marks: Marks) -> None:
    """A round without experts, half by half."""
    x, ids = rank.inputs[entry], rank.topk_ids[entry]
    weights = torch.full(ids.shape, 1.0 / ids.shape[1])
    rank.context.start_line.wait()
    marks.append(("begin", now()))
    pending = ours.dispatch_send(x, ids, weights)
    marks.append(("dispatch send", now()))
    received = pending.receive()
    marks.append(("dispatch receive", now()))
    returning = ours.combine_send(rank.rows_for(received), received)
    marks.append(("combine send", now()))
    returning.receive()
    marks.append(("combine receive", now()))


def _gloo_parts(rank: _Rank, gloo: Any, entry: int, marks: Marks) -> None:
    """The same round over gloo, part by part."""
    x, ids = rank.inputs[entry], rank.topk_ids[entry]
    weights = torch.full(ids.shape, 1.0 / ids.shape[1])
    rank.context.start_line.wait()
    marks.append(("begin", now()))
    arrived = gloo.dispatch(x, ids, weights, marks)
    gloo.combine(rank.rows_for(arrived), arrived, marks)
