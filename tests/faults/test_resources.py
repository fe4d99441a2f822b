"""Objects come and go: no descriptor, no mapping and no memory stays behind."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import moebius
from moebius import AllToAll, ConfigError
from tests.helpers.cases import Case
from tests.helpers.launch import RankPool
from tests.helpers.rounds import Halves, RankRound, expect
from tests.helpers.shared_memory import left_since, orphans

if TYPE_CHECKING:
    from collections.abc import Iterator

NUM_RANKS = 3
TIMES = 50
CASE = Case(num_ranks=NUM_RANKS, num_experts=6, hidden=2048, max_num_tokens=64, mode="expert")
PAGE_BYTES = os.sysconf("SC_PAGESIZE")


@pytest.fixture
def pool() -> Iterator[RankPool]:
    with RankPool(NUM_RANKS) as processes:
        yield processes


def held() -> tuple[int, int, int, int]:
    """Descriptors, shared mappings, bytes mapped, bytes resident."""
    gc.collect()
    shared = sum(" rw-s " in line for line in Path("/proc/self/maps").read_text().splitlines())
    size, resident = (int(pages) * PAGE_BYTES for pages in Path("/proc/self/statm").read_text().split()[:2])
    return len(os.listdir("/proc/self/fd")), shared, size, resident


def come_and_go(group: Any, make: Any, times: int) -> list[tuple[int, int, int, int]]:
    """Make, use and drop objects; what the process holds after a few, and after many."""
    after = []
    for number in range(times):
        make(group, number)
        if number in (times // 5, times - 1):
            after.append(held())
    return after


def one_life(group: Any, number: int) -> None:
    """A round between construction and closing; every other object is dropped without being closed."""
    rank = moebius_rank(group)
    a2a = AllToAll(group, CASE.config())
    halves = Halves(a2a, [ROUNDS[rank]])
    halves.dispatch(0)
    halves.combine(0)
    if number % 2:
        a2a.close()


def moebius_rank(group: Any) -> int:
    import torch.distributed as dist

    return dist.get_rank(group)


def virtual_life(group: Any, number: int) -> None:
    """All ranks in this process, in turn."""
    ranks = [AllToAll(virtual, CASE.config()) for virtual in moebius.virtual_ranks(NUM_RANKS)]
    halves = [Halves(a2a, [ROUNDS[rank]]) for rank, a2a in enumerate(ranks)]
    for half in ("dispatch_send", "dispatch_receive", "combine_send", "combine_receive"):
        for one in halves:
            getattr(one, half)(0)
    for a2a in ranks[number % 2 :]:
        a2a.close()


def refused_life(group: Any, number: int) -> None:
    """The ranks disagree: all of them are told, and nobody keeps anything."""
    case = Case(**{**vars(CASE), "depth": 2 + moebius_rank(group)})
    with pytest.raises(ConfigError, match="ranks must agree"):
        AllToAll(group, case.config())


class Rounds(dict[int, RankRound]):
    """Made in each process when first asked for."""

    def __missing__(self, rank: int) -> RankRound:
        expected = expect(CASE, 0)
        self.update({each: expected.of(each) for each in range(NUM_RANKS)})
        return self[rank]


ROUNDS = Rounds()


@pytest.mark.parametrize("life", [one_life, virtual_life, refused_life], ids=lambda life: life.__name__)
def test_objects_leave_nothing(pool: RankPool, life: Any) -> None:
    heap_bytes = moebius.plan(CASE.config(), NUM_RANKS).heap_bytes
    assert heap_bytes > 2 << 20, "too small for a leak to be seen"
    for few, many in pool.run(come_and_go, [(life, TIMES)] * NUM_RANKS):
        assert many[0] == few[0], f"descriptors grew from {few[0]} to {many[0]}"
        assert many[1] <= few[1], f"shared mappings grew from {few[1]} to {many[1]}"
        assert many[2] < few[2] + 8 * heap_bytes, f"mapped bytes grew from {few[2]} to {many[2]}"
        assert many[3] < few[3] + 8 * heap_bytes, f"resident bytes grew from {few[3]} to {many[3]}"


def test_nothing_is_left_in_shared_memory(pool: RankPool) -> None:
    before = orphans()
    pool.run(come_and_go, [(one_life, 3)] * NUM_RANKS)
    assert not left_since(before)
