"""Ranks that `MOEBIUS_HOST` sets apart, on one machine and without privilege: rounds, ends, deaths, exits."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

from moebius import Config
from tests.faults.programs import Accident, play
from tests.faults.test_faults import BEFORE, NUM_RANKS, Plan, case_of, check_told
from tests.helpers.cases import MODES, PAYLOADS, Case
from tests.helpers.launch import Place, RankPool
from tests.helpers.rounds import check_rank, expect, of_rank
from tests.hosts import programs

if TYPE_CHECKING:
    from pathlib import Path

SMALL = Config(num_experts=8, num_topk=2, hidden=64, max_num_tokens=4, timeout_s=5.0)


def pool_of(hosts: str) -> RankPool:
    """A rank for each letter; equal letters share a host."""
    return RankPool(len(hosts), places=[Place(host=host) for host in hosts])


@pytest.mark.parametrize("hosts", ["ab", "aabb", "abab", "abcd"])
def test_rounds_equal_the_reference(hosts: str) -> None:
    """Every payload and mode once, over routings in turn; ranks of a host need not be neighbours."""
    routings = ("uniform", "hot", "duplicates")
    kinds = [(payload, mode) for payload in PAYLOADS for mode in MODES]
    cases = [
        Case(
            num_ranks=len(hosts),
            num_experts=4 * len(hosts),
            hidden=512,
            max_num_tokens=6,
            payload=payload,
            mode=mode,
            routing=routings[number % 3],
            depth=2 + number % 2,
        )
        for number, (payload, mode) in enumerate(kinds)
    ]
    expected = [[expect(case, number) for number in range(case.depth + 1)] for case in cases]
    # Every other one in chunks of a cell or two.
    configs = [dataclasses.replace(case.config(), chunk_bytes=1500 * (i % 2)) for i, case in enumerate(cases)]
    with pool_of(hosts) as pool:
        jobs = [(rank, configs, [of_rank(rounds, rank) for rounds in expected]) for rank in range(len(hosts))]
        results = pool.run(programs.several, jobs, timeout_s=120.0)
        remote = pool.run(programs.remote_ranks, [(configs[0],)] * len(hosts))
    for rank, found in enumerate(results):
        assert remote[rank] == [other for other, host in enumerate(hosts) if host != hosts[rank]]
        for config, result, rounds in zip(configs, found, expected, strict=True):
            assert len(result.combined) == len(rounds)
            check_rank(config, rank, result, rounds)


def test_objects_come_and_go() -> None:
    with pool_of("aab") as pool:
        config = Config(num_experts=6, num_topk=2, hidden=64, max_num_tokens=4)
        assert pool.run(programs.open_and_close, [(config, 20)] * 3) == [0, 0, 0]


def test_objects_that_are_let_go_of_disconnect() -> None:
    with pool_of("ab") as pool:
        config = Config(num_experts=4, num_topk=2, hidden=64, max_num_tokens=4)
        assert pool.run(programs.dropped, [(config,)] * 2) == [[], []]


def test_the_users_traffic_on_the_group_is_apart() -> None:
    with pool_of("abb") as pool:
        config = Config(num_experts=6, num_topk=2, hidden=64, max_num_tokens=4)
        assert pool.run(programs.beside_other_traffic, [(config,)] * 3) == [True] * 3


def play_with(victim: int, what: str, hosts: str, case: Case, folder: Path) -> tuple[Plan, list[Any], Any]:
    """Something happens to a rank, once all that was sent before has come; and what it went through if it woke."""
    plan = Plan.of(case, victim, BEFORE)
    gate = programs.Gate(BEFORE, "dispatch_send", "gate", str(folder))
    with pool_of(hosts) as pool:
        accidents: list[list[Accident]] = [[gate] for _ in hosts]
        accidents[victim].append(Accident(BEFORE, "dispatch_send", what))
        jobs = [(case.config(), plan.given[rank], accidents[rank]) for rank in range(NUM_RANKS)]
        played = programs.run_through(folder, pool, play, jobs, lambda: None, (victim,))
        if what != "stop":
            return plan, played, None
        os.kill(pool.processes[victim].pid, signal.SIGCONT)
        return plan, played, pool.late(victim)


@pytest.mark.parametrize("hosts", ["abc", "aba"])
def test_a_rank_that_dies_is_named_at_the_deadline(hosts: str, tmp_path: Path) -> None:
    plan, played, _ = play_with(1, "kill", hosts, case_of("expert"), tmp_path)
    for rank in (0, 2):
        plan.check(rank, played[rank], [BEFORE])
        told = played[rank].lost[BEFORE]
        check_told(told, dead=1, op="dispatch", half="recv", epoch=BEFORE, reasons=("deadline", "reported"))
        assert played[rank].dead_ranks == (1,)


@pytest.mark.parametrize("hosts", ["abb", "abc"])
def test_a_stopped_rank_learns_that_it_was_given_up(hosts: str, tmp_path: Path) -> None:
    """And the others agree on who it was, though one of them may have begun to wait before another."""
    plan, played, woken = play_with(1, "stop", hosts, case_of("token"), tmp_path)
    for rank in (0, 2):
        plan.check(rank, played[rank], [BEFORE])
        assert played[rank].dead_ranks == (1,)
    assert BEFORE in woken.lost


# Also run by test_namespaces, where "cut" waits until the test has parted the hosts.
PROGRAM = """
    import os, pathlib, signal, sys, time
    import torch, torch.distributed as dist
    from moebius import AllToAll, Config, PeerTimeoutError

    rank, folder, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    config = Config(num_experts=4, num_topk=2, hidden=64, max_num_tokens=4, timeout_s=1.5)
    a2a = AllToAll(dist.group.WORLD, config)
    x, ids = torch.ones(4, 64, dtype=torch.bfloat16), torch.tensor([[0, 3]] * 4)
    for number in range(3):
        if how == "killed" and rank == 1 and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "cut" and number == 1:
            pathlib.Path(folder, f"{rank}.here").touch()
            while not pathlib.Path(folder, "open").exists():
                time.sleep(0.01)
        try:
            recv = a2a.dispatch(x, ids, torch.ones(4, 2))
            a2a.combine(recv.x.clone(), recv)
        except PeerTimeoutError as error:
            print("named", error.rank, flush=True)
        if how == "forked" and number == 1 and os.fork() == 0:
            sys.exit(0)  # what is open belongs to the parent, which goes on
    if how == "closed":
        a2a.close()
        a2a.close()
    if how == "dropped":
        del a2a, recv
    print("done", flush=True)
