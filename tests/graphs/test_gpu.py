"""Captured steps on a device, bit for bit those of the reference; virtual ranks on streams."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import moebius
from moebius import AllToAll, PeerTimeoutError, ShapeError, StateError
from moebius.graphs import GraphedStep
from tests.graphs.steps import (
    HIDDEN,
    LAYERS,
    MOST,
    PADDING,
    InterleavedStep,
    RanksStep,
    Step,
    batch_of,
    config,
    reference_step,
    side_by_side,
)
from tests.graphs.virtual_ranks import BUCKETS, VirtualRanks
from tests.helpers.compare import assert_same

pytestmark = pytest.mark.gpu

REPLAYS = 1000
COUNTS = ((4, 4, 4, 4), (1, 9, 16, 2), (0, 5, 2, 0), (0, 0, 0, 0), (16, 16, 16, 16), (3, 0, 0, 0), (7, 1, 12, 16))


class Batch:
    """A step of all ranks.

    Attributes:
        ranks: what each rank decodes, on the device.
        want: what it must give, by the number of layers.
    """

    def __init__(self, seed: int, counts: tuple[int, ...], device: torch.device, layers: tuple[int, ...]) -> None:
        on_host = [batch_of(num_tokens, seed, rank) for rank, num_tokens in enumerate(counts)]
        self.ranks = [batch.to(device) for batch in on_host]
        self.want = {count: [out.to(device) for out in reference_step(on_host, count)] for count in layers}


def batches_for(ranks: VirtualRanks, *layers: int) -> list[Batch]:
    size = len(ranks.a2as)
    made = [Batch(seed, counts[:size], ranks.device, layers) for seed, counts in enumerate(COUNTS)]
    torch.cuda.synchronize()
    return made


def test_an_odd_number_of_calls_replayed_between_eager_ones() -> None:
    """Replays and eager rounds change places with the device's epoch; inputs and T change every time."""
    with VirtualRanks(2) as ranks:
        batches = batches_for(ranks, 1, LAYERS)
        graphs = ranks.graphed(lambda rank: ranks.step(rank, LAYERS))
        eager = {count: [ranks.step(rank, count) for rank in range(len(ranks.a2as))] for count in (1, LAYERS)}
        order = random.Random(1)
        for batch in batches:
            ranks.run(eager[LAYERS], batch.ranks, batch.want[LAYERS])
        ranks.settle("eager")
        for _ in range(REPLAYS):
            batch = order.choice(batches)
            ranks.run(graphs, batch.ranks, batch.want[LAYERS])
            for count in order.choices((0, 1, LAYERS), (6, 1, 1)):
                if count:
                    batch = order.choice(batches)
                    ranks.run(eager[count], batch.ranks, batch.want[count])
        ranks.settle("replayed and eager")


def test_ranks_in_different_buckets() -> None:
    with VirtualRanks(4) as ranks:
        batches = batches_for(ranks, LAYERS)
        graphs = ranks.graphed(lambda rank: ranks.step(rank, LAYERS))
        for _ in range(20):
            for batch in batches:
                ranks.run(graphs, batch.ranks, batch.want[LAYERS])
        ranks.settle("replayed")


def test_graphs_in_any_order() -> None:
    """Of one round, of three, and of micro-batches; each replay finds its rounds wherever the others left off."""
    with VirtualRanks(2) as ranks:
        batches = batches_for(ranks, 1, LAYERS)
        steps = [
            (1, ranks.graphed(lambda rank: ranks.step(rank, 1))),
            (LAYERS, ranks.graphed(lambda rank: ranks.step(rank, LAYERS))),
            (LAYERS, ranks.graphed(lambda rank: InterleavedStep(ranks.a2as[rank]))),
        ]
        order = random.Random(2)
        for _ in range(300):
            layers, graphs = order.choice(steps)
            batch = order.choice(batches)
            calls = [graph.eager for graph in graphs] if order.random() < 0.2 else graphs
            ranks.run(calls, batch.ranks, batch.want[layers])
        ranks.settle("in any order")


@pytest.mark.parametrize("num_streams", [1, 2])
def test_micro_batches(num_streams: int) -> None:
    with VirtualRanks(2) as ranks:
        batches = batches_for(ranks, LAYERS)

        def make(rank: int) -> Step:
            return InterleavedStep(ranks.a2as[rank], comm_stream=ranks.comm_streams[rank] if num_streams == 2 else None)

        graphs = ranks.graphed(make)
        for number in range(100):
            batch = batches[number % len(batches)]
            calls = [graph.eager for graph in graphs] if number % 5 == 4 else graphs
            ranks.run(calls, batch.ranks, batch.want[LAYERS])
        ranks.settle("micro-batches")


