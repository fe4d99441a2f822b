"""A rank, or a host, is cut off from the others: they name it, and go on among themselves."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch

import moebius
from moebius import AllToAll, PeerTimeoutError, VirtualNetwork
from tests.faults.programs import Accident, Played, play
from tests.faults.test_faults import AFTER, BEFORE, Plan
from tests.helpers.cases import Case
from tests.helpers.launch import in_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

NUM_RANKS = 4
DEADLINE_S = 0.8


@dataclasses.dataclass(frozen=True)
class CutOff(Accident):
    """The rank that has it, with those in `ranks`, is cut off from the others once all that is under way has come."""

    ranks: tuple[int, ...]
    network: VirtualNetwork
    stalled: bool

    def happen(self) -> None:
        assert self.network.wait_idle()
        self.network.cut_off(self.ranks, NUM_RANKS, stalled=self.stalled)


def case_of(mode: str) -> Case:
    return Case(
        num_ranks=NUM_RANKS,
        num_experts=8,
        num_topk=8,
        hidden=64,
        max_num_tokens=6,
        mode=mode,
        routing="full",
        timeout_s=DEADLINE_S,
    )


def play_all(case: Case, network: VirtualNetwork, plan: Plan, accidents: dict[int, Sequence[Accident]]) -> list[Played]:
    groups = moebius.virtual_ranks(NUM_RANKS, network)
    return in_threads(
        NUM_RANKS,
        lambda rank: play(groups[rank], case.config(), plan.given[rank], accidents.get(rank, ())),
        timeout_s=90.0,
    )


@pytest.mark.parametrize("stalled", [False, True], ids=["vanish", "stall"])
@pytest.mark.parametrize(
    ("mode", "victim", "ranks_per_host", "before"),
    [
        ("expert", 3, 1, "dispatch_send"),
        ("token", 0, 1, "combine_send"),
        ("expert-late", 1, 1, "combine_send"),
        ("token", 3, 3, "dispatch_send"),
    ],
)
def test_a_rank_that_is_cut_off_is_named(
    mode: str, victim: int, ranks_per_host: int, before: str, stalled: bool
) -> None:
    case = case_of(mode)
    plan = Plan.of(case, victim, BEFORE)
    network = VirtualNetwork(ranks_per_host, seed=5, max_delay_us=20)
    cut = CutOff(BEFORE, before, "cut", (victim,), network, stalled)
    played = play_all(case, network, plan, {victim: [cut]})
    op = before.partition("_")[0]
    for rank in set(range(NUM_RANKS)) - {victim}:
        plan.check(rank, played[rank], [BEFORE])
        told = played[rank].lost[BEFORE]
        assert (told["rank"], told["op"], told["epoch"]) == (victim, op, BEFORE), told
        # What cannot leave keeps the outbox: a send that needs it again finds out.
        assert told["half"] == "recv" or (stalled and told["half"] == "send"), told
        assert told["reason"] in ("deadline", "reported")
        assert played[rank].dead_ranks == (victim,)
    # What was cut off gives up the others, one after another, and is not held up by what cannot leave.
    assert played[victim].epoch == len(plan.expected)
    assert len(played[victim].dead_ranks) >= 1
    assert network.num_refused == 0


def test_a_host_that_is_cut_off_is_given_up() -> None:
    """Both of its ranks, one after the other; so are the others there. Each side goes on by itself."""
    case = case_of("expert")
    plan = Plan.of(case, 3, BEFORE)
    network = VirtualNetwork(2)
    played = play_all(case, network, plan, {2: [CutOff(BEFORE, "dispatch_send", "cut", (2, 3), network, False)]})
    for rank in range(NUM_RANKS):
        mine = {0, 1} if rank < 2 else {2, 3}
        assert {told["rank"] for told in played[rank].lost.values()} == set(range(4)) - mine, played[rank].lost
        assert set(played[rank].dead_ranks) == set(range(4)) - mine
        assert BEFORE + AFTER in played[rank].combined


def test_a_remote_rank_that_waits_is_not_blamed() -> None:
    """Rank 2 reaches rank 0 and not rank 1, which begins to wait later than rank 0 begins to wait for it."""
    config = moebius.Config(num_experts=3, num_topk=1, hidden=64, max_num_tokens=2, timeout_s=1.0)
    network = VirtualNetwork(1)
    groups = moebius.virtual_ranks(3, network)
    ranks = [AllToAll(group, config) for group in groups]
    network.cut(1, 2)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    sent = [a2a.dispatch_send(x, torch.tensor([[1 - a2a.rank % 2]]), torch.ones(1, 1)) for a2a in ranks]
    errors: dict[int, PeerTimeoutError] = {}

    def go_on(rank: int, pause_s: float) -> None:
        time.sleep(pause_s)
        try:
            recv = sent[rank].receive()
            ranks[rank].combine(recv.x, recv)
        except PeerTimeoutError as error:
            errors[rank] = error

    threads = [threading.Thread(target=go_on, args=args) for args in ((0, 0.0), (1, 0.6))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert {rank: (error.rank, error.op, error.reason) for rank, error in errors.items()} == {
        0: (2, "combine", "reported"),
        1: (2, "dispatch", "deadline"),
    }
    for a2a in ranks:
        a2a.close()


def test_a_remote_rank_given_up_is_told() -> None:
    """Its refusal comes over the network, if anything still does."""
    case = case_of("expert")
    plan = Plan.of(case, 2, 0)
    network = VirtualNetwork(1)
    groups = moebius.virtual_ranks(NUM_RANKS, network)
    absent = AllToAll(groups[2], case.config())
    played = in_threads(
        NUM_RANKS, lambda rank: None if rank == 2 else play(groups[rank], case.config(), plan.given[rank])
    )
    for rank, one in enumerate(played):
        if one is not None:
            plan.check(rank, one, [0])
    assert network.wait_idle()
    inputs = plan.given[2][0].inputs
    with pytest.raises(PeerTimeoutError, match="given up") as caught:
        absent.dispatch(inputs.x, inputs.topk_ids, inputs.topk_weights)
    assert (caught.value.rank, caught.value.reason) == (2, "reported")
    absent.close()
