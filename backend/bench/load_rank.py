"""What one rank does under load: decode steps of a stack of MoE layers, for whoever has arrived.

Rank 0's clock is everybody's: before a step all ranks meet, and it publishes the time (a "tick") in shared memory, the
same for every exchange under test. With the arrivals known to all, every rank schedules all ranks alike.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import statistics
import time
from time import perf_counter_ns as now
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebius.all_to_all import AllToAll
from moebius.errors import MoebiusError

from .baseline import GlooAllToAll
from .load_schedule import Scheduler
from .moe_layer import Experts, Router, WholeLayer, shared_expert, step_input, tolerance, worst_error
from .routing_trace import read_routing_trace
from .timing import Instants, quiet_gc
from .workload import DTYPES, Workload, generator, input_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .load_arrivals import Request
    from .ranks import RankContext

SIDES = ("moebius", "gloo")
POOL_STEPS = 8  # distinct inputs that the steps repeat
WARMUP_STEPS = 20
FULL_STEPS = 80  # of each side, whose median is the capacity
CUTOFF = 1.25  # of a leg's length: an overloaded one is not served to its end
_NAP_NS = 300_000  # the last part of a wait for an arrival is spun, for sleeping is not exact

# A row of a step: begin of the wait for the tick, begin, then per layer the four below, and the end.
LAYER_MARKS = ("dispatch_begin", "dispatch_end", "combine_begin", "combine_end")


@dataclasses.dataclass(frozen=True)
class Stack:
    """What is computed.

    Attributes:
        workload: shape of every layer; its `tokens` are the most requests that run on a rank.
        layers: N.
        intermediate: I, channels inside an expert.
    """

    workload: Workload
    layers: int
    intermediate: int

    def layer(self, number: int) -> Workload:
        """The shape of one layer, with weights and routing of its own."""
        return dataclasses.replace(self.workload, seed=self.workload.seed + 1000 * number)


@dataclasses.dataclass(frozen=True)
class Leg:
    """Requests given to one side, to a system that is empty.

    Attributes:
        side: of `SIDES`.
        requests: by time.
        seconds: that they were drawn for.
    """

    side: str
    requests: tuple[Request, ...]
    seconds: float


@dataclasses.dataclass
class LegRecord:
    """What a rank measured in a leg.

    Attributes:
        begin_ns: the first tick, to which the arrivals are relative.
        ticks: by step, when rank 0 decided who is in it.
        rows: by step, the instants of this rank.
        sizes: by step, tokens of this rank.
        first_step: by request; -1 when it was not begun before the cutoff.
        last_step: by request.
    """

    begin_ns: int
    ticks: list[int]
    rows: Instants
    sizes: list[int]
    first_step: list[int]
    last_step: list[int]


class _Ticks:
    """Rank 0's clock, for all.

    The word is the message: nothing else is read on its account, so its memory order does not matter.
    """

    def __init__(self, context: RankContext) -> None:
        self._context = context
        self._word = ctypes.c_int64.from_address(context.inboxes[0].data_ptr())
        self._last = self._word.value  # stale, and older than any to come

    def wait(self, not_before_ns: int = 0) -> int:
        """Meet the others, and return the one time that rank 0 read after it, `not_before_ns` or later.

        Args:
            not_before_ns: the same on all ranks, which sleep until shortly before.
        """
        left = not_before_ns - now()
        if left > _NAP_NS:
            time.sleep((left - _NAP_NS) / 1e9)
        self._context.start_line.wait()
        if self._context.rank == 0:
            while (tick := now()) < not_before_ns:
                os.sched_yield()
            self._word.value = tick
            return tick
        while (tick := self._word.value) == self._last:
            os.sched_yield()
        self._last = tick
        return tick


class _Layer:
    """This rank's share of one layer."""

    def __init__(self, context: RankContext, stack: Stack, number: int) -> None:
        self.workload = workload = stack.layer(number)
        num_local = workload.config().num_local_experts(context.num_ranks)
        self.router = Router(workload)
        self.experts = Experts(workload, stack.intermediate, context.rank * num_local, num_local)
        self.shared = shared_expert(workload, stack.intermediate)
        self.routes: list[tuple[Tensor, Tensor]] = []
        if workload.routing_trace:
            trace = read_routing_trace(workload.routing_trace)
            for step in range(POOL_STEPS):  # the same key in all layers: the same tokens
                random = generator(stack.workload.seed, 8, context.rank, step)
                self.routes.append(trace.sample(number, workload.tokens, random))

    def route(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The router's choice, which is computed in any case; or the recorded one in its place."""
        chosen = self.router(x)
        if not self.routes:
            return chosen
        ids, weights = self.routes[step % POOL_STEPS]
        return ids[: len(x)], weights[: len(x)]


class RankStack:
    """The stack's share of this rank, over any exchange."""

    def __init__(self, context: RankContext, stack: Stack) -> None:
        """Make its layers."""
        self.context, self.stack = context, stack
        self.config = config = stack.workload.config()
        self.layers = [_Layer(context, stack, number) for number in range(stack.layers)]
        self.inputs = [step_input(stack.workload, context.rank, step) for step in range(POOL_STEPS)]
        most = config.max_num_tokens * context.num_ranks
        shape = (config.num_local_experts(context.num_ranks), most) if config.layout == "expert_major" else (most,)
        self.expert_out = torch.zeros(*shape, config.hidden, dtype=DTYPES[config.output_dtype])
        self.dtype = input_dtype(config)

    def step(self, exchange: Any, num_tokens: int, number: int, marks: list[int]) -> None:
        """One decode step of `num_tokens` requests; appends `LAYER_MARKS` of each layer to `marks`."""
        x = self.inputs[number % POOL_STEPS][:num_tokens]
        for layer in self.layers:
            ids, weights = layer.route(x, number)
            y = self.run_layer(exchange, layer, x, ids, weights, marks).float()
            x = (y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-6)).to(self.dtype)

    def run_layer(
        self, exchange: Any, layer: _Layer, x: Tensor, ids: Tensor, weights: Tensor, marks: list[int]
    ) -> Tensor:
        """Dispatch, experts, combine, shared expert: [T, H]."""
        marks.append(now())
        received = exchange.dispatch(x, ids, weights)
        marks.append(now())
        out = self.expert_out
        rows = layer.experts(received, out if out.dim() == 3 else out[: len(received.x)])
        shared = layer.shared(x)
        marks.append(now())
        routed: Tensor = exchange.combine(rows, received)
        marks.append(now())
        return routed + shared

    def check(self, exchange: Any, name: str) -> None:
        """A full step of every layer against the layer in one process.

        Raises:
            MoebiusError: they differ.
        """
        for number, layer in enumerate(self.layers):
            expected = WholeLayer(layer.workload, self.stack.intermediate).expect(0)
            rank = self.context.rank
            x = expected.x[rank]
            y = self.run_layer(exchange, layer, x, *layer.router(x), [])
            error, limit = worst_error(y, expected.y[rank], expected.scale[rank]), tolerance(self.config)
            if not error <= limit:
                raise MoebiusError(f"{name}, layer {number}: error {error:.4g}, at most {limit:.4g} expected")