class Together:
    """The steps of all ranks as one, forked from one stream and joined again; T is that of the rank with most tokens.

    Its inputs hold the ranks side by side, see `side_by_side`.
    """

    def __init__(self, ranks: VirtualRanks) -> None:
        self._ranks = ranks
        self._steps = [ranks.step(rank, LAYERS) for rank in range(len(ranks.a2as))]

    def __call__(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, counts: Tensor, *, num_valid_tokens: Tensor
    ) -> Tensor:
        assert num_valid_tokens.numel() == 1
        # Cut before the first rank begins: what follows uses no kernel that the ranks have not been primed with.
        parts = [
            [each.view(len(each), len(self._steps), -1)[:, rank].contiguous() for each in (x, topk_ids, topk_weights)]
            for rank in range(len(self._steps))
        ]
        current = torch.cuda.current_stream()
        outputs = []
        for rank, (step, stream) in enumerate(zip(self._steps, self._ranks.comm_streams, strict=True)):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                outputs.append(step(*parts[rank], num_valid_tokens=counts[0, rank : rank + 1]))
        for stream in self._ranks.comm_streams:
            current.wait_stream(stream)
        return torch.cat(outputs, 1)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("form", ["streams", "one-stream", "one-stream-micro-batches"])
def test_all_ranks_in_one_graph(num_ranks: int, form: str) -> None:
    """The first form needs the device to run the ranks' branches at a time, the others need no half to wait."""
    with VirtualRanks(num_ranks) as ranks:
        batches = batches_for(ranks, LAYERS)
        inputs = [side_by_side(batch.ranks) for batch in batches]
        num_parts = 2 if form == "one-stream-micro-batches" else 1
        halves = RanksStep([InterleavedStep(a2a, num_parts=num_parts) for a2a in ranks.a2as])
        step = Together(ranks) if form == "streams" else halves
        with GraphedStep(step, ranks.a2as, inputs[0], buckets=BUCKETS, padding=(*PADDING, 0)) as graph:
            graph.capture()
            for number in range(60):
                at = number % len(batches)
                call = graph.eager if number % 5 == 4 else graph
                out = call(*inputs[at])
                for rank, want in enumerate(batches[at].want[LAYERS]):
                    ranks.compare(rank, out[: want.shape[0], rank * HIDDEN : (rank + 1) * HIDDEN].contiguous(), want)
            ranks.settle("one graph")


@pytest.mark.parametrize("broken_by", ["python", "order", "cuda"])
def test_a_capture_that_fails_is_made_again_on_that_rank_alone(broken_by: str) -> None:
    with VirtualRanks(2) as ranks:
        (batch,) = batches_for(ranks, LAYERS)[1:2]
        is_broken = True

        class Broken(Step):
            def __call__(self, x: Tensor, *rest: Tensor, num_valid_tokens: Tensor | None = None) -> Tensor:
                out = super().__call__(x, *rest, num_valid_tokens=num_valid_tokens)
                if is_broken and torch.cuda.is_current_stream_capturing() and x.shape[0] == 4:
                    if broken_by == "python":
                        raise ValueError("no experts")
                    if broken_by == "order":
                        recv = self.a2a.dispatch_send(x, *rest).receive()
                        for _ in range(2):
                            self.a2a.combine(recv.x, recv)
                    out.sum().item()  # waits for the device
                return out

        graphs = ranks.graphed(lambda rank: (Broken if rank == 0 else Step)(ranks.a2as[rank]), capture=False)
        cause = {"python": "ValueError: no experts", "order": "StateError: combine: round", "cuda": "CUDA error"}[
            broken_by
        ]
        with pytest.raises(StateError, match=f"capture of the bucket of 4 tokens failed, .*{cause}"):
            graphs[0].capture()
        graphs[1].capture()
        eager = [ranks.step(rank, LAYERS) for rank in range(len(ranks.a2as))]
        ranks.run(eager, batch.ranks, batch.want[LAYERS])
        ranks.settle("eager after the failure")
        is_broken = False
        graphs[0].capture()
        for _ in range(5):
            ranks.run(graphs, batch.ranks, batch.want[LAYERS])
            ranks.run(eager, batch.ranks, batch.want[LAYERS])
        ranks.settle("captured again")


