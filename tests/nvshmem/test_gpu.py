"""Ranks over NVSHMEM on GPUs, each in a process; one GPU is enough for two.

With fewer GPUs than ranks NVSHMEM runs in its "limited" way: memory and puts work, its collectives are not used.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from moebius import MoebiusError, native
from tests.helpers import gpu
from tests.helpers.cases import MODES, Case
from tests.helpers.launch import RankPool
from tests.helpers.rounds import check_rank, expect, of_rank
from tests.nvshmem.programs import replays, rounds, waits_in_vain

if TYPE_CHECKING:
    from collections.abc import Iterator


def why_not() -> str | None:
    """Why NVSHMEM cannot run here; None if it can."""
    if (reason := gpu.why_not()) is not None:
        return reason
    try:
        native.nvshmem()
    except MoebiusError as error:
        return str(error)
    return None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]


@pytest.fixture(scope="module")
def pair() -> Iterator[RankPool]:
    with RankPool(2, method="spawn") as pool:
        yield pool


def check_rounds(pool: RankPool, case: Case, *, by_puts: bool = False, times: int = 1) -> list[dict[str, Any]]:
    expected = [expect(case, number) for number in range(case.depth + 1)]
    jobs = [(case.config(), of_rank(expected, rank), by_puts, times) for rank in range(case.num_ranks)]
    told = []
    for rank, (result, seen) in enumerate(pool.run(rounds, jobs, timeout_s=200.0)):
        check_rank(case.config(), rank, result, expected)
        told.append(seen)
    return told


def test_one_rank() -> None:
    with RankPool(1, method="spawn") as pool:
        (seen,) = check_rounds(pool, Case(num_ranks=1))
    assert seen["direct"] == [True]


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_by_direct_addresses(pair: RankPool, mode: Any) -> None:
    for seen in check_rounds(pair, Case(mode=mode, payload="fp8", hidden=512)):
        assert seen["direct"] == [True, True] or seen["out_of_reach"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("routing", ["ragged", "hot"])
def test_two_ranks_by_puts(pair: RankPool, mode: Any, routing: str, record_property: Any) -> None:
    for rank, seen in enumerate(check_rounds(pair, Case(mode=mode, routing=routing, hidden=512), by_puts=True)):
        print(f"rank {rank} saw {seen}")
        assert seen["direct"].count(False) == 1
        record_property(f"rank_{rank}", str(seen))


def test_twenty_objects_one_after_another(pair: RankPool) -> None:
    for seen in check_rounds(pair, Case(), times=20):
        assert seen["blocks"] <= 3


def test_replayed_graphs_put(pair: RankPool) -> None:
    case = Case(hidden=512)
    expected = expect(case, 0)
    jobs = [(case.config(), expected.of(rank), 5) for rank in range(2)]
    for same in pair.run(replays, jobs, timeout_s=100.0):
        assert same == [True] * 10


def test_a_rank_that_never_comes_is_named_over_the_network() -> None:
    case = Case(timeout_s=0.5)
    given = expect(case, 0).of(0)
    with RankPool(2, method="spawn") as pool:
        told, _ = pool.run(waits_in_vain, [(case.config(), given)] * 2, timeout_s=100.0)
    assert (told["rank"], told["dead"]) == (1, (1,))
    assert 0.4 < told["seconds"] < 3.0


PROGRAM = """
import os, sys, torch.distributed as dist, moebius
store, rank, num_ranks, dies = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "dies"
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=num_ranks)
config = moebius.Config(num_experts=4, num_topk=2, hidden=64, max_num_tokens=4)
moebius.AllToAll(dist.group.WORLD, config, "cuda", transport="nvshmem").close()
if dies and rank == 1:
    os._exit(3)
print("closed", flush=True)
"""


@pytest.mark.parametrize(("num_ranks", "fate"), [(1, "ends"), (2, "ends"), (2, "dies")])
def test_the_process_ends_also_when_another_has_died(tmp_path: Any, num_ranks: int, fate: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "store")]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    others = [
        subprocess.Popen([*command, str(rank), str(num_ranks), fate], env=environment) for rank in range(1, num_ranks)
    ]
    try:
        last = [*command, "0", str(num_ranks), fate]
        done = subprocess.run(last, capture_output=True, text=True, timeout=100, check=False, env=environment)
        assert (done.returncode, done.stdout.strip()) == (0, "closed"), done.stderr
        assert [other.wait(30.0) for other in others] == [3 if fate == "dies" else 0] * len(others)
    finally:
        for other in others:
            other.kill()
