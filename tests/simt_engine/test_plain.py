"""Plain calls, which the extension makes by itself: that it does, and that every other call is Python's as before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from moebius import AllToAll, PendingDispatch, RoutingError, ShapeError, StateError
from tests.helpers.bad import bad_values, legal_combine, legal_dispatch, without_memory
from tests.helpers.cases import MODES
from tests.helpers.simt import extension
from tests.simt_engine.plain_calls import HALVES, Alike, Counted, plain_inputs, small, taken_by
from tests.simt_engine.seats import Seats

if TYPE_CHECKING:
    from collections.abc import Callable

modes = pytest.mark.parametrize("mode", MODES)


@modes
@pytest.mark.parametrize("payload", ["bf16", "fp32-to-bf16", "fp16", "fp32", "fp8", "fp8-from-fp32", "fp8-ue8m0"])
def test_plain_rounds_are_the_extensions(mode: str, payload: str) -> None:
    seats = Seats(small(mode, payload))
    for _ in range(seats.case.depth):
        # Where results are shown is made by the first round of each slot, in Python.
        assert taken_by(seats) == ["dispatch_send", "combine_send", "combine_recv"]
    for number in range(2 * seats.case.depth):
        assert taken_by(seats, number) == list(HALVES)
    seats.close()


def test_what_needs_scales_is_not_plain() -> None:
    for payload in ("fp8-as-is", "opaque", "opaque-bare"):
        seats = Seats(small(payload=payload))
        seats.round(0)
        seats.round(1)
        assert taken_by(seats, 2) == list(HALVES[1:])
        seats.close()


def test_blocking_calls_are_plain_too() -> None:
    seats = Seats(small())
    seats.round(0)
    seats.round(1)
    (a2a,), counted = seats.ranks, Counted(seats.ranks[0])
    x, ids, weights = plain_inputs(seats, 2)
    received = AllToAll.dispatch(a2a, x, ids, weights)  # not that of the tests, which keeps the tensors
    home = AllToAll.combine(a2a, seats.expected[2].expert_out[0], received)
    assert counted.taken() == ["dispatch", "combine"]
    a2a.synchronize()
    seats.check(2, [received], [home])


@modes
@pytest.mark.parametrize("payload", ["bf16", "fp8", "opaque-bare"])
def test_bad_arguments_are_refused_in_the_same_words(mode: str, payload: str) -> None:
    alike = Alike(small(mode, payload))
    legal = legal_dispatch(alike.seats[0].ranks[0], alike.seats[0].expected[2].inputs[0])
    names = ("x", "topk_ids", "topk_weights")
    given = {name: legal.arguments[name] for name in names}
    refused = 0
    for name in names:
        for what, make in bad_values(alike.seats[0].case, legal, name) + without_memory(legal, name):
            if "with the id" in what:
                continue  # found by the kernel
            bad = make()

            def send(seats: Seats, name: str = name, bad: Any = bad) -> Any:
                return seats.ranks[0].dispatch_send(**{**given, name: bad})

            answer = alike.call(send)
            assert isinstance(answer, tuple), f"{name} {what}"
            refused += 1
    assert alike.counted.taken() == []
    received = [seats.send(0, 2).receive() for seats in alike.seats]
    of_round = alike.seats[0].expected[2]
    call = legal_combine(alike.seats[0].ranks[0], of_round.inputs[0], received[0], of_round.expert_out[0])
    alike.counted.taken()
    for name in ("expert_out", "recv", "topk_weights", "out"):
        for what, make in bad_values(alike.seats[0].case, call, name) + without_memory(call, name):
            bad = make()

            def reply(seats: Seats, name: str = name, bad: Any = bad) -> Any:
                arguments = {**call.arguments, "wait_stats": None, "recv": received[alike.seats.index(seats)]}
                if name != "out":
                    arguments["out"] = None
                return seats.ranks[0].combine_send(**{**arguments, name: bad})

            if name == "out" and bad is None:
                continue
            assert isinstance(alike.call(reply), tuple), f"{name} {what}"
            refused += 1
    assert alike.counted.taken() == []
    assert refused > 100
    for seats, recv in zip(alike.seats, received, strict=True):
        home = seats.reply(0, 2, recv).receive()
        seats.wait()
        seats.check(2, [recv], [home])


def transformed(call: Callable[[torch.Tensor], Any], tensor: torch.Tensor) -> Any:
    """What a call makes of a tensor that a transform of torch.func wraps; it has the type of any other."""
    answers = []

    def inside(wrapped: torch.Tensor) -> torch.Tensor:
        assert type(wrapped) is torch.Tensor
        answers.append(call(wrapped))
        return wrapped

    torch.func.functionalize(inside)(tensor)
    return answers[0]


@pytest.mark.parametrize("name", ["x", "topk_ids", "topk_weights", "expert_out", "out"])
def test_what_does_not_lie_in_memory_as_it_reads(name: str) -> None:
    """A lazy negation has its sign in a flag, a transform's tensor no memory: refused in the same words."""
    alike = Alike(small(payload="fp32"))
    x, ids, weights = plain_inputs(alike.seats[0], 2)
    expert_out = alike.seats[0].expected[2].expert_out[0]
    good = {"x": x, "topk_ids": ids, "topk_weights": weights}
    received = {}
    if name not in good:
        good = {"expert_out": expert_out, "out": torch.zeros_like(x)}
        received = {id(seats): seats.send(0, 2).receive() for seats in alike.seats}
        alike.counted.taken()

    def call(bad: torch.Tensor) -> Any:
        def half(seats: Seats) -> Any:
            arguments = {**good, name: bad}
            if not received:
                return seats.ranks[0].dispatch_send(**arguments)
            return seats.ranks[0].combine_send(recv=received[id(seats)], **arguments)

        return alike.call(half)

    answers = [call(torch._neg_view(-good[name])), transformed(call, good[name])]
    assert [answer[0] for answer in answers] == [ShapeError] * 2, answers
    assert alike.counted.taken() == []


