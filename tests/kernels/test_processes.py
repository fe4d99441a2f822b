"""Ranks in two processes: how memory travels, that it is freed, and who is blamed. One GPU is enough."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.helpers import gpu
from tests.helpers.cases import MODES, Case
from tests.helpers.launch import RankPool
from tests.helpers.rounds import check_rank, expect, of_rank
from tests.kernels.programs import memory_after, rounds, waits_in_vain

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = gpu.marks()


@pytest.fixture
def pair() -> Iterator[RankPool]:
    with RankPool(2, method="spawn") as pool:
        yield pool


def check_rounds(pool: RankPool, case: Case, how: str, times: int = 1) -> None:
    expected = [expect(case, number) for number in range(case.depth + 1)]
    jobs = [(how, case.config(), of_rank(expected, rank), times) for rank in range(2)]
    for rank, result in enumerate(pool.run(rounds, jobs, timeout_s=200.0)):
        check_rank(case.config(), rank, result, expected)


@pytest.mark.parametrize("how", ["vmm", "ipc"])
def test_memory_travels(pair: RankPool, how: str) -> None:
    for mode in MODES:
        check_rounds(pair, Case(mode=mode, payload="fp8", hidden=512), how)


def test_the_best_way_is_found(pair: RankPool) -> None:
    check_rounds(pair, Case(routing="ragged"), "")


def test_twenty_objects_one_after_another(pair: RankPool) -> None:
    check_rounds(pair, Case(), "", times=20)


def test_memory_is_given_back(pair: RankPool) -> None:
    config = Case(num_experts=64, hidden=4096, max_num_tokens=512).config()
    for first, last in pair.run(memory_after, [(config, 12)] * 2, timeout_s=200.0):
        assert last >= first - (64 << 20), "each object leaves memory behind"


def test_a_rank_that_never_comes_is_named(pair: RankPool) -> None:
    case = Case(timeout_s=0.5)
    given = expect(case, 0).of(0)
    told, _ = pair.run(waits_in_vain, [(case.config(), given)] * 2, timeout_s=100.0)
    assert (told["rank"], told["op"], told["half"], told["dead"]) == (1, "dispatch", "recv", (1,))
    assert 0.4 < told["seconds"] < 3.0
