"""Every argument of dispatch and combine, wrong in every way: a typed error that names it, and no trace."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch

from moebius import MoebiusError, RoutingError, ShapeError, StateError
from tests.helpers.bad import bad_values, legal_combine, legal_dispatch
from tests.helpers.cases import Case
from tests.helpers.in_turn import InTurn
from tests.helpers.rounds import Expected, Halves, expect

if TYPE_CHECKING:
    from collections.abc import Iterator

CASES = [
    Case(num_ranks=1, num_experts=4, hidden=16, mode="expert"),
    Case(num_ranks=1, num_experts=4, hidden=16, payload="fp32", mode="expert-late"),
    Case(num_ranks=1, num_experts=4, hidden=16, mode="token"),
    Case(num_ranks=1, num_experts=4, payload="fp8"),
    Case(num_ranks=1, num_experts=4, payload="fp8-as-is"),
    Case(num_ranks=1, num_experts=4, payload="opaque"),
]
DISPATCH = (
    "x",
    "topk_ids",
    "topk_weights",
    "scales",
    "num_valid_tokens",
    "expert_stats",
    "wait_stats",
    "out",
    "out_scales",
)
COMBINE = ("expert_out", "recv", "topk_weights", "out", "wait_stats")


@functools.cache
def expected_rounds(case: Case) -> list[Expected]:
    return [expect(case, 0)]


@pytest.fixture(params=CASES, ids=lambda case: case.id)
def alone(request: pytest.FixtureRequest) -> Iterator[InTurn]:
    """One rank, so that a call that passes by mistake does not wait for anybody."""
    with InTurn(request.param, expected_rounds(request.param)) as ranks:
        yield ranks


def refused(error: MoebiusError, name: str, what: str) -> None:
    """The error is the right one and names the argument."""
    if "with the id" in what:
        assert isinstance(error, RoutingError), what
    elif name == "recv":
        assert isinstance(error, StateError), what
    else:
        assert isinstance(error, ShapeError), what
    # An x that would do by itself is told by what has to agree with it.
    agreeing = {"x": {"topk_ids"} if "row" in what else {"scales"} if "torch." in what else set()}
    named = {name} | agreeing.get(name, set())
    assert any(f"`{one}" in str(error) for one in named), f"{name} {what}: {error}"
    assert "must be" in str(error)
    assert "(got " in str(error)


@pytest.mark.parametrize("name", DISPATCH)
def test_dispatch_refuses(alone: InTurn, name: str) -> None:
    a2a, expected = alone.ranks[0], alone.expected[0]
    call = legal_dispatch(a2a, expected.inputs[0])
    for what, make in bad_values(alone.case, call, name):
        before = a2a.epoch
        statistics = call.arguments["expert_stats"].clone()
        with pytest.raises(MoebiusError) as caught:
            a2a.dispatch_send(**{**call.arguments, name: make()})
        refused(caught.value, name, what)
        assert a2a.epoch == before
        assert torch.equal(call.arguments["expert_stats"], statistics)
    alone.one_round()


@pytest.mark.parametrize("name", COMBINE)
def test_combine_refuses(alone: InTurn, name: str) -> None:
    a2a, expected = alone.ranks[0], alone.expected[0]
    halves = Halves(a2a, [expected.of(0)])
    halves.dispatch_send(0)
    halves.dispatch_receive(0)
    call = legal_combine(a2a, expected.inputs[0], halves.live[0], expected.expert_out[0])
    for what, make in bad_values(alone.case, call, name):
        before = a2a.epoch
        with pytest.raises(MoebiusError) as caught:
            a2a.combine_send(**{**call.arguments, name: make()})
        refused(caught.value, name, what)
        assert a2a.epoch == before
        assert not call.arguments["out"].any()
    halves.combine_send(0)
    halves.combine_receive(0)
    alone.check([halves])


def test_more_tokens_than_the_most(alone: InTurn) -> None:
    a2a, inputs = alone.ranks[0], alone.expected[0].inputs[0]
    call = legal_dispatch(a2a, inputs)
    repeats = alone.case.max_num_tokens // inputs.num_tokens + 1
    for name in ("x", "topk_ids", "topk_weights", "scales"):
        if call.arguments[name] is not None:
            call.arguments[name] = torch.cat([call.arguments[name].view(torch.uint8)] * repeats).view(
                call.arguments[name].dtype
            )
    with pytest.raises(ShapeError, match=f"`x`.*T <= {alone.case.max_num_tokens}"):
        a2a.dispatch_send(**call.arguments)
    alone.one_round()


def test_a_bad_id_says_where_it_is(alone: InTurn) -> None:
    a2a, inputs = alone.ranks[0], alone.expected[0].inputs[0]
    for value in (alone.case.num_experts, -2):
        call = legal_dispatch(a2a, inputs)
        ids = inputs.topk_ids.clone()
        ids[4, 2] = value
        with pytest.raises(
            RoutingError, match=rf"`topk_ids\[4, 2\]` must be -1 or an expert in \[0, 4\) \(got {value}\)"
        ):
            a2a.dispatch_send(**{**call.arguments, "topk_ids": ids})
    alone.one_round()


@pytest.mark.parametrize("name", ["x", "topk_ids", "topk_weights"])
def test_negated_views_are_read_as_they_are(name: str) -> None:
    """A lazily negated view has its sign in a flag: copied, or refused, but not read as it lies in memory."""
    case = Case(num_ranks=1, num_experts=4, hidden=16, payload="fp32")
    with InTurn(case) as alone:
        a2a, expected = alone.ranks[0], alone.expected[0]
        call = legal_dispatch(a2a, expected.inputs[0])
        lazy = torch._neg_view(-call.arguments[name])
        assert lazy.is_neg()
        try:
            recv = a2a.dispatch(**{**call.arguments, name: lazy})
        except ShapeError:
            return
        combined = a2a.combine(expected.expert_out[0], recv)
        assert torch.equal(combined, expected.combined[0])
        assert torch.equal(
            recv.x[0, : recv.expert_num_tokens[0]], expected.dispatched[0].x[0, : recv.expert_num_tokens[0]]
        )


def test_results_that_overlap_themselves() -> None:
    """One memory for several rows of the result cannot hold them."""
    with InTurn(Case(num_ranks=1, num_experts=4, hidden=16)) as alone:
        a2a, expected = alone.ranks[0], alone.expected[0]
        recv = a2a.dispatch(*[getattr(expected.inputs[0], name) for name in ("x", "topk_ids", "topk_weights")])
        overlapping = torch.zeros(1, 16, dtype=torch.bfloat16).expand(expected.inputs[0].num_tokens, 16)
        with pytest.raises(ShapeError, match="`out`"):
            a2a.combine(expected.expert_out[0], recv, out=overlapping)


def test_arity_is_pythons_own(alone: InTurn) -> None:
    a2a = alone.ranks[0]
    before = a2a.epoch
    with pytest.raises(TypeError):
        a2a.dispatch_send()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        a2a.dispatch_send(1, 2, 3, 4)  # type: ignore[call-arg,arg-type]
    with pytest.raises(TypeError):
        a2a.combine(colour="red")  # type: ignore[call-arg]
    assert a2a.epoch == before