class Subclass(torch.Tensor):
    """One without behaviour of its own."""


def apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same, its rows not adjacent."""
    wide = torch.zeros(tensor.shape[0], tensor.shape[1] + 16, dtype=tensor.dtype)
    wide[:, : tensor.shape[1]] = tensor
    return wide[:, : tensor.shape[1]]


def at_odd_address(tensor: torch.Tensor) -> torch.Tensor:
    """The same, where a device cannot copy its rows from."""
    shifted = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
    return shifted.copy_(tensor)


def test_what_is_legal_and_not_plain() -> None:
    """Python makes these calls, and the round is right."""
    seats = Seats(small())
    seats.round(0)
    seats.round(1)
    (a2a,), counted = seats.ranks, Counted(seats.ranks[0])
    x, ids, weights = plain_inputs(seats, 2)
    stats = torch.zeros(4, dtype=torch.int64)
    out = torch.zeros(4, 4, 16, dtype=torch.bfloat16)
    sends: list[Callable[[], PendingDispatch]] = [
        lambda: a2a.dispatch_send(x, apart(ids), weights),
        lambda: a2a.dispatch_send(x, ids, apart(weights)),
        lambda: a2a.dispatch_send(x.as_subclass(Subclass), ids, weights),
        lambda: a2a.dispatch_send(x, ids.as_subclass(Subclass), weights),
        lambda: a2a.dispatch_send(x, ids, weights, num_valid_tokens=torch.tensor(len(x))),
        lambda: a2a.dispatch_send(x, ids, weights, expert_stats=stats),
        lambda: a2a.dispatch_send(x, ids, weights, wait_stats=torch.zeros(1, dtype=torch.int64)),
        lambda: a2a.dispatch_send(x, ids, weights, out=out),
    ]
    for number, send in enumerate(sends):
        pending = send()
        assert counted.taken() == [], number
        received = pending.receive()
        assert counted.taken() == (["dispatch_recv"] if number < 5 else []), number
        home = seats.reply(0, 2, received).receive()
        assert counted.taken() == ["combine_send", "combine_recv"], number
        seats.wait()
        seats.check(2, [received], [home], str(number))


def test_what_is_plain_however_it_lies() -> None:
    seats = Seats(small())
    seats.round(0)
    seats.round(1)
    (a2a,), counted = seats.ranks, Counted(seats.ranks[0])
    x, ids, weights = plain_inputs(seats, 2)
    expert_out = seats.expected[2].expert_out[0]
    for alike in (apart(x), torch.nn.Parameter(x), x.clone().requires_grad_()):
        received = a2a.dispatch_send(alike, ids.to(torch.int32), weights).receive()
        home = torch.zeros(len(x), 32, dtype=torch.bfloat16)[:, :16]
        assert a2a.combine_send(expert_out, received, out=home).receive() is home
        assert counted.taken() == list(HALVES)
        seats.wait()
        seats.check(2, [received], [home])


def test_no_tokens() -> None:
    seats = Seats(small())
    seats.round(0)
    seats.round(1)
    (a2a,), counted = seats.ranks, Counted(seats.ranks[0])
    received = a2a.dispatch_send(
        torch.zeros(0, 16, dtype=torch.bfloat16), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    ).receive()
    home = a2a.combine_send(seats.expected[2].expert_out[0], received).receive()
    assert counted.taken() == list(HALVES)
    seats.wait()
    assert home.shape == (0, 16)
    assert not received.expert_num_tokens.any()


def test_misaligned_rows_are_refused_in_the_same_words() -> None:
    alike = Alike(small())
    x, ids, weights = plain_inputs(alike.seats[0], 2)
    answer = alike.call(lambda seats: seats.ranks[0].dispatch_send(at_odd_address(x), ids, weights))
    assert "multiples of 16 bytes" in answer[1]
    received = {id(seats): seats.send(0, 2).receive() for seats in alike.seats}
    rows = at_odd_address(alike.seats[0].expected[2].expert_out[0])
    answer = alike.call(lambda seats: seats.ranks[0].combine_send(rows, received[id(seats)]))
    assert "multiples of 16 bytes" in answer[1]
    expert_out, home = alike.seats[0].expected[2].expert_out[0], at_odd_address(torch.zeros_like(x))
    answer = alike.call(lambda seats: seats.ranks[0].combine_send(expert_out, received[id(seats)], out=home))
    assert "multiples of 16 bytes" in answer[1]


def test_more_tokens_than_there_is_room_for_are_refused_in_the_same_words() -> None:
    alike = Alike(small())
    most = alike.seats[0].case.max_num_tokens
    x, ids, weights = (torch.cat([one, one])[: most + 1] for one in plain_inputs(alike.seats[0], 2))
    assert len(x) == len(ids) == len(weights) == most + 1
    assert alike.call(lambda seats: seats.ranks[0].dispatch_send(x, ids, weights))[0] is ShapeError


@modes
def test_calls_out_of_order_are_refused_in_the_same_words(mode: str) -> None:
    alike = Alike(small(mode))
    pending = {id(seats): [seats.send(0, 2), seats.send(0, 3)] for seats in alike.seats}
    answer = alike.call(lambda seats: seats.send(0, 4))
    assert "still expects receive() of its dispatch" in answer[1]
    received = {id(seats): [one.receive() for one in pending[id(seats)]] for seats in alike.seats}
    replies = {id(seats): seats.reply(0, 2, received[id(seats)][0]) for seats in alike.seats}
    answer = alike.call(lambda seats: seats.reply(0, 2, received[id(seats)][0]))
    assert "has already been through it" in answer[1]
    answer = alike.call(lambda seats: seats.send(0, 4))
    assert "still expects receive() of its combine" in answer[1]
    for seats in alike.seats:
        home = replies[id(seats)].receive()
        assert replies[id(seats)].receive() is home
        assert pending[id(seats)][0].receive() is received[id(seats)][0]
        seats.reply(0, 3, received[id(seats)][1]).receive()
        seats.round(4)
    answer = alike.call(lambda seats: seats.reply(0, 2, received[id(seats)][0]))
    assert "stale" in answer[1]
    other = Seats(small(mode))
    foreign = other.send(0, 0).receive()
    for seats in alike.seats:
        seats.send(0, 0).receive()
    answer = alike.call(lambda seats: seats.reply(0, 0, foreign))
    assert answer[0] is StateError


def test_a_closed_object_refuses_in_the_same_words() -> None:
    alike = Alike(small())
    pending = {id(seats): seats.send(0, 2) for seats in alike.seats}
    for seats in alike.seats:
        seats.ranks[0].close()
        assert seats.ranks[0].plain is None
    assert alike.call(lambda seats: seats.send(0, 3)) == (StateError, "this AllToAll is closed")
    assert alike.call(lambda seats: pending[id(seats)].receive()) == (StateError, "this AllToAll is closed")


def test_a_fault_is_raised_by_the_next_plain_call_once() -> None:
    seats = Seats(small())
    seats.round(0)
    seats.round(1)
    (a2a,), counted = seats.ranks, Counted(seats.ranks[0])
    x, ids, weights = plain_inputs(seats, 2)
    wrong = ids.clone()
    wrong[0, 0] = 99
    received = a2a.dispatch_send(x, wrong, weights).receive()
    assert counted.taken() == list(HALVES[:2])
    extension().run_until_idle()
    with pytest.raises(RoutingError, match="99"):
        seats.reply(0, 2, received)
    assert counted.taken() == []
    seats.reply(0, 2, received).receive()
    assert counted.taken() == list(HALVES[2:])
    seats.wait()
    seats.round(3)


def test_captured_halves_are_pythons() -> None:
    seats = Seats(small())
    seats.round(0)
    seats.round(1)
    (a2a,), counted = seats.ranks, Counted(seats.ranks[0])
    eager = seats.send(0, 2)
    counted.taken()
    a2a.begin_capture()
    with pytest.raises(StateError, match="began eagerly"):
        eager.receive()
    received, combined = seats.call(3)
    graph = a2a.end_capture()
    assert counted.taken() == []
    seats.reply(0, 2, eager.receive()).receive()
    graph.replay(a2a.stream)
    seats.wait()
    seats.check(3, received, combined)
    counted.taken()
    a2a.begin_capture()
    sent, arrived = seats.send(0, 4), seats.send(0, 5).receive()
    a2a.end_capture()
    for half in (sent.receive, lambda: seats.reply(0, 5, arrived)):
        with pytest.raises(StateError, match="began in a capture"):
            half()
    assert counted.taken() == []


def test_a_torch_that_cannot_be_asked_for_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.10: Python makes all calls."""
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    seats = Seats(small())
    assert seats.ranks[0].plain is None
    for number in range(4):
        seats.round(number)
