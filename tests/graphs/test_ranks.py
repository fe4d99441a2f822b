"""All ranks in one step, driven by one thread: on the CPU engine, and on the kernels of the CUDA engine, emulated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import moebius
from moebius import AllToAll
from moebius.graphs import GraphedStep
from tests.graphs.steps import (
    HIDDEN,
    LAYERS,
    PADDING,
    InterleavedStep,
    RanksStep,
    batch_of,
    config,
    reference_step,
    side_by_side,
)
from tests.helpers import simt
from tests.helpers.compare import assert_same

if TYPE_CHECKING:
    from collections.abc import Sequence

COUNTS = ((1, 9, 16), (0, 5, 2), (0, 0, 0), (3, 0, 0), (16, 16, 16))


def made(engine: str, num_ranks: int) -> Sequence[AllToAll]:
    """The ranks; of the emulated engine, with a schedule of the test's own."""
    if engine == "cpu":
        return [AllToAll(group, config()) for group in moebius.virtual_ranks(num_ranks)]
    reason = simt.why_not()
    if reason is not None:
        pytest.skip(reason)
    simt.extension().reset(simt.seed_of_test())
    return [simt.SimtAllToAll(group, config()) for group in moebius.virtual_ranks(num_ranks)]


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("engine", ["cpu", "simt"])
def test_one_thread_runs_the_halves_of_all_ranks(engine: str, num_ranks: int, num_parts: int) -> None:
    ranks = made(engine, num_ranks)
    steps = [InterleavedStep(a2a, num_parts=num_parts) for a2a in ranks]
    for step in steps:
        step.settle = step.a2a.synchronize
    example = side_by_side([batch_of(1, rank) for rank in range(num_ranks)])
    with GraphedStep(RanksStep(steps), ranks, example, buckets=(2, 16), padding=(*PADDING, 0)) as graph:
        graph.capture()
        for number, counts in enumerate(COUNTS):
            batches = [batch_of(num_tokens, number, rank) for rank, num_tokens in enumerate(counts[:num_ranks])]
            out = graph(*side_by_side(batches))
            for rank, want in enumerate(reference_step(batches)):
                got = out[: want.shape[0], rank * HIDDEN : (rank + 1) * HIDDEN]
                assert_same(got, want, f"batch {number}, rank {rank}")
    assert {a2a.epoch for a2a in ranks} == {num_parts * LAYERS * (2 * 2 + len(COUNTS))}
    for a2a in ranks:
        a2a.close()


def test_the_reference_knows_the_ranks_apart() -> None:
    first, second = reference_step([batch_of(4, 0, 0), batch_of(4, 0, 1)])
    assert not torch.equal(first, second)
