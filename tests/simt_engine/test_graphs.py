"""Captured halves on the emulated engine: odd numbers of calls, replayed between eager ones."""

from __future__ import annotations

import random

import pytest

from moebius import StateError
from tests.helpers.cases import MODES, Case
from tests.helpers.simt import extension
from tests.simt_engine.seats import Seats

modes = pytest.mark.parametrize("mode", MODES)


def small(mode: str = "expert", num_ranks: int = 2) -> Case:
    return Case(num_ranks=num_ranks, num_experts=2 * num_ranks, hidden=16, max_num_tokens=4, mode=mode)


def captured(seats: Seats, *numbers: int) -> tuple[list, list]:  # type: ignore[type-arg]
    """The rounds, recorded on every rank: the graphs, and the results of each round."""
    for a2a in seats.ranks:
        a2a.begin_capture()
    results = [seats.call(number) for number in numbers]
    return [a2a.end_capture() for a2a in seats.ranks], results


def replay(seats: Seats, graphs: list) -> None:  # type: ignore[type-arg]
    for a2a, graph in zip(seats.ranks, graphs, strict=True):
        graph.replay(a2a.stream)


@modes
@pytest.mark.parametrize("num_calls", [1, 3])
def test_a_graph_of_odd_calls_replayed_between_eager_rounds(mode: str, num_calls: int) -> None:
    seats = Seats(small(mode))
    graphs, results = captured(seats, *range(num_calls))
    assert seats.device_epochs() == [0, 0]
    order = random.Random(num_calls)
    begun = 0
    for _ in range(12):
        if order.random() < 0.5:
            seats.round(order.randrange(6))
            begun += 1
            continue
        times = order.randint(1, 3)
        for _ in range(times):
            replay(seats, graphs)
        seats.wait()
        begun += times * num_calls
        for number, (received, combined) in enumerate(results):
            if number >= num_calls - seats.case.depth:
                seats.check(number, received, combined, "replayed")
        assert seats.device_epochs() == [begun, begun]
    seats.close()


def test_two_graphs_in_any_order() -> None:
    seats = Seats(small())
    first, second = captured(seats, 0), captured(seats, 1, 2)
    for graphs, results in (first, second, second, first, second):
        replay(seats, graphs)
        seats.wait()
        seats.check(len(results) // 2 * 2, *results[-1])
    seats.close()


def test_rounds_of_a_capture_are_counted_by_themselves() -> None:
    seats = Seats(small())
    seats.round(0)
    seats.round(1)
    for a2a in seats.ranks:
        a2a.begin_capture()
    assert [a2a.epoch for a2a in seats.ranks] == [0, 0]
    received, _ = seats.call(2)
    assert [recv.epoch for recv in received] == [0, 0]
    assert [a2a.epoch for a2a in seats.ranks] == [1, 1]
    for a2a in seats.ranks:
        a2a.end_capture()
    assert [a2a.epoch for a2a in seats.ranks] == [2, 2]
    seats.round(3)
    seats.close()


def test_the_order_of_calls_is_checked_in_a_capture() -> None:
    seats = Seats(small())
    rank = seats.ranks[0]
    rank.begin_capture()
    first, _second = seats.send(0, 0), seats.send(0, 1)
    with pytest.raises(StateError, match=r"round 0 still expects receive\(\) of its dispatch"):
        seats.send(0, 2)
    recv = first.receive()
    seats.reply(0, 0, recv)
    with pytest.raises(StateError, match="already been through it"):
        seats.reply(0, 0, recv)
    rank.end_capture()
    seats.close()


def test_a_round_stays_in_its_capture() -> None:
    seats = Seats(small())
    eager = [seats.send(rank, 0) for rank in range(2)]
    seats.ranks[0].begin_capture()
    with pytest.raises(StateError, match="round 0 began eagerly"):
        eager[0].receive()
    inside = seats.send(0, 1)
    seats.ranks[0].end_capture()
    with pytest.raises(StateError, match="began in a capture"):
        inside.receive()
    received = [pending.receive() for pending in eager]
    for rank in range(2):
        seats.reply(rank, 0, received[rank]).receive()
    seats.wait()
    seats.ranks[0].begin_capture()
    recv = seats.send(0, 1).receive()
    seats.ranks[0].end_capture()
    with pytest.raises(StateError, match="capture"):
        seats.reply(0, 1, recv)
    seats.round(2)
    seats.close()


def test_captured_rounds_have_buffers_of_their_own() -> None:
    seats = Seats(small())
    for a2a in seats.ranks:
        a2a.begin_capture()
    results = [seats.call(number) for number in range(5)]
    for a2a in seats.ranks:
        a2a.end_capture()
    addresses = {received[0]._buffers.x.data_ptr() for received, _ in results}
    assert len(addresses) == 5
    seats.close()


def test_a_replay_between_the_halves_of_an_eager_round_is_told() -> None:
    seats = Seats(small())
    graphs, _ = captured(seats, 0, 1, 2)
    seats.wait()
    late = [seats.send(rank, 3) for rank in range(2)]
    recv = [pending.receive() for pending in late]
    extension().run_until_idle()
    replay(seats, graphs)
    extension().run_until_idle()
    for rank in range(2):
        seats.reply(rank, 3, recv[rank])
    for a2a in seats.ranks:
        with pytest.raises(StateError, match="too many rounds came in between"):
            a2a.synchronize()
    seats.close()
