"""What the extension's plain calls leave behind: the objects that Python would have made, and no reference to them."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch

import moebius
from moebius import Dispatched, MoebiusError, PendingCombine, PendingDispatch, StateError
from moebius.rounds import Round
from tests.helpers.launch import in_threads
from tests.helpers.simt import SimtAllToAll
from tests.simt_engine.plain_calls import HALVES, Alike, Counted, plain_inputs, small
from tests.simt_engine.seats import Seats


def test_objects_are_as_python_makes_them() -> None:
    """Every field, by the same name, type and value."""
    alike = Alike(small("expert-late"))
    found: list[list[Any]] = []
    for seats in alike.seats:
        sent = seats.send(0, 2)
        made: list[Any] = [type(sent), sent._rest, sent._result, sent._owner is seats.ranks[0]]
        made += [(name, getattr(sent._round, name)) for name in Round.__slots__ if name != "handle"]
        received = sent.receive()
        made += [type(received), received.num_tokens, received.epoch, sent._owner, sent._rest, sent._result is received]
        assert received._buffers is seats.ranks[0]._engine._slots[0]  # type: ignore[union-attr]
        replied = seats.reply(0, 2, received)
        made += [type(replied), replied._rest[0], replied._rest[1], replied._rest[3:], sent._round.stage]
        assert torch.equal(replied._rest[2], seats.expected[2].inputs[0].topk_weights)
        home = replied.receive()
        made += [replied._owner, replied._rest, sent._round.stage, home.dtype, home.shape, home.stride(), type(home)]
        made += [home.requires_grad, home.is_leaf, home.untyped_storage().nbytes(), home.device, home._version]
        made += [seats.ranks[0]._engine._eager.next, seats.ranks[0]._engine._eager.table.slots[0] is sent._round]  # type: ignore[union-attr]
        found.append(made)
    assert alike.counted.taken() == list(HALVES)
    assert found[0] == found[1]


def counts(*objects: object) -> list[int]:
    return [sys.getrefcount(one) for one in objects]


def test_nothing_is_leaked() -> None:
    seats = Seats(small("expert-late"))
    (a2a,) = seats.ranks
    x, ids, weights = plain_inputs(seats, 2)
    expert_out = seats.expected[2].expert_out[0]
    singletons = (None, False, (), 0, Round, PendingDispatch, PendingCombine, Dispatched, torch.Tensor)

    def rounds(times: int) -> None:
        for _ in range(times):
            received = a2a.dispatch_send(x, ids).receive()
            a2a.combine_send(expert_out, received, weights).receive()
            with pytest.raises(MoebiusError):
                a2a.dispatch_send(x[:, :-1], ids)
            assert a2a.plain.combine_recv(PendingCombine(received._round, a2a, (None,) * 5)) is None
            a2a.synchronize()

    rounds(4)
    gc.collect()
    tensors = (x, ids, weights, expert_out, a2a, a2a._engine, a2a.plain)
    before, shared, alive = counts(*tensors), counts(*singletons), len(gc.get_objects())
    rounds(200)
    gc.collect()
    assert counts(*tensors) == before
    assert all(abs(now - then) < 100 for now, then in zip(counts(*singletons), shared, strict=True))
    assert abs(len(gc.get_objects()) - alive) < 100


def test_a_round_lives_as_long_as_it_is_the_last_of_its_slot() -> None:
    seats = Seats(small())
    for number in range(4):
        seats.round(number)
    sent = seats.send(0, 0)
    begun = sent._round
    received = sent.receive()
    seats.reply(0, 0, received).receive()
    seats.wait()
    del sent, received
    assert sys.getrefcount(begun) == 3  # ours, the slot's, getrefcount's
    seats.round(1)
    seats.round(2)
    assert sys.getrefcount(begun) == 2


def test_an_object_dies_with_its_last_reference() -> None:
    """At once, for it holds much memory; the garbage collector is not needed."""
    gc.collect()
    gc.disable()
    try:
        a2a = SimtAllToAll(moebius.virtual_ranks(1)[0], small().config())
        gone, plain = weakref.ref(a2a), a2a.plain
        assert gc.is_tracked(plain)
        engine = weakref.ref(a2a._engine)
        del a2a
        assert gone() is None
        assert engine() is None
        assert sys.getrefcount(plain) == 2
    finally:
        gc.enable()


def test_a_cycle_through_an_error_is_collected() -> None:
    """A lost round keeps its error, and that the frames it went through."""
    a2a = SimtAllToAll(moebius.virtual_ranks(1)[0], small().config())
    x, ids, weights = (
        torch.zeros(1, 16, dtype=torch.bfloat16),
        torch.zeros(1, 2, dtype=torch.int64),
        torch.zeros(1, 2),
    )
    begun = a2a.dispatch_send(x, ids, weights)._round
    error = StateError("lost")
    error.__dict__["frame"] = a2a
    begun.lose(error)
    gone = weakref.ref(a2a)
    del a2a, begun, error
    gc.collect()
    assert gone() is None


def test_ranks_in_threads() -> None:
    """Launches let other threads on: every rank calls in its own, all at once."""
    case = small(num_ranks=4)
    seats = Seats(case)
    seats.round(0)
    seats.round(1)
    counted = [Counted(a2a) for a2a in seats.ranks]
    results: dict[int, list[Any]] = {}

    def rounds(rank: int) -> None:
        for number in range(2, 6):
            received = seats.send(rank, number).receive()
            results.setdefault(rank, []).append((received, seats.reply(rank, number, received).receive()))

    in_threads(case.num_ranks, rounds)
    seats.wait()
    assert [one.taken() for one in counted] == [list(HALVES) * 4] * case.num_ranks
    for number in (4, 5):  # the last of their slots
        received, combined = zip(*[results[rank][number - 2] for rank in range(case.num_ranks)], strict=True)
        seats.check(number, list(received), list(combined))
