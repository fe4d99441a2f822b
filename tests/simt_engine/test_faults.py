"""What an asynchronous engine does with faults: recorded in the kernel, raised by the next call, the round lost."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moebius import PeerTimeoutError, RoutingError, ShapeError, StateError
from tests.helpers.cases import MODES, Case
from tests.simt_engine.seats import Seats, idle

modes = pytest.mark.parametrize("mode", MODES)


def small(mode: str = "expert", num_ranks: int = 3) -> Case:
    return Case(num_ranks=num_ranks, num_experts=2 * num_ranks, hidden=16, max_num_tokens=4, mode=mode, timeout_s=0.05)


@modes
def test_a_rank_that_never_comes_is_named(mode: str) -> None:
    seats = Seats(small(mode))
    recv = [seats.send(rank, 0).receive() for rank in (0, 1)]
    for a2a in seats.ranks[:2]:
        with pytest.raises(PeerTimeoutError) as caught:
            a2a.synchronize()
        error = caught.value
        assert (error.op, error.half, error.rank, error.epoch) == ("dispatch", "recv", 2, 0)
        assert error.reason in ("deadline", "reported")
        assert a2a.dead_ranks == (2,)
    for rank in (0, 1):
        assert not recv[rank].expert_num_tokens.any()
        assert not recv[rank].src_num_tokens.any()
        with pytest.raises(PeerTimeoutError):  # the round is lost: its own error again, nothing enqueued
            seats.reply(rank, 0, recv[rank])
    seats.close()


def test_survivors_go_on() -> None:
    case = small()
    seats = Seats(case)
    seats.round(0)
    for rank in (0, 1):
        seats.send(rank, 1).receive()
    idle()
    for a2a in seats.ranks[:2]:
        with pytest.raises(PeerTimeoutError):
            a2a.check()
    # Rank 2 is masked: the rows that would go there come back without its share.
    pending = [seats.send(rank, 2) for rank in (0, 1)]
    received = [one.receive() for one in pending]
    replies = [seats.reply(rank, 2, received[rank]) for rank in (0, 1)]
    home = [one.receive() for one in replies]
    for a2a in seats.ranks[:2]:
        a2a.synchronize()
    for rank in (0, 1):
        assert received[rank].src_num_tokens[2] == 0
        assert received[rank].src_num_tokens[:2].tolist() == [
            seats.expected[2].dispatched[rank].src_num_tokens[source].item() for source in (0, 1)
        ]
        ids = seats.expected[2].inputs[rank].topk_ids
        elsewhere = ((ids >= 4) & (ids < 6)).any(1)
        torch.testing.assert_close(
            home[rank][~elsewhere], seats.expected[2].combined[rank][~elsewhere], rtol=0, atol=0, equal_nan=True
        )
    seats.close()


def test_the_fault_is_raised_by_the_next_call_which_has_done_nothing() -> None:
    seats = Seats(small())
    pending = seats.send(0, 0)
    pending.receive()
    idle()
    before = seats.ranks[0].epoch
    with pytest.raises(PeerTimeoutError):
        seats.send(0, 1)
    assert seats.ranks[0].epoch == before
    seats.ranks[0].check()  # told once
    seats.send(0, 1)
    idle()
    seats.close()


@modes
def test_an_id_that_is_no_expert_is_told_later_and_taken_for_none(mode: str) -> None:
    seats = Seats(small(mode, 2))
    good = seats.expected[0].inputs[0]
    bad = good.topk_ids.clone()
    bad[1, 2] = 77
    masked = good.topk_ids.clone()
    masked[1, 2] = -1
    from tests.helpers.rounds import expect

    inputs = [dataclasses.replace(good, topk_ids=masked), seats.expected[0].inputs[1]]
    seats.expected[0] = expect(seats.case, 0, inputs)
    sent = dataclasses.replace(good, topk_ids=bad)
    seats.expected[0].inputs[0] = sent
    received, combined = seats.call(0)
    idle()
    with pytest.raises(RoutingError, match=r"topk_ids\[1, 2\].*got 77"):
        seats.ranks[0].check()
    seats.ranks[1].check()
    seats.check(0, received, combined)
    seats.round(1)
    seats.close()


def test_what_does_not_lie_at_16_bytes_is_refused() -> None:
    seats = Seats(small(num_ranks=2))
    good = seats.expected[0].inputs[0]
    odd = torch.empty(good.x.numel() + 1, dtype=good.x.dtype)[1:].view_as(good.x).copy_(good.x)
    seats.expected[0].inputs[0] = dataclasses.replace(good, x=odd)
    with pytest.raises(ShapeError, match=r"`x` must be at an address.*16 bytes"):
        seats.send(0, 0)
    seats.expected[0].inputs[0] = good
    seats.round(0)
    seats.close()


def test_a_closed_object_says_so() -> None:
    seats = Seats(small(num_ranks=2))
    seats.close()
    for call in (seats.ranks[0].check, seats.ranks[0].synchronize, lambda: seats.send(0, 0)):
        with pytest.raises(StateError, match="closed"):
            call()


def test_results_stay_readable_after_combine() -> None:
    """token_major is a copy on a device: combine does not give it back."""
    seats = Seats(small("token", 2))
    received, combined = seats.call(0)
    seats.wait()
    seats.check(0, received, combined)
    seats.close()


def test_a_rank_masked_by_hand_is_left_out() -> None:
    seats = Seats(small())
    for a2a in seats.ranks[:2]:
        a2a.mask_rank(2)
    received = [one.receive() for one in [seats.send(rank, 0) for rank in (0, 1)]]
    idle()
    for rank in (0, 1):
        seats.ranks[rank].check()
        assert received[rank].src_num_tokens[2] == 0
        assert seats.ranks[rank].dead_ranks == (2,)
        seats.ranks[rank].mask_rank(2, dead=False)
        assert seats.ranks[rank].dead_ranks == ()
    seats.close()
