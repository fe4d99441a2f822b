"""Replays of captured rounds on the emulated kernels of the CUDA engine.

The host executor captures and replays our kernels, and torch's not: a step here consists of rounds alone, and what its
experts give is known beforehand. What is put to the test is what a graph has to find anew in every replay: the number
of its rounds, its slots and signals, and how many tokens are no padding.
"""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import moebius
from moebius import reference
from moebius.graphs import GraphedStep
from tests.graphs.fake_cuda import FakeCuda
from tests.graphs.steps import HIDDEN, LAYERS, MOST, RankBatch, batch_of, config, expert_out, shifted
from tests.helpers import simt
from tests.helpers.compare import assert_same

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))

RANKS = 2
REPLAYS = 200
BUCKETS = (2, 5, MOST)


class Replay:
    """A graph of the executor, on the stream that it was captured on."""

    def __init__(self, recorded: Any, stream: int) -> None:
        self._recorded, self._stream = recorded, stream

    def replay(self) -> None:
        self._recorded.replay(self._stream)

    def reset(self) -> None:
        pass


class EmulatedRecorder:
    """Takes the place of `Recorder`."""

    def __init__(self, a2a: simt.SimtAllToAll) -> None:
        self._a2a = a2a

    def warming_up(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def capture(self, runs: Sequence[tuple[int, Callable[[], None]]]) -> dict[int, Replay]:
        graphs = {}
        for bucket, run in runs:
            self._a2a.begin_capture()
            run()
            graphs[bucket] = Replay(self._a2a.end_capture(), self._a2a.stream)
        return graphs


class Rounds:
    """Some rounds in a row, as a step: every tensor is given or kept, so that nothing else has to be replayed.

    Attributes:
        expert_out: of each round, to be filled before a call.
        combined: of each round, [M, H].
    """

    def __init__(self, a2a: simt.SimtAllToAll, num_rounds: int) -> None:
        rows = (a2a.config.num_local_experts(RANKS), RANKS * MOST, HIDDEN)
        self.expert_out = torch.zeros(num_rounds, *rows, dtype=torch.bfloat16)
        self.combined = torch.zeros(num_rounds, MOST, HIDDEN, dtype=torch.bfloat16)
        self._a2a = a2a
        self._kept: list[Any] = []  # a graph's memory would keep it on a device

    def __call__(self, x: Tensor, topk_weights: Tensor, *topk_ids: Tensor, num_valid_tokens: Tensor) -> Tensor:
        for number, ids in enumerate(topk_ids):
            recv = self._a2a.dispatch(x, ids, topk_weights, num_valid_tokens=num_valid_tokens)
            out = self.combined[number, : x.shape[0]]
            self._a2a.combine(self.expert_out[number], recv, out=out)
            self._kept += [recv, out]
        return x


class Group:
    """The ranks, and a graph of each for steps of one and of three rounds."""

    def __init__(self) -> None:
        simt.extension().reset(simt.seed_of_test())
        self.a2as = [simt.SimtAllToAll(group, config()) for group in moebius.virtual_ranks(RANKS)]
        self.steps = {count: [Rounds(a2a, count) for a2a in self.a2as] for count in (1, LAYERS)}
        self.graphs = {
            count: [self._graphed(*pair) for pair in enumerate(steps)] for count, steps in self.steps.items()
        }
        for graphs in self.graphs.values():
            for graph in graphs:
                graph.warm_up()
            self.settle()
            for graph in graphs:
                graph.capture()

    def _graphed(self, rank: int, step: Rounds) -> GraphedStep[Tensor]:
        example = self.inputs(batch_of(1, 0), step.expert_out.shape[0])
        padding = (0.0, 0.0, *[-1] * (len(example) - 2))
        graph = GraphedStep(step, self.a2as[rank], example, buckets=BUCKETS, padding=padding)
        graph._recorder = EmulatedRecorder(self.a2as[rank])  # type: ignore[assignment]
        return graph

    def inputs(self, batch: RankBatch, num_rounds: int) -> list[Tensor]:
        ids = [shifted(batch.topk_ids, number) for number in range(num_rounds)]
        return [batch.x, batch.topk_weights, *ids]

    def settle(self) -> None:
        for a2a in self.a2as:
            a2a.synchronize()

    def run(self, num_rounds: int, batches: Sequence[RankBatch], what: str, *, is_eager: bool) -> None:
        """One call on every rank; every round of it compared with the reference."""
        wanted = []
        for number in range(num_rounds):
            inputs = [
                reference.RankInput(
                    x=batch.x, topk_ids=shifted(batch.topk_ids, number), topk_weights=batch.topk_weights
                )
                for batch in batches
            ]
            dispatched = reference.dispatch(config(), inputs)
            outputs = [expert_out(rank, received.x) for rank, received in enumerate(dispatched)]
            wanted.append(reference.combine(config(), inputs, dispatched, outputs))
            for step, output in zip(self.steps[num_rounds], outputs, strict=True):
                step.expert_out[number] = output
        for step in self.steps[num_rounds]:
            step.combined.fill_(torch.nan)
        for graph, batch in zip(self.graphs[num_rounds], batches, strict=True):
            (graph.eager if is_eager else graph)(*self.inputs(batch, num_rounds))
        self.settle()
        for number, want in enumerate(wanted):
            for rank, step in enumerate(self.steps[num_rounds]):
                num_tokens = want[rank].shape[0]
                assert_same(step.combined[number, :num_tokens], want[rank], f"{what}, round {number}, rank {rank}")
                padding = step.combined[number, num_tokens : self.graphs[num_rounds][rank].buckets.of(num_tokens)]
                assert not padding.any(), f"{what}, round {number}, rank {rank}: the padding has a result"

    def close(self) -> None:
        for a2a in self.a2as:
            a2a.close()


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    FakeCuda(monkeypatch)
    made = Group()
    yield made
    made.close()


def test_graphs_of_odd_numbers_of_rounds_and_eager_calls_in_any_order(group: Group) -> None:
    order = random.Random(simt.seed_of_test())
    for number in range(REPLAYS):
        num_rounds, is_eager = order.choice((1, LAYERS, LAYERS)), order.random() < 0.3
        counts = [order.choice((0, 1, 2, 3, 5, 6, MOST)) for _ in range(RANKS)]
        batches = [batch_of(num_tokens, number, rank) for rank, num_tokens in enumerate(counts)]
        what = f"call {number} of {counts} tokens, {'eager' if is_eager else 'replayed'}"
        group.run(num_rounds, batches, what, is_eager=is_eager)


def test_ranks_may_replay_and_call_at_a_time(group: Group) -> None:
    """What one rank replays, the other answers by eager calls."""
    for number in range(6):
        batches = [batch_of(3 + number, number, rank) for rank in range(RANKS)]
        graphs = group.graphs[LAYERS]
        plain = graphs[number % RANKS]
        replayed = plain._graphs
        plain._graphs = {bucket: _Eager(plain, bucket) for bucket in BUCKETS}  # type: ignore[misc]
        group.run(LAYERS, batches, f"call {number}", is_eager=False)
        plain._graphs = replayed


class _Eager:
    """Runs the step where its graph would be replayed."""

    def __init__(self, graph: GraphedStep[Tensor], bucket: int) -> None:
        self._graph, self._bucket = graph, bucket

    def replay(self) -> None:
        self._graph._run(self._bucket)
