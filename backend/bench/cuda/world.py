"""The ranks that one process drives on a device: their all-to-alls, tensors and routings, made before any timing."""

from __future__ import annotations

import contextlib
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebius.all_to_all import AllToAll
from moebius.bench.baseline import dequantise_fp8
from moebius.bench.sweep_rank import CHECK_UNITS, FP8_ERROR
from moebius.bench.workload import DTYPES, input_dtype, route
from moebius.errors import MoebiusError
from moebius.wire import Wire

from .schedules import HALVES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moebius.bench.workload import Workload

    from .devices import Device

ROUTINGS_DRAWN = 4  # distinct rounds that a graph repeats
FEW_ROUTINGS_FROM = 1024  # tokens, from which two must do: they fill the caches by themselves


def num_routings(tokens: int) -> int:
    """Distinct inputs and routings of a workload."""
    return ROUTINGS_DRAWN if tokens < FEW_ROUTINGS_FROM else 2


class World:
    """Our all-to-all on every lane of a device; its `step` is a half of it."""

    def __init__(
        self, device: Device, groups: Sequence[Any], workload: Workload, num_sms: int, timeout_s: float
    ) -> None:
        """Construct one rank a lane.

        Args:
            device: with as many lanes as there are groups.
            groups: virtual ranks, or this process's group of several processes.
            workload: the largest: its shape decides all memory.
            num_sms: most blocks of a kernel of one rank.
            timeout_s: deadline of a wait.
        """
        self.device, self.config = device, workload.config(timeout_s)
        budget = num_sms if device.is_cuda else None
        self._stack = contextlib.ExitStack()
        self.ranks = [
            self._stack.enter_context(AllToAll(group, self.config, device.where, num_sms=budget)) for group in groups
        ]
        self.num_ranks = self.ranks[0].num_ranks
        dtype = DTYPES[self.config.output_dtype]
        rows = self.num_ranks * self.config.max_num_tokens
        self._local = self.config.num_local_experts(self.num_ranks)
        shape = (self._local, rows) if self.config.layout == "expert_major" else (rows,)
        where = device.where
        # Private to a rank: shared, the reads of eight ranks would be one in the cache.
        self.expert_out = [torch.zeros(*shape, self.config.hidden, dtype=dtype, device=where) for _ in groups]
        self._out = [self._receive_buffers() for _ in groups]
        self._all_combined = [
            torch.empty(workload.tokens, self.config.hidden, dtype=dtype, device=where) for _ in groups
        ]
        self._combined = self._all_combined
        self._open: list[Any] = [None] * len(groups)
        self._loaded: Workload | None = None
        self.inputs: list[list[Tensor]] = []
        self.routes: list[list[tuple[Tensor, Tensor]]] = []
        self.host_routes: list[list[tuple[Tensor, Tensor]]] = []

    def _receive_buffers(self) -> dict[str, Tensor]:
        """What dispatch is received into: given, for a captured round would get its own and fill the memory."""
        if self.config.layout == "token_major":
            return {}
        wire, rows = Wire.of(self.config), self.num_ranks * self.config.max_num_tokens
        where = self.device.where
        found = {"out": torch.empty(self._local, rows, wire.payload_len, dtype=wire.dtype, device=where)}
        if wire.scale_dtype is not None:
            scales = torch.empty(self._local, wire.scale_len, rows, dtype=wire.scale_dtype, device=where)
            found["out_scales"] = scales.transpose(1, 2)
        return found

    def load(self, workload: Workload) -> None:
        """Make the tokens and routings of every lane's rank, and random rows for its experts; once a workload."""
        if workload == self._loaded:
            return
        where, dtype = self.device.where, input_dtype(self.config)
        random = torch.Generator(where).manual_seed(workload.seed + 1)
        drawn = range(num_routings(workload.tokens))
        shape = (workload.tokens, workload.hidden)
        self.host_routes = [[route(workload, a2a.rank, step) for step in drawn] for a2a in self.ranks]
        self.routes = [[(ids.to(where), weights.to(where)) for ids, weights in lane] for lane in self.host_routes]
        self.inputs = [
            [torch.randn(shape, generator=random, device=where, dtype=torch.float32).to(dtype) for _ in drawn]
            for _ in self.ranks
        ]
        self._combined = [rows[: workload.tokens] for rows in self._all_combined]
        for rows in self.expert_out:
            rows.normal_(generator=random)
        self.device.synchronize()  # lanes do not follow the stream that this ran on
        self._loaded = workload

    def step(self, lane: int, half: str, number: int) -> None:
        """See `schedules.Exchange`."""
        if half == "dispatch_send":
            index = number % len(self.inputs[lane])
            self._open[lane] = self.ranks[lane].dispatch_send(
                self.inputs[lane][index], *self.routes[lane][index], **self._out[lane]
            )
        elif half == "combine_send":
            received = self._open[lane]
            self._open[lane] = self.ranks[lane].combine_send(self.expert_out[lane], received, out=self._combined[lane])
        elif half == "dispatch":
            index = number % len(self.inputs[lane])
            self._open[lane] = self.ranks[lane].dispatch(
                self.inputs[lane][index], *self.routes[lane][index], **self._out[lane]
            )
        elif half == "combine":
            received = self._open[lane]
            self._open[lane] = self.ranks[lane].combine(self.expert_out[lane], received, out=self._combined[lane])
        else:
            self._open[lane] = self._open[lane].receive()

    def host_times(self) -> dict[str, float]:
        """Microseconds of the host in calls of lane 0, without options: a round in halves, then one in two calls.

        For a world of one rank: others' sends would come after this one's receive.

        Returns:
            each half and all of them ("halves"), "dispatch", "combine" and these two together ("round").
        """
        a2a, x, (ids, weights) = self.ranks[0], self.inputs[0][0], self.routes[0][0]
        expert_out = self.expert_out[0]
        begin = perf_counter_ns()
        pending = a2a.dispatch_send(x, ids, weights)
        sent = perf_counter_ns()
        received = pending.receive()
        arrived = perf_counter_ns()
        returning = a2a.combine_send(expert_out, received)
        replied = perf_counter_ns()
        returning.receive()
        home = perf_counter_ns()
        received = a2a.dispatch(x, ids, weights)
        dispatched = perf_counter_ns()
        a2a.combine(expert_out, received)
        combined = perf_counter_ns()
        spans = {
            "dispatch_send": sent - begin,
            "dispatch_recv": arrived - sent,
            "combine_send": replied - arrived,
            "combine_recv": home - replied,
            "halves": home - begin,
            "dispatch": dispatched - home,
            "combine": combined - dispatched,
            "round": combined - home,
        }
        return {name: span / 1e3 for name, span in spans.items()}

    def check(self) -> None:
        """One round with experts that return their tokens, compared on the device; then random rows again.

        Raises:
            MoebiusError: a token came home as another one, or a fault was recorded.
        """
        for half in HALVES:
            for lane in range(len(self.ranks)):
                if half == "combine_send":
                    self._identity(lane)
                self.step(lane, half, 0)
        self.settle()
        for lane, a2a in enumerate(self.ranks):
            x, out = self.inputs[lane][0].float(), self._combined[lane].float()
            error = float(((out - x).abs() / x.abs().amax(1, keepdim=True)).max()) if len(x) else 0.0
            limit = CHECK_UNITS * torch.finfo(self._combined[lane].dtype).eps
            limit += FP8_ERROR if self.config.payload == "fp8_e4m3" else 0.0
            if not error <= limit:
                raise MoebiusError(f"rank {a2a.rank} got wrong tokens: error {error:.4g}, at most {limit:.4g} expected")
            self.expert_out[lane].normal_()
        self.device.synchronize()

    def _identity(self, lane: int) -> None:
        """Write what the lane's rank received into its experts' rows."""
        received, target = self._open[lane], self.expert_out[lane]
        if self.config.layout == "expert_major":
            for expert, count in enumerate(received.expert_num_tokens.tolist()):
                scales = None if received.scales is None else received.scales[expert, :count]
                target[expert, :count] = _floats(received.x[expert, :count], scales, target.dtype)
            return
        ids, weights = received.topk_ids, received.topk_weights
        weight = torch.where(ids >= 0, weights, 0.0).sum(1, keepdim=True)
        for source, count in enumerate(received.src_num_tokens.tolist()):
            rows = slice(source * self.config.max_num_tokens, source * self.config.max_num_tokens + count)
            scales = None if received.scales is None else received.scales[rows]
            target[rows] = (_floats(received.x[rows], scales, torch.float32) * weight[rows]).to(target.dtype)

    def settle(self) -> None:
        """Wait for the device, and raise what went wrong on it.

        Raises:
            MoebiusError: a fault that a rank recorded.
        """
        self.device.synchronize()
        for a2a in self.ranks:
            a2a.synchronize()
            if a2a.dead_ranks:
                raise MoebiusError(f"rank {a2a.rank} has given up ranks {a2a.dead_ranks}")

    def close(self) -> None:
        """Let go of everything."""
        self._stack.close()
        self._open, self._out, self.expert_out, self.inputs, self.routes = [], [], [], [], []
        self._combined, self._all_combined = [], []
        if self.device.is_cuda:
            torch.cuda.empty_cache()


def _floats(x: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (x if scales is None else dequantise_fp8(x, scales, dtype)).to(dtype)
