"""The order of calls: each rule is broken once, nothing changes, and the next legal round is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import moebius
from moebius import AllToAll, StateError
from tests.helpers.cases import MODES, Case
from tests.helpers.in_turn import InTurn
from tests.helpers.rounds import Halves, copied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(params=MODES)
def ranks(request: pytest.FixtureRequest) -> Iterator[InTurn]:
    with InTurn(Case(num_ranks=2, num_experts=4, num_topk=2, hidden=16, max_num_tokens=4, mode=request.param)) as made:
        yield made


def call(halves: list[Halves], *steps: tuple[str, int]) -> None:
    """Each half on all ranks."""
    for half, number in steps:
        for one in halves:
            getattr(one, half)(number)


def rejected(ranks: InTurn, halves: list[Halves], half: str, number: int, message: str) -> None:
    """The half is refused on every rank, and the epoch stays."""
    before = ranks.epochs()
    for one in halves:
        with pytest.raises(StateError, match=message):
            getattr(one, half)(number)
    assert ranks.epochs() == before


def test_a_dispatch_needs_the_receive_of_the_round_before_it_in_its_slot(ranks: InTurn) -> None:
    halves = ranks.halves()
    call(halves, ("dispatch_send", 0), ("dispatch_send", 1))
    rejected(ranks, halves, "dispatch_send", 2, r"round 0 still expects receive\(\) of its dispatch.*depth = 2")
    call(halves, ("dispatch_receive", 0), ("combine_send", 0))
    rejected(ranks, halves, "dispatch_send", 2, r"round 0 still expects receive\(\) of its combine")
    call(halves, ("combine_receive", 0), ("dispatch_send", 2), ("dispatch_receive", 2), ("dispatch_receive", 1))
    call(halves, *[(half, number) for number in (1, 2) for half in ("combine_send", "combine_receive")])
    ranks.check(halves)


def test_a_result_is_combined_once(ranks: InTurn) -> None:
    halves = ranks.halves()
    call(halves, ("dispatch_send", 0), ("dispatch_receive", 0), ("combine_send", 0))
    rejected(ranks, halves, "combine_send", 0, "combine.*round 0")
    call(halves, ("combine_receive", 0))
    rejected(ranks, halves, "combine_send", 0, "combine.*round 0")
    ranks.check(halves)
    ranks.one_round(1)


def test_a_stale_result_is_neither_combined_nor_read(ranks: InTurn) -> None:
    """Only dispatched, D rounds long; threads, for closing such a round waits for the other ranks."""
    from tests.helpers.launch import in_threads

    halves = ranks.halves()

    def dispatches(rank: int) -> None:
        for number in range(3):
            halves[rank].dispatch_send(number)
            halves[rank].dispatch_receive(number)

    in_threads(2, dispatches)
    rejected(ranks, halves, "combine_send", 0, "stale")
    for one in halves:
        for name in ("x", "scales", "expert_num_tokens", "src_num_tokens", "topk_ids", "topk_weights", "src_info"):
            with pytest.raises(StateError, match="stale"):
                getattr(one.live[0], name)
        assert one.live[0].num_tokens == ranks.expected[0].inputs[0].num_tokens
        copied(one.live[1])
    call(halves, ("combine_send", 2), ("combine_send", 1), ("combine_receive", 1), ("combine_receive", 2))
    ranks.check(halves)


def test_a_combined_result_goes_stale(ranks: InTurn) -> None:
    halves = ranks.halves()
    for number in range(3):
        call(
            halves,
            *[(half, number) for half in ("dispatch_send", "dispatch_receive", "combine_send", "combine_receive")],
        )
    rejected(ranks, halves, "combine_send", 0, "stale")
    rejected(ranks, halves, "combine_send", 1, "combine.*round 1")
    with pytest.raises(StateError):
        assert halves[0].live[0].x is None


def test_tokens_in_place_are_gone_once_their_combine_has_begun(ranks: InTurn) -> None:
    halves = ranks.halves()
    call(halves, ("dispatch_send", 0), ("dispatch_receive", 0), ("combine_send", 0))
    recv = halves[0].live[0]
    assert recv.expert_num_tokens is not None
    if ranks.case.mode == "token":
        for name in ("x", "scales", "topk_ids", "topk_weights"):
            with pytest.raises(StateError, match="in place"):
                getattr(recv, name)
    else:
        assert recv.x is not None
    call(halves, ("combine_receive", 0))


def test_another_objects_result_is_refused(ranks: InTurn) -> None:
    with InTurn(ranks.case, ranks.expected) as others:
        mine, theirs = ranks.halves(), others.halves()
        call(mine, ("dispatch_send", 0), ("dispatch_receive", 0))
        call(theirs, ("dispatch_send", 0), ("dispatch_receive", 0))
        for own, other in zip(mine, theirs, strict=True):
            own.live, other.live = other.live, own.live
        rejected(ranks, mine, "combine_send", 0, "another AllToAll")
        for own, other in zip(mine, theirs, strict=True):
            own.live, other.live = other.live, own.live
        for halves in (mine, theirs):
            call(halves, ("combine_send", 0), ("combine_receive", 0))
        ranks.check(mine)
        others.check(theirs)


def test_another_ranks_result_is_refused(ranks: InTurn) -> None:
    halves = ranks.halves()
    call(halves, ("dispatch_send", 0), ("dispatch_receive", 0))
    halves[0].live, halves[1].live = halves[1].live, halves[0].live
    rejected(ranks, halves, "combine_send", 0, "another AllToAll")
    halves[0].live, halves[1].live = halves[1].live, halves[0].live
    call(halves, ("combine_send", 0), ("combine_receive", 0))
    ranks.check(halves)


def test_receiving_again_gives_the_same(ranks: InTurn) -> None:
    halves = ranks.halves()
    call(halves, ("dispatch_send", 0), ("dispatch_receive", 0))
    for one in halves:
        assert one._dispatches[0].receive() is one.live[0]
    call(halves, ("combine_send", 0), ("combine_receive", 0))
    for one in halves:
        assert one._dispatches[0].receive() is one.live[0]
        assert one._combines[0].receive() is one._combines[0].receive()
    ranks.check(halves)
    ranks.one_round(1)


def closed_calls(a2a: AllToAll, halves: Halves) -> list[Callable[[], object]]:
    return [
        lambda: a2a.epoch,
        lambda: a2a.dead_ranks,
        lambda: halves.dispatch_send(0),
        lambda: halves.dispatch(0),
        lambda: halves.dispatch_receive(1),
        lambda: halves.combine_send(0),
        lambda: halves.combine(0),
    ]


def test_a_closed_object_refuses_every_call(ranks: InTurn) -> None:
    halves = ranks.halves()
    call(halves, ("dispatch_send", 0), ("dispatch_receive", 0), ("dispatch_send", 1))
    kept = halves[0].live[0].expert_num_tokens
    before = kept.clone()
    assert not ranks.ranks[0].closed
    for a2a in ranks.ranks:
        a2a.close()
        a2a.close()
        assert a2a.closed
    for a2a, one in zip(ranks.ranks, halves, strict=True):
        for attempt in closed_calls(a2a, one):
            with pytest.raises(StateError, match="closed"):
                attempt()
        assert a2a.config.num_experts == 4
        assert (a2a.num_ranks, a2a.engine) == (2, "cpu")
    assert torch.equal(kept, before)


def test_tensors_outlive_the_object(ranks: InTurn) -> None:
    """A tensor handed out keeps its memory: closing, and dropping everything else, must not unmap it."""
    import gc

    halves = ranks.halves()
    call(halves, ("dispatch_send", 0), ("dispatch_receive", 0))
    kept = halves[0].live[0].x
    before = kept.clone()
    for a2a in ranks.ranks:
        a2a.close()
    ranks.ranks.clear()
    del halves
    gc.collect()
    assert torch.equal(kept.view(torch.uint8), before.view(torch.uint8))


def test_leaving_the_block_closes() -> None:
    case = Case(num_ranks=1)
    with AllToAll(moebius.virtual_ranks(1)[0], case.config()) as a2a:
        assert a2a.epoch == 0
        assert a2a.dead_ranks == ()
        assert a2a.heap_bytes == moebius.plan(case.config(), 1).heap_bytes
        assert a2a.heap_bytes == sum(size for _, size in moebius.plan(case.config(), 1).regions)
    assert a2a.closed


def test_epoch_counts_rounds_begun(ranks: InTurn) -> None:
    halves = ranks.halves()
    call(halves, ("dispatch_send", 0))
    assert ranks.epochs() == [1, 1]
    call(halves, ("dispatch_send", 1), ("dispatch_receive", 1), ("dispatch_receive", 0))
    assert ranks.epochs() == [2, 2]
    assert [one.received[number].epoch for one in halves for number in (0, 1)] == [0, 1, 0, 1]
