"""Virtual ranks of one device, each with a stream of its own, driven by one thread.

A half on one stream may wait for a half that the thread has yet to enqueue on another. That is fine as long as nothing
in between waits for the device, and three things do: the first use of a kernel (it is loaded then) and streams that
share a hardware queue (see tests/conftest.py for both), and memory that the allocator has yet to ask CUDA for, which
`_prime` does ahead, with a rank that has nobody to wait for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import moebius
from moebius import AllToAll
from moebius.graphs import GraphedStep
from tests.graphs.steps import PADDING, InterleavedStep, Step, batch_of, config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.graphs.steps import RankBatch

NUM_SMS = 16  # of each half: those of all ranks have to fit on the device at a time
TIMEOUT_S = 10.0
BUCKETS = (2, 4, 16)
DEVICE = "cuda:0"


class VirtualRanks:
    """The ranks. Use as a context manager.

    Attributes:
        a2as: of each rank.
        streams: of each rank, for its eager calls and its replays.
        comm_streams: of each rank, for the halves of micro-batches.
    """

    def __init__(self, num_ranks: int, **options: object) -> None:
        self.config = config(**{"timeout_s": TIMEOUT_S, **options})
        self.device = torch.device(DEVICE)
        self.streams = self._streams(num_ranks)
        self.comm_streams = self._streams(num_ranks)
        self._differing = [torch.zeros((), dtype=torch.int64, device=self.device) for _ in self.streams]
        self._prime()
        self.a2as = [self._make(group) for group in moebius.virtual_ranks(num_ranks)]
        self._graphs: list[GraphedStep[Any]] = []
        torch.cuda.synchronize()

    def _streams(self, count: int) -> list[torch.cuda.Stream]:
        return [torch.cuda.Stream(self.device) for _ in range(count)]  # type: ignore[no-untyped-call]

    def _make(self, group: moebius.VirtualRank) -> AllToAll:
        return AllToAll(group, self.config, self.device, num_sms=NUM_SMS)

    def _prime(self) -> None:
        """Load the kernels, and leave memory on every stream."""
        batch = batch_of(self.config.max_num_tokens, 0).to(self.device)
        with self._make(moebius.virtual_ranks(1)[0]) as lone:
            for stream, comm_stream in zip(self.streams, self.comm_streams, strict=True):
                for step in (Step(lone), InterleavedStep(lone, comm_stream=comm_stream)):
                    with torch.cuda.stream(stream), self._graphed(step, stream) as graph:
                        graph.capture()
                        got = graph(*batch.tensors).clone()
                        self.compare(0, got, graph.eager(*batch.tensors))
                        for num_tokens in (9, 1, 0):
                            fewer = [tensor[:num_tokens] for tensor in batch.tensors]
                            self.compare(0, graph(*fewer), got[:num_tokens])
                            Step(lone)(*fewer)
                    torch.cuda.synchronize()

    def _graphed(self, step: Step, stream: torch.cuda.Stream, **options: Any) -> GraphedStep[Tensor]:
        options = {"buckets": BUCKETS, "padding": PADDING, **options}
        example = batch_of(1, 0).to(self.device).tensors
        # What is captured on a rank's own stream finds the workspaces and the memory that were made there.
        return GraphedStep(step, step.a2a, example, stream=stream, **options)

    def __enter__(self) -> VirtualRanks:
        return self

    def __exit__(self, *_: object) -> None:
        for graph in self._graphs:
            graph.close()
        torch.cuda.synchronize()
        for a2a in self.a2as:
            a2a.close()

    def each(self, call: Callable[[int], Any]) -> list[Any]:
        """Call for every rank, on its stream."""
        results = []
        for rank, stream in enumerate(self.streams):
            with torch.cuda.stream(stream):
                results.append(call(rank))
        return results

    def graphed(
        self, make: Callable[[int], Step], *, capture: bool = True, **options: Any
    ) -> list[GraphedStep[Tensor]]:
        """A graphed step of each rank; all are warmed up before the first is captured, which waits for the device."""
        graphs = [self._graphed(make(rank), stream, **options) for rank, stream in enumerate(self.streams)]
        self._graphs += graphs
        self.each(lambda rank: graphs[rank].warm_up())
        if capture:
            self.each(lambda rank: graphs[rank].capture())
        return graphs

    def step(self, rank: int, num_layers: int) -> Step:
        return Step(self.a2as[rank], num_layers)

    def compare(self, rank: int, got: Tensor, want: Tensor) -> None:
        """Count the elements that differ to the bit; on the current stream, and without waiting for it."""
        assert got.shape == want.shape
        assert got.dtype == want.dtype == torch.bfloat16
        self._differing[rank] += (got.view(torch.int16) != want.view(torch.int16)).sum()

    def run(self, calls: Sequence[Callable[..., Tensor]], batches: Sequence[RankBatch], want: Sequence[Tensor]) -> None:
        """One call on every rank, compared with what it should give."""
        self.each(lambda rank: self.compare(rank, calls[rank](*batches[rank].tensors), want[rank]))

    def settle(self, what: str) -> None:
        """Wait for everything; nothing may have failed or differed."""
        for a2a in self.a2as:
            a2a.synchronize()
        differing = [int(count) for count in self._differing]
        assert not any(differing), f"{what}: elements that differ, by rank: {differing}"
