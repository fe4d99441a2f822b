"""A graphed step on the CPU engine: called instead of replayed, padded in the same way, with the same errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import moebius
from moebius import AllToAll, ConfigError, ShapeError, StateError
from moebius.graphs import GraphedStep
from tests.graphs.steps import LAYERS, MOST, PADDING, InterleavedStep, RankBatch, Step, batch_of, config, reference_step
from tests.helpers.compare import assert_same
from tests.helpers.launch import in_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

RANKS = 3
# The tokens of each rank: equal, in different buckets, none on one, none at all, full, one alone.
COUNTS = ((4, 4, 4), (1, 9, 16), (0, 5, 2), (0, 0, 0), (16, 16, 16), (3, 0, 0))


def graphed(step: Step, **options: Any) -> GraphedStep[Tensor]:
    options = {"buckets": (2, 4, 16), "padding": PADDING, **options}
    return GraphedStep(step, step.a2a, batch_of(1, 0).tensors, **options)


def batches_of(counts: tuple[int, ...], seed: int) -> list[RankBatch]:
    return [batch_of(num_tokens, seed, rank) for rank, num_tokens in enumerate(counts)]


@pytest.fixture
def alone() -> Iterator[AllToAll]:
    """A group of one: nobody to wait for."""
    with AllToAll(moebius.virtual_ranks(1)[0], config()) as a2a:
        yield a2a


@pytest.mark.parametrize("kind", [Step, InterleavedStep])
def test_every_batch_is_right_whatever_the_buckets_of_the_ranks(kind: type[Step]) -> None:
    batches = [batches_of(counts, seed) for seed, counts in enumerate(COUNTS)]
    groups = moebius.virtual_ranks(RANKS)

    def rank_steps(rank: int) -> list[Tensor]:
        with AllToAll(groups[rank], config()) as a2a, graphed(kind(a2a)) as step:
            step.capture()
            return [step(*batch[rank].tensors).clone() for batch in batches]

    got = in_threads(RANKS, rank_steps)
    for number, batch in enumerate(batches):
        for rank, want in enumerate(reference_step(batch)):
            assert_same(got[rank][number], want, f"batch {number}, rank {rank}")


def test_captured_eager_and_plain_calls_mix(alone: AllToAll) -> None:
    """A plain round in between leaves an odd number of rounds behind: the slots change places."""
    step = Step(alone)
    with graphed(step) as graph:
        graph.capture()
        for seed in range(12):
            batch = batch_of(seed % (MOST + 1), seed)
            call = (graph, graph.eager, step)[seed % 3]
            assert_same(call(*batch.tensors), reference_step([batch])[0], f"batch {seed}")
            if seed % 2:
                recv = alone.dispatch(*batch.tensors)
                alone.combine(recv.x.clone(), recv)


def test_padding_is_never_sent(alone: AllToAll) -> None:
    """The padding is routed to expert 0 here, which must see none of it."""
    seen = torch.zeros(alone.config.num_experts, dtype=torch.int32)

    def step(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, num_valid_tokens: Tensor) -> Tensor:
        recv = alone.dispatch(x, topk_ids, topk_weights, num_valid_tokens=num_valid_tokens, expert_stats=seen)
        return alone.combine(recv.x.clone(), recv)

    with GraphedStep(step, alone, batch_of(1, 0).tensors, buckets=(4, 16)) as graph:
        graph.capture()
        assert seen.sum() == 0, "the warm-up sent padding"
        for num_tokens in (3, 5, 0, 16, 1):
            seen.zero_()
            batch = batch_of(num_tokens, num_tokens)
            batch.topk_ids[:] = torch.tensor([1, 2, 3])
            graph(*batch.tensors)
            assert seen.tolist() == [0, *[num_tokens] * 3, *[0] * 8]


def test_a_batch_is_padded_to_its_bucket(alone: AllToAll) -> None:
    step = Step(alone)
    with graphed(step, num_warm_ups=1) as graph:
        assert not graph.captured
        graph.capture()
        graph.capture()
        assert graph.captured
        assert step.num_tokens == [16, 4, 2]
        step.num_tokens.clear()
        for num_tokens in (0, 1, 2, 3, 5, 16):
            graph(*batch_of(num_tokens, 0).tensors)
        assert step.num_tokens == [2, 2, 2, 4, 16, 16]
        assert list(graph.buckets) == [2, 4, 16]
        assert [list(tensor.shape) for tensor in graph.inputs] == [[16, 64], [16, 3], [16, 3]]


def test_the_default_buckets_end_at_the_most_tokens(alone: AllToAll) -> None:
    assert GraphedStep(Step(alone), alone, batch_of(1, 0).tensors).buckets.sizes == (1, 2, 4, 8, 16)


def test_results_stay_at_one_address(alone: AllToAll) -> None:
    with graphed(Step(alone)) as graph:
        graph.capture()
        addresses = {graph(*batch_of(num_tokens, 1).tensors).data_ptr() for num_tokens in (1, 4, 16)}
        assert len(addresses) == 1


def test_a_batch_written_in_place_is_not_copied(alone: AllToAll) -> None:
    with graphed(Step(alone)) as graph:
        graph.capture()
        batch = batch_of(5, 3)
        for static, given in zip(graph.inputs, batch.tensors, strict=True):
            static[:5] = given
        x, ids, weights = graph.inputs
        assert_same(graph(x[:5], ids[:5], weights[:5]), reference_step([batch])[0], "in place")


def test_a_step_with_several_results_returns_them_all(alone: AllToAll) -> None:
    plain = Step(alone)

    def step(*inputs: Tensor, num_valid_tokens: Tensor) -> tuple[Tensor, Tensor]:
        y = plain(*inputs, num_valid_tokens=num_valid_tokens)
        return y, y.float().argmax(-1)

    with GraphedStep(step, [alone], batch_of(1, 0).tensors, padding=PADDING) as graph:
        graph.capture()
        batch = batch_of(5, 9)
        y, best = graph(*batch.tensors)
        (want,) = reference_step([batch])
        assert_same(y, want, "y")
        assert_same(best, want.float().argmax(-1), "best")


def test_weights_with_gradients_leave_no_history(alone: AllToAll) -> None:
    scale = torch.nn.Parameter(torch.ones(64))
    with GraphedStep(lambda x, num_valid_tokens: x * scale, alone, [torch.zeros(1, 64)]) as graph:
        graph.capture()
        assert not graph(torch.ones(3, 64)).requires_grad


def test_inference_mode_may_change_between_calls(alone: AllToAll) -> None:
    batches = [batch_of(num_tokens, num_tokens) for num_tokens in (9, 2, 0, 16)]
    for made_in in (False, True):
        with torch.inference_mode(mode=made_in):
            graph = graphed(Step(alone))
            graph.capture()
        for number, batch in enumerate(batches):
            with torch.inference_mode(mode=number % 2 == 1):
                assert_same(graph(*batch.tensors), reference_step([batch])[0], f"batch {number}")
        graph.close()


def test_calls_out_of_order_are_refused(alone: AllToAll) -> None:
    batch = batch_of(3, 0).tensors
    graph = graphed(Step(alone))
    with pytest.raises(StateError, match="not captured: call capture"):
        graph(*batch)
    with pytest.raises(StateError, match="not warmed up: call warm_up"):
        graph.eager(*batch)
    graph.warm_up()
    graph.eager(*batch)
    graph.capture()
    with pytest.raises(StateError, match="captured already"):
        graph.warm_up()
    graph.close()
    graph.close()
    for call in (graph, graph.eager):
        with pytest.raises(StateError, match="this GraphedStep is closed"):
            call(*batch)
    for again in (graph.warm_up, graph.capture):
        with pytest.raises(StateError, match="this GraphedStep is closed"):
            again()


def test_a_step_of_a_closed_object_is_refused() -> None:
    a2a = AllToAll(moebius.virtual_ranks(1)[0], config())
    graph = graphed(Step(a2a))
    graph.capture()
    kept = graph(*batch_of(3, 0).tensors)
    before = kept.clone()
    a2a.close()
    with pytest.raises(StateError, match="an AllToAll that this step was captured with is closed"):
        graph(*batch_of(3, 1).tensors)
    assert_same(kept, before, "the last result")


def test_an_impossible_batch_changes_nothing(alone: AllToAll) -> None:
    with graphed(Step(alone)) as graph:
        graph.capture()
        kept = graph(*batch_of(3, 0).tensors)
        before, epoch = kept.clone(), alone.epoch
        x, ids, weights = batch_of(3, 1).tensors
        for given in (batch_of(17, 1).tensors, (x, ids), (x.float(), ids, weights), (x, ids[:2], weights)):
            with pytest.raises(ShapeError):
                graph(*given)
        assert alone.epoch == epoch
        assert_same(kept, before, "the last result")


def test_buckets_with_different_rounds_are_refused(alone: AllToAll) -> None:
    def step(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, num_valid_tokens: Tensor) -> Tensor:
        return Step(alone, 2 if x.shape[0] > 2 else 1)(x, topk_ids, topk_weights, num_valid_tokens=num_valid_tokens)

    graph = GraphedStep(step, alone, batch_of(1, 0).tensors, buckets=(2, 4), padding=PADDING)
    with pytest.raises(StateError, match=r"same rounds in every bucket.*got 1 for 2 tokens, 2 for 4 tokens"):
        graph.capture()
    assert not graph.captured


def test_a_step_whose_results_differ_by_bucket_is_refused(alone: AllToAll) -> None:
    graph = GraphedStep(lambda x, num_valid_tokens: x[:2], alone, [torch.zeros(1, 4)], buckets=(2, 4))
    with pytest.raises(ShapeError, match=r"output 0 of a step of 4 tokens must be \[4, ...\]"):
        graph.capture()
    graph = GraphedStep(lambda x, num_valid_tokens: x @ x.T, alone, [torch.zeros(1, 4)], buckets=(2, 4))
    with pytest.raises(ShapeError, match=r"output 0 of a step of 2 tokens must be \[2, 4\]"):
        graph.capture()


def test_impossible_arguments_are_refused(alone: AllToAll) -> None:
    example = batch_of(1, 0).tensors
    for options, message in (
        ({"num_warm_ups": 0}, "`num_warm_ups` must be an int of at least 1"),
        ({"buckets": ()}, "`buckets` must name at least one"),
        ({"padding": (0,)}, "`padding` must have a value for each of 3 inputs"),
    ):
        with pytest.raises(ConfigError, match=message):
            GraphedStep(Step(alone), alone, example, **options)
    with pytest.raises(ConfigError, match="`a2a` must name every AllToAll"):
        GraphedStep(Step(alone), [], example)
    with pytest.raises(ShapeError, match=r"`example\[0\]` must be \[T, ...\] on cpu"):
        GraphedStep(Step(alone), alone, [torch.zeros(1, 64, device="meta")])


def test_a_lost_round_is_an_error_of_the_call_and_the_next_goes_on() -> None:
    """The other rank is given up by its deadline; its tokens go nowhere from then on."""
    groups = moebius.virtual_ranks(2)
    a2a, other = (AllToAll(group, config(timeout_s=0.5)) for group in groups)
    graphs = [graphed(Step(each)) for each in (a2a, other)]
    in_threads(2, lambda rank: graphs[rank].capture())
    batch = batch_of(3, 0)
    with pytest.raises(moebius.PeerTimeoutError, match="rank 1"):
        graphs[0](*batch.tensors)
    graphs[0](*batch.tensors)
    assert a2a.dead_ranks == (1,)
    assert graphs[0].device == torch.device("cpu")
    other.close()
    a2a.close()


def test_several_objects_are_checked_and_counted() -> None:
    with (
        AllToAll(moebius.virtual_ranks(1)[0], config()) as first,
        AllToAll(moebius.virtual_ranks(1)[0], config(max_num_tokens=6)) as second,
    ):
        steps = [Step(first, 1), Step(second, 2)]

        def step(x: Tensor, *rest: Tensor, num_valid_tokens: Tensor) -> Tensor:
            for each in steps:
                x = each(x, *rest, num_valid_tokens=num_valid_tokens)
            return x

        with GraphedStep(step, (first, second), batch_of(1, 0).tensors, padding=PADDING) as graph:
            assert graph.buckets.sizes == (1, 2, 4, 6)
            graph.capture()
            batch = batch_of(5, 2)
            (middle,) = reference_step([batch], 1)
            (want,) = reference_step([RankBatch(middle, batch.topk_ids, batch.topk_weights)], 2)
            assert_same(graph(*batch.tensors), want, "through both")
            second.close()
            with pytest.raises(StateError, match="closed"):
                graph(*batch.tensors)


def test_layers_are_odd() -> None:
    """What makes replays in a row meet both slots."""
    assert LAYERS % config().depth == 1