def test_a_batch_written_in_place() -> None:
    with VirtualRanks(2) as ranks:
        batches = batches_for(ranks, LAYERS)
        graphs = ranks.graphed(lambda rank: ranks.step(rank, LAYERS))

        def in_place(rank: int) -> Any:
            def call(*given: Tensor) -> Tensor:
                views = [static[: tensor.shape[0]] for static, tensor in zip(graphs[rank].inputs, given, strict=True)]
                for view, tensor in zip(views, given, strict=True):
                    view.copy_(tensor)
                return graphs[rank](*views)

            return call

        for batch in batches * 3:
            ranks.run([in_place(rank) for rank in range(len(ranks.a2as))], batch.ranks, batch.want[LAYERS])
        ranks.settle("in place")


def test_a_rank_that_does_not_replay_is_named_and_the_others_go_on() -> None:
    with VirtualRanks(2, timeout_s=0.3) as ranks:
        batch = batches_for(ranks, LAYERS)[0]
        graphs = ranks.graphed(lambda rank: ranks.step(rank, LAYERS))
        graphs[0](*batch.ranks[0].tensors)
        with pytest.raises(PeerTimeoutError, match="rank 1"):
            ranks.a2as[0].synchronize()
        assert ranks.a2as[0].dead_ranks == (1,)
        graphs[0](*batch.ranks[0].tensors)
        ranks.a2as[0].synchronize()


def test_wrong_use_is_refused() -> None:
    device = torch.device("cuda", 0)
    batch = batch_of(3, 0)
    given = batch.to(device).tensors  # here: a copy from the host may not be captured
    with AllToAll(moebius.virtual_ranks(1)[0], config(), device) as a2a:
        with pytest.raises(ShapeError, match=r"`example\[0\]` must be \[T, ...\] on cuda:0"):
            GraphedStep(Step(a2a), a2a, batch.tensors)
        graph = GraphedStep(Step(a2a), a2a, given, buckets=BUCKETS, padding=PADDING)
        assert graph.device == device
        graph.capture()
        with pytest.raises(ShapeError, match=r"input 0 must be .* on cuda:0"):
            graph(*batch.tensors)
        with pytest.raises(ShapeError, match="at most 16 tokens"):
            graph(*batch_of(17, 0).to(device).tensors)
        outer = torch.cuda.CUDAGraph()
        with torch.cuda.graph(outer), pytest.raises(StateError, match="cannot be captured into another graph"):
            graph(*given)
        (want,) = reference_step([batch])
        got = graph(*given)
        assert_same(got.cpu(), want, "after the refusals")
    with pytest.raises(StateError, match="is closed"):
        graph(*given)
    graph.close()
    assert_same(got.cpu(), want, "after closing")


def test_calls_on_changing_streams_follow_one_another() -> None:
    device = torch.device("cuda", 0)
    with AllToAll(moebius.virtual_ranks(1)[0], config(), device) as a2a:
        graph = GraphedStep(Step(a2a), a2a, batch_of(1, 0).to(device).tensors, buckets=BUCKETS, padding=PADDING)
        graph.capture()
        streams = [torch.cuda.Stream(device) for _ in range(3)]  # type: ignore[no-untyped-call]
        batches = [batch_of(number % (MOST + 1), number) for number in range(30)]
        given = [batch.to(device) for batch in batches]
        torch.cuda.synchronize()
        kept = []
        for number, batch in enumerate(given):
            with torch.cuda.stream(streams[number % 3]):
                kept.append(graph(*batch.tensors).clone())
        a2a.synchronize()
        for number, (got, batch) in enumerate(zip(kept, batches, strict=True)):
            assert_same(got.cpu(), reference_step([batch])[0], f"call {number}")
        graph.close()


def reserved_by(buckets: tuple[int, ...], device: torch.device) -> int:
    """Bytes that capturing these buckets takes; of a step whose tensors are much larger than a segment."""
    with AllToAll(moebius.virtual_ranks(1)[0], config(max_num_tokens=4096), device) as a2a:
        step = Step(a2a)
        graph = GraphedStep(step, a2a, batch_of(1, 0).to(device).tensors, buckets=buckets, padding=PADDING)
        graph.warm_up()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        graph.capture()
        taken = torch.cuda.memory_reserved(device) - before
        graph.close()
    return taken


def test_buckets_share_their_memory() -> None:
    device = torch.device("cuda", 0)
    one = reserved_by((4096,), device)
    assert one > 1 << 20
    assert reserved_by((256, 512, 1024, 2048, 4096), device) <= 1.25 * one
