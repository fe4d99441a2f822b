"""vLLM's own kernel and experts with our classes on a GPU: eager, captured and replayed, against the unsharded layer.

python -m pytest tests/vllm_cuda    # needs a GPU, our extension for it, torch, triton, and vLLM or its Python files
"""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vllm.micro_batches import Contexts
from tests.vllm.test_kernel import M, R
from tests.vllm_cuda.ranks import Inputs, Rank, Ranks

pytestmark = pytest.mark.gpu
REPLAYS = 200
LAYERS = 3


def experts(form: str) -> tuple[Any, bool]:
    """The class, and whether it takes e4m3."""
    from tests.vllm_cuda import experts as found

    return (found.triton_experts(), False) if form == "triton-bf16" else (found.DequantisingExperts, True)


FORMS = pytest.mark.parametrize("form", ["triton-bf16", "torch-fp8"])


@FORMS
def test_the_kernel_computes_the_layer(form: str) -> None:
    with Ranks(experts(form)) as ranks:
        for number, num_tokens in enumerate((5, M, 0, 1, 7)):
            given = [Inputs.of(10 * number + rank, max(0, num_tokens - rank)) for rank in range(R)]
            on_device = [inputs.to(ranks.device) for inputs in given]
            torch.cuda.synchronize()
            got = ranks.layers(on_device)
            ranks.settle()
            ranks.compare(got, given, is_fp8="fp8" in form, what=f"{num_tokens} tokens")


class Captured:
    """A rank's step of several layers as a graph, as vLLM captures: padding in every row, and no pool of its own."""

    def __init__(self, rank: Rank, device: torch.device) -> None:
        self.inputs = Inputs.of(0, M, 0).to(device)
        self._rank = rank
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(rank.stream):
            # Not by torch.cuda.graph, which empties the allocator's stock.
            self._graph.capture_begin()
            self.outputs = [rank.layer(self.inputs) for _ in range(LAYERS)]
            self._graph.capture_end()

    def replay(self, inputs: Inputs) -> list[Tensor]:
        """On the current stream."""
        self.inputs.copy_(inputs)
        self._graph.replay()
        return [output.clone() for output in self.outputs]


def replayed(graphs: list[Captured], given: list[Inputs], number: int, _rank: Rank) -> list[Tensor]:
    return graphs[number].replay(given[number])


@FORMS
def test_replays_between_eager_calls(form: str) -> None:
    with Ranks(experts(form)) as ranks:
        order = random.Random(1)
        batches = [
            [Inputs.of(100 + 7 * seed + rank, M, count) for rank in range(R)] for seed, count in enumerate((M, 1, 0, 9))
        ]
        on_device = [[inputs.to(ranks.device) for inputs in batch] for batch in batches]
        graphs = [Captured(rank, ranks.device) for rank in ranks.each]
        ranks.stock()
        for number in range(REPLAYS):
            at = order.randrange(len(batches))
            is_eager = order.random() < 0.3
            if is_eager:
                got = [[y] for y in ranks.layers(on_device[at])]
            else:
                replay = functools.partial(replayed, graphs, on_device[at])
                got = ranks.on_streams(replay)
            if number % 10 < 2:  # the rest run ahead, unwaited for
                ranks.settle()
                for layer in range(len(got[0])):
                    what = f"call {number}, {'eager' if is_eager else 'replayed'}, layer {layer}"
                    ranks.compare([each[layer] for each in got], batches[at], is_fp8="fp8" in form, what=what)
        ranks.settle()


def overlapped(number: int, rank: Rank, contexts: Contexts, given: list[Inputs]) -> list[Tensor]:
    """Some layers over two micro-batches in turn, on the current stream."""
    outputs: list[Any] = [None, None]

    def micro_batch(at: int) -> None:
        for _ in range(LAYERS):
            outputs[at] = rank.layer(given[at])

    contexts.in_turn(number, micro_batch, torch.cuda.current_stream())
    return outputs


@FORMS
def test_dual_batch_overlap(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM's own threads: eager, then captured and replayed."""
    contexts = Contexts(monkeypatch)
    with Ranks(experts(form), num_micro_batches=2) as ranks:
        given = [[Inputs.of(31 * rank + at, M, (9, 5)[at]) for at in range(2)] for rank in range(R)]
        on_device = [[inputs.to(ranks.device) for inputs in pair] for pair in given]
        torch.cuda.synchronize()

        def compare(got: list[list[Tensor]], what: str) -> None:
            ranks.settle()
            for at in range(2):
                ys, batch = [pair[at] for pair in got], [pair[at] for pair in given]
                ranks.compare(ys, batch, is_fp8="fp8" in form, what=f"{what}, micro-batch {at}")

        compare(ranks.on_streams(lambda n, rank: overlapped(n, rank, contexts, on_device[n])), "eager")
        graphs, outputs = [], []
        for number, rank in enumerate(ranks.each):
            torch.cuda.synchronize()
            with torch.cuda.stream(rank.stream):
                graphs.append(torch.cuda.CUDAGraph())
                graphs[-1].capture_begin()
                outputs.append(overlapped(number, rank, contexts, on_device[number]))
                graphs[-1].capture_end()
        for call in range(20):
            for pair in outputs:
                for output in pair:
                    output.fill_(torch.nan)
            torch.cuda.synchronize()
            ranks.on_streams(lambda n, _: graphs[n].replay())
            compare(outputs, f"replay {call}")
