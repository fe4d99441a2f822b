"""A rank dies or stops, in each half: the others are told who, where and when, and go on among themselves."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
import torch

import moebius
from moebius import AllToAll, PeerTimeoutError
from moebius.reference import RankInput
from tests.faults.programs import Accident, Played, play
from tests.helpers.cases import Case
from tests.helpers.launch import RankPool, in_threads
from tests.helpers.rounds import Expected, RankRound, check_rank, expect
from tests.helpers.schedules import HALVES
from tests.helpers.shared_memory import left_since, orphans

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NUM_RANKS = 3
BEFORE, AFTER = 2, 4  # rounds that go well, before and after the one that is lost
DEADLINE_S = 2.0
MARGIN_S = 20.0  # of a machine with too much to do

# Where the victim dies, what another rank must do for it to get there, rounds later in which it is missed, and where.
KILLS = {
    "before-dispatch-send": (("dispatch_send", "kill"), None, 0, ("dispatch", "recv")),
    "between-dispatch-halves": (("dispatch_receive", "kill"), None, 0, ("combine", "recv")),
    "in-dispatch-wait": (("dispatch_receive", "kill-inside"), ("dispatch_send", "sleep"), 0, ("combine", "recv")),
    "before-combine-send": (("combine_send", "kill"), None, 0, ("combine", "recv")),
    "between-combine-halves": (("combine_receive", "kill"), None, 1, ("dispatch", "recv")),
    "in-combine-wait": (("combine_receive", "kill-inside"), ("combine_send", "sleep"), 1, ("dispatch", "recv")),
}


@pytest.fixture(autouse=True)
def clean_shared_memory() -> Iterator[None]:
    """Nothing may be left behind, however the ranks ended."""
    before = orphans()
    yield
    assert not left_since(before)


def case_of(mode: str) -> Case:
    return Case(
        num_ranks=NUM_RANKS, num_experts=6, num_topk=4, hidden=64, max_num_tokens=6, mode=mode, timeout_s=DEADLINE_S
    )


def without(inputs: Sequence[RankInput], dead: int, num_local: int) -> list[RankInput]:
    """The round among the others: the dead rank sends nothing, and its experts take nothing."""
    left = []
    for rank, given in enumerate(inputs):
        if rank == dead:
            empty: dict[str, Any] = {
                name: value[:0] for name, value in vars(given).items() if isinstance(value, torch.Tensor)
            }
            left.append(dataclasses.replace(given, **empty))
            continue
        ids = given.topk_ids.clone()
        ids[ids // num_local == dead] = -1
        left.append(dataclasses.replace(given, topk_ids=ids))
    return left


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rounds of which one is lost: before it all ranks take part, after it the dead one does not."""

    case: Case
    expected: list[Expected]
    given: list[list[RankRound]]  # [rank][round]: what the ranks pass in, who know nothing of the plan

    @classmethod
    def of(cls, case: Case, dead: int, lost: int, inputs: Sequence[list[RankInput]] = ()) -> Plan:
        expected: list[Expected] = []
        given: list[list[RankRound]] = [[] for _ in range(case.num_ranks)]
        for number in range(lost + 1 + AFTER):
            asked = inputs[number] if inputs else case.inputs(number)
            left = without(asked, dead, case.num_experts // case.num_ranks)
            expected.append(expect(case, number, asked if number <= lost else left))
            for rank in range(case.num_ranks):
                given[rank].append(RankRound(asked[rank], expected[-1].expert_out[rank]))
        return cls(case, expected, given)

    def check(self, rank: int, played: Played, lost: Sequence[int]) -> None:
        """All rounds but the lost ones are right."""
        assert sorted(played.lost) == list(lost), f"rank {rank}: {played.lost}"
        assert sorted({*played.combined, *lost}) == list(range(len(self.expected)))
        assert not set(played.combined) & set(lost)
        whole = dataclasses.replace(
            played, received={number: got for number, got in played.received.items() if number not in lost}
        )
        check_rank(self.case.config(), rank, whole, self.expected)  # type: ignore[arg-type]
        assert played.epoch == len(self.expected)


def check_told(
    told: dict[str, object],
    *,
    dead: int,
    op: str,
    half: str,
    epoch: int,
    reasons: Sequence[str],
    expected: int | None = None,
) -> None:
    """The error names rank, half and round, and came within the deadline."""
    assert (told["rank"], told["op"], told["half"], told["epoch"]) == (dead, op, half, epoch), told
    assert told["expected"] == (epoch if expected is None else expected)
    assert told["reason"] in reasons, told
    assert f"{op} {half} of round {epoch}: rank {dead}" in str(told["message"])
    assert told["took_s"] < DEADLINE_S + MARGIN_S  # type: ignore[operator]
    assert 0 <= told["waited_us"] <= told["took_s"] * 1e6  # type: ignore[operator]


@pytest.mark.parametrize("point", KILLS)
@pytest.mark.parametrize(("mode", "victim"), [("expert", 1), ("token", 0), ("expert-late", 2)])
def test_kill_in_each_half(mode: str, victim: int, point: str) -> None:
    (before, what), delay, later, (op, half) = KILLS[point]
    case = case_of(mode)
    lost = BEFORE + later
    plan = Plan.of(case, victim, lost)
    survivors = [rank for rank in range(NUM_RANKS) if rank != victim]
    accidents: dict[int, list[Accident]] = {rank: [] for rank in range(NUM_RANKS)}
    accidents[victim].append(Accident(BEFORE, before, what))
    if delay is not None:
        accidents[survivors[-1]].append(Accident(BEFORE, *delay))
    with RankPool(NUM_RANKS) as pool:
        jobs = [(case.config(), plan.given[rank], accidents[rank]) for rank in range(NUM_RANKS)]
        played = pool.run(play, jobs, absent=(victim,))
    for rank in survivors:
        plan.check(rank, played[rank], [lost])
        check_told(played[rank].lost[lost], dead=victim, op=op, half=half, epoch=lost, reasons=("died", "reported"))
        assert played[rank].dead_ranks == (victim,)


def test_kill_without_a_parent_that_looks() -> None:
    """A dead child that its parent has not waited for is a zombie, and as dead as any."""
    case = case_of("expert")
    plan = Plan.of(case, 1, BEFORE)
    with RankPool(NUM_RANKS, method="spawn") as pool:
        accidents = [[], [Accident(BEFORE, "dispatch_send", "kill")], []]
        jobs = [(case.config(), plan.given[rank], accidents[rank]) for rank in range(NUM_RANKS)]
        played = pool.run(play, jobs, absent=(1,))
    for rank in (0, 2):
        plan.check(rank, played[rank], [BEFORE])
        told = played[rank].lost[BEFORE]
        check_told(told, dead=1, op="dispatch", half="recv", epoch=BEFORE, reasons=("died", "reported"))
        assert told["took_s"] < DEADLINE_S, "noticed before the deadline"


@pytest.mark.parametrize("mode", ["expert", "token"])
def test_a_stopped_rank_is_named_and_told_when_it_wakes(mode: str) -> None:
    """No process has died: only the deadline tells. The sleeper learns that it was given up, and disturbs nobody."""
    case = case_of(mode)
    plan = Plan.of(case, 1, BEFORE)
    with RankPool(NUM_RANKS) as pool:
        accidents = [[], [Accident(BEFORE, "dispatch_send", "stop")], []]
        jobs = [(case.config(), plan.given[rank], accidents[rank]) for rank in range(NUM_RANKS)]
        played = pool.run(play, jobs, absent=(1,))
        os.kill(pool.processes[1].pid, signal.SIGCONT)
        woken = pool.late(1)
    for rank in (0, 2):
        plan.check(rank, played[rank], [BEFORE])
        told = played[rank].lost[BEFORE]
        check_told(told, dead=1, op="dispatch", half="recv", epoch=BEFORE, reasons=("deadline", "reported"))
        assert played[rank].dead_ranks == (1,)
    assert any(played[rank].lost[BEFORE]["reason"] == "deadline" for rank in (0, 2))
    assert any(played[rank].lost[BEFORE]["waited_us"] >= DEADLINE_S * 1e6 * 0.9 for rank in (0, 2))
    assert sorted(woken.lost) == list(range(BEFORE, BEFORE + 1 + AFTER))
    assert all(told["rank"] == 1 and told["reason"] == "reported" for told in woken.lost.values()), woken.lost
    assert all(told["via"] in (0, 2) for told in woken.lost.values())


def test_survivors_may_close_at_once() -> None:
    case = case_of("expert")
    plan = Plan.of(case, 1, BEFORE)
    with RankPool(NUM_RANKS) as pool:
        accidents = [[Accident(BEFORE + 1, "dispatch_send", "close")] for _ in range(NUM_RANKS)]
        accidents[1] = [Accident(BEFORE, "combine_send", "kill")]
        jobs = [(case.config(), plan.given[rank], accidents[rank]) for rank in range(NUM_RANKS)]
        played = pool.run(play, jobs, absent=(1,))
    for rank in (0, 2):
        assert sorted(played[rank].lost) == [BEFORE]
        check_told(
            played[rank].lost[BEFORE], dead=1, op="combine", half="recv", epoch=BEFORE, reasons=("died", "reported")
        )


def test_kill_in_rounds_that_are_never_combined() -> None:
    """The dispatch D rounds later waits for the dead rank's closing; whoever sees it first names it."""
    case = case_of("expert")
    plan = Plan.of(case, 1, BEFORE)
    with RankPool(NUM_RANKS) as pool:
        accidents = [[], [Accident(BEFORE, "dispatch_send", "kill")], []]
        jobs = [(case.config(), plan.given[rank], accidents[rank], HALVES[:2]) for rank in range(NUM_RANKS)]
        played = pool.run(play, jobs, absent=(1,))
    for rank in (0, 2):
        assert sorted(played[rank].lost) == [BEFORE]
        told = played[rank].lost[BEFORE]
        # Round BEFORE - D is the one whose closing is waited for, round BEFORE the one that is lost.
        reasons = ("died", "reported")
        check_told(
            told, dead=1, op="dispatch", half="send", epoch=BEFORE, reasons=reasons, expected=BEFORE - case.depth
        )
        got = {number: received for number, received in played[rank].received.items() if number != BEFORE}
        assert sorted(got) == [number for number in range(len(plan.expected)) if number != BEFORE]
        check_rank(case.config(), rank, dataclasses.replace(played[rank], received=got), plan.expected)


def test_one_survivor_is_owed_nothing_by_the_dead() -> None:
    """It ends the round, and misses the dead rank a round later than the other; then both agree again."""
    case = case_of("expert")
    inputs = [case.inputs(number) for number in range(BEFORE + 2 + AFTER)]
    asked = inputs[BEFORE][0].topk_ids
    asked[asked // 2 == 1] = -1
    plan = Plan.of(case, 1, BEFORE + 1, inputs)
    with RankPool(NUM_RANKS) as pool:
        accidents = [[], [Accident(BEFORE, "combine_send", "kill")], []]
        jobs = [(case.config(), plan.given[rank], accidents[rank]) for rank in range(NUM_RANKS)]
        played = pool.run(play, jobs, absent=(1,))
    plan.check(0, played[0], [BEFORE + 1])
    plan.check(2, played[2], [BEFORE, BEFORE + 1])
    for rank in (0, 2):
        assert all(told["rank"] == 1 for told in played[rank].lost.values())
        assert played[rank].dead_ranks == (1,)


def test_a_lost_round_leaves_no_rows_behind() -> None:
    """token_major: unused rows read as unrouted, also where the round before them in the slot was lost unread."""
    case = dataclasses.replace(case_of("token"), routing="full")
    sizes = [1, 1, case.max_num_tokens, 1, 1, 1, 1]
    inputs = [
        [RankInput(given.x[:size], given.topk_ids[:size], given.topk_weights[:size]) for given in case.inputs(number)]
        for number, size in enumerate(sizes)
    ]
    plan = Plan.of(case, 0, BEFORE, inputs)
    with RankPool(NUM_RANKS) as pool:
        accidents = [[Accident(BEFORE, "dispatch_send", "kill")], [], []]
        jobs = [(case.config(), plan.given[rank], accidents[rank]) for rank in range(NUM_RANKS)]
        played = pool.run(play, jobs, absent=(0,))
    for rank in (1, 2):
        plan.check(rank, played[rank], [BEFORE])


@pytest.mark.parametrize("mode", ["expert", "token"])
def test_a_virtual_rank_that_never_comes(mode: str) -> None:
    """In one process there is nothing to watch but the clock."""
    case = dataclasses.replace(case_of(mode), timeout_s=0.2)
    plan = Plan.of(case, 2, 0)
    groups = moebius.virtual_ranks(NUM_RANKS)
    absent = AllToAll(groups[2], case.config())
    played = in_threads(2, lambda rank: play(groups[rank], case.config(), plan.given[rank]))
    for rank in range(2):
        plan.check(rank, played[rank], [0])
        check_told(played[rank].lost[0], dead=2, op="dispatch", half="recv", epoch=0, reasons=("deadline", "reported"))
    inputs = plan.given[2][0].inputs
    with pytest.raises(PeerTimeoutError, match="given up") as caught:
        absent.dispatch(inputs.x, inputs.topk_ids, inputs.topk_weights)
    assert caught.value.rank == 2
    assert caught.value.reason == "reported"
    absent.close()


def test_a_rank_that_closes_is_missed() -> None:
    """close() is not collective: the others find out by the deadline, and go on."""
    case = dataclasses.replace(case_of("expert"), timeout_s=0.2)
    plan = Plan.of(case, 1, BEFORE)
    groups = moebius.virtual_ranks(NUM_RANKS)
    accidents = [[], [Accident(BEFORE, "dispatch_send", "close")], []]
    played = in_threads(NUM_RANKS, lambda rank: play(groups[rank], case.config(), plan.given[rank], accidents[rank]))
    for rank in (0, 2):
        plan.check(rank, played[rank], [BEFORE])
        assert played[rank].lost[BEFORE]["rank"] == 1
