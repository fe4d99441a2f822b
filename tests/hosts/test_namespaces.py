"""Ranks in network namespaces, as on hosts of their own: same results, and a host that is cut off is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moebius import Config
from moebius.bench.moe_layer import WholeLayer, tolerance, worst_error
from moebius.bench.workload import Workload
from tests.faults.programs import play
from tests.faults.test_faults import Plan, case_of
from tests.helpers.cases import MODES, Case
from tests.helpers.launch import RankPool
from tests.helpers.rounds import check_rank, expect, of_rank
from tests.hosts import programs
from tests.hosts.namespaces import INTERFACE, Namespaces, why_not
from tests.hosts.test_processes import program

pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {"1+1": (0, 1), "2+2": (0, 0, 1, 1), "1+1+1": (0, 1, 2), "2+1+1": (0, 0, 1, 2)}


def subset(num_ranks: int) -> list[Case]:
    """A payload with scales and one without, in every mode, over routings that differ in what they send where."""
    experts = 4 * num_ranks
    return [
        Case(num_ranks=num_ranks, num_experts=experts, hidden=128, payload=payload, mode=mode, routing=routing)
        for mode in MODES
        for payload, routing in (("bf16", "uniform"), ("fp8", "hot"), ("opaque", "duplicates"))
    ]


def test_conformance_subset() -> None:
    """All layouts of hosts, against the reference to the bit."""
    with Namespaces(3) as hosts:
        for layout in LAYOUTS.values():
            cases = subset(len(layout))
            expected = [[expect(case, number) for number in range(case.depth + 1)] for case in cases]
            configs = [case.config() for case in cases]
            with RankPool(len(layout), places=hosts.places(*layout)) as pool:
                jobs = [(rank, configs, [of_rank(rounds, rank) for rounds in expected]) for rank in range(len(layout))]
                results = pool.run(programs.several, jobs, timeout_s=120.0)
                remote = pool.run(programs.remote_ranks, [(configs[0],)] * len(layout))
            for rank, found in enumerate(results):
                for config, result, rounds in zip(configs, found, expected, strict=True):
                    assert len(result.combined) == len(rounds)
                    check_rank(config, rank, result, rounds)
                assert remote[rank] == [other for other, host in enumerate(layout) if host != layout[rank]]


@pytest.mark.parametrize("layout", ["expert_major", "token_major"])
def test_the_layer_of_the_demo_gives_what_it_gives_on_one_host(layout: str) -> None:
    for hosts_of in (LAYOUTS["1+1"], LAYOUTS["1+1+1"]):
        ranks = len(hosts_of)
        workload = Workload(ranks=ranks, experts=4 * ranks, topk=3, hidden=256, tokens=8, layout=layout)
        jobs = [(rank, workload, 16, 3) for rank in range(ranks)]
        with RankPool(ranks) as pool:
            together = pool.run(programs.layer_steps, jobs)
        with Namespaces(ranks) as hosts, RankPool(ranks, places=hosts.places(*hosts_of)) as pool:
            apart = pool.run(programs.layer_steps, jobs)
        whole = WholeLayer(workload, 16)
        for step in range(3):
            expected = whole.expect(step)
            for rank in range(ranks):
                assert torch.equal(together[rank][step], apart[rank][step])
                error = worst_error(apart[rank][step], expected.y[rank], expected.scale[rank])
                assert error <= tolerance(workload.config())


@pytest.mark.parametrize("before", ["dispatch_send", "combine_send"])
def test_survivors_name_the_host_that_was_cut_off_and_go_on(before: str, tmp_path: Path) -> None:
    """Three hosts; the link of one goes down in the middle of a round; the others' later rounds are right."""
    dead, lost = 2, 2
    plan = Plan.of(case_of("expert"), dead, lost)
    gate = programs.Gate(lost, before, "gate", str(tmp_path))
    with Namespaces(3) as hosts, RankPool(3, places=hosts.places(0, 1, 2)) as pool:
        jobs = [(plan.case.config(), plan.given[rank], (gate,)) for rank in range(3)]
        found = programs.run_through(tmp_path, pool, play, jobs, lambda: hosts.cut_off(dead))
    for rank in (0, 1):
        played = found[rank]
        plan.check(rank, played, [lost])
        assert played.dead_ranks == (dead,)
        told = played.lost[lost]
        assert told["rank"] == dead
        assert told["reason"] in ("deadline", "reported")
        assert f"rank {dead}" in told["message"]


def test_two_ranks_a_host(tmp_path: Path) -> None:
    """Both ranks of the other host are named, one after another, on either side; calls end within the deadlines."""
    config = Config(num_experts=8, num_topk=4, hidden=64, max_num_tokens=8, timeout_s=2.0)
    with Namespaces(2) as hosts, RankPool(4, places=hosts.places(0, 0, 1, 1)) as pool:
        jobs = [(config, str(tmp_path), rank) for rank in range(4)]
        found = programs.run_through(tmp_path, pool, programs.alone_until_named, jobs, lambda: hosts.cut_off(1))
    for rank, (named, longest) in enumerate(found):
        others = {2, 3} if rank < 2 else {0, 1}
        assert set(named) == others, f"rank {rank} named {named}"
        assert longest < 15.0


def test_programs_of_parted_hosts_end_by_themselves(tmp_path: Path) -> None:
    """Each names the other, and its process ends as any does, though nobody answers any more."""
    file = tmp_path / "program.py"
    file.write_text(program())
    with Namespaces(2) as hosts:
        running = []
        for rank, name in enumerate(hosts.names):
            enter = ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={INTERFACE}", "OMP_NUM_THREADS=1"]
            command = [*enter, sys.executable, str(file), str(rank), str(tmp_path), "cut"]
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        try:
            programs.open_gate(tmp_path, 2, lambda: hosts.cut_off(1))
            told = [process.communicate(timeout=60) for process in running]
        finally:
            for process in running:
                process.kill()
    assert [process.returncode for process in running] == [0, 0], told
    for rank, (out, _) in enumerate(told):
        assert out.split("\n")[:2] == [f"named {1 - rank}", "done"]


def example() -> str:
    """The program in the guide."""
    text = (ROOT / "docs" / "hosts.md").read_text()
    return text.split("```python\n", 1)[1].split("```", 1)[0]


def test_the_guide_runs_with_torchrun(tmp_path: Path) -> None:
    program = tmp_path / "several_hosts.py"
    program.write_text(example())
    with Namespaces(2) as hosts:
        running = []
        for host, name in enumerate(hosts.names):
            flags = ["--nnodes=2", f"--node-rank={host}", "--nproc-per-node=2", f"--master-addr={hosts.address(0)}"]
            command = [sys.executable, "-m", "torch.distributed.run", *flags, "--master-port=29511", str(program)]
            enter = ["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={INTERFACE}", "OMP_NUM_THREADS=1"]
            running.append(
                subprocess.Popen([*enter, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        try:
            told = [process.communicate(timeout=120) for process in running]
        finally:
            for process in running:
                process.kill()
    assert [process.returncode for process in running] == [0, 0], told
    printed = "".join(out for out, _ in told)
    assert sorted(line for line in printed.splitlines() if line.startswith("rank")) == [
        f"rank {rank} of 4: as in one process" for rank in range(4)
    ]