def _exchange(context: RankContext, side: str, ours: AllToAll) -> Any:
    return ours if side == "moebius" else GlooAllToAll(context.group, ours.config)


def find_capacity(context: RankContext, *, stack: Stack, sides: Sequence[str]) -> dict[str, float]:
    """Check every side, and time its steps with all slots taken. Collective.

    Returns:
        By side, the median seconds of a step on this rank.
    """
    rank = RankStack(context, stack)
    most = stack.workload.tokens
    ticks = _Ticks(context)
    seconds = {}
    with AllToAll(context.group, rank.config) as ours, quiet_gc(), torch.inference_mode():
        for side in sides:
            exchange = _exchange(context, side, ours)
            rank.check(exchange, side)
            spent = []
            for number in range(WARMUP_STEPS + FULL_STEPS):
                begin = now()
                ticks.wait()
                rank.step(exchange, most, number, [])
                spent.append(now() - begin)
            seconds[side] = statistics.median(spent[WARMUP_STEPS:]) / 1e9
    return seconds


def run_legs(context: RankContext, *, stack: Stack, legs: Sequence[Leg]) -> tuple[list[LegRecord], str]:
    """Run legs one after the other. Collective.

    Returns:
        A record each, and the engine that ran.
    """
    rank = RankStack(context, stack)
    ticks = _Ticks(context)
    records = []
    with AllToAll(context.group, rank.config) as ours, quiet_gc(), torch.inference_mode():
        exchanges = {side: _exchange(context, side, ours) for side in sorted({leg.side for leg in legs})}
        for exchange in exchanges.values():
            for number in range(WARMUP_STEPS):
                rank.step(exchange, (number * 7) % (stack.workload.tokens + 1), number, [])
        for leg in legs:
            records.append(_run_leg(rank, exchanges[leg.side], leg, ticks))
            if context.rank == 0:
                context.progress(leg.side)
        return records, ours.engine


def _run_leg(rank: RankStack, exchange: Any, leg: Leg, ticks: _Ticks) -> LegRecord:
    own = rank.context.rank
    schedule = Scheduler(leg.requests, rank.context.num_ranks, rank.stack.workload.tokens)
    record = LegRecord(ticks.wait(), [], [], [], schedule.first_step, schedule.last_step)
    cutoff_ns = record.begin_ns + round(CUTOFF * leg.seconds * 1e9)
    while not schedule.is_done:
        next_ns = schedule.next_arrival_ns
        is_idle = schedule.is_idle
        enter = now()
        tick = ticks.wait(record.begin_ns + next_ns if is_idle and next_ns is not None else 0)
        if tick > cutoff_ns:
            break
        schedule.admit(tick - record.begin_ns)
        # Waiting for a request is no part of the step that serves it.
        marks = [tick if is_idle else enter, now()]
        rank.step(exchange, schedule.sizes[own], schedule.num_steps, marks)
        marks.append(now())
        record.ticks.append(tick)
        record.rows.append(tuple(marks))
        record.sizes.append(schedule.sizes[own])
        schedule.end_step()
    return record