"""


@functools.cache
def program() -> str:
    return textwrap.dedent(PROGRAM)


@pytest.mark.parametrize("how", ["closed", "forgotten", "dropped", "forked", "killed"])
def test_a_program_ends_by_itself(how: str, tmp_path: Path) -> None:
    """With or without `close`, and when the other rank is dead: no crash at the end, and no hang."""
    file = tmp_path / "program.py"
    file.write_text(program())
    environment = programs.environment()
    running = [
        subprocess.Popen(
            [sys.executable, str(file), str(rank), str(tmp_path), how],
            env={**environment, "MOEBIUS_HOST": str(rank), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=60) for process in running]
    finally:
        for process in running:
            process.kill()
    codes = [process.returncode for process in running]
    assert codes == ([0, -signal.SIGKILL] if how == "killed" else [0, 0]), told
    assert "done" in told[0][0]
    assert told[0][0].count("named 1") == (1 if how == "killed" else 0)


def test_ranks_that_do_not_agree_are_told() -> None:
    with pool_of("ab") as pool:
        found = pool.run(
            programs.construct, [(SMALL,), (Config(num_experts=8, num_topk=3, hidden=64, max_num_tokens=4),)]
        )
    assert all("ConfigError: ranks must agree" in told for told in found)


def test_ranks_that_cannot_connect_are_told() -> None:
    with pool_of("ab") as pool:
        found = pool.run(programs.construct_without_a_way, [(SMALL,)] * 2)
    assert all("PeerAccessError" in told and "GLOO_SOCKET_IFNAME" in told for told in found), found
