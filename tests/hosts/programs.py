"""What ranks on several hosts do in a test. Processes import it by name."""

from __future__ import annotations

import dataclasses
import gc
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moebius import AllToAll, Config, MoebiusError, PeerTimeoutError
from moebius.bench.moe_layer import Experts, Router, shared_expert, step_input
from tests.conformance.engines import run_rank
from tests.conformance.programs import whole_rounds
from tests.faults.programs import Accident

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor

    from moebius.bench.workload import Workload
    from tests.helpers.launch import RankPool
    from tests.helpers.rounds import RankRound, Result

WAIT_S = 30.0  # for the test to see that all have come to a place


def several(group: Any, rank: int, configs: Sequence[Config], rounds: Sequence[Sequence[RankRound]]) -> list[Result]:
    """The rounds of several cases, an object each."""
    return [
        run_rank(group, config, whole_rounds, rank, (given,), None)
        for config, given in zip(configs, rounds, strict=True)
    ]


def remote_ranks(group: Any, config: Config) -> list[int]:
    """The ranks that this one has no memory of."""
    with AllToAll(group, config) as a2a:
        heap = a2a._engine._heap  # type: ignore[union-attr]
        return [rank for rank, segment in enumerate(heap.segments) if segment is None]


def layer_steps(group: Any, rank: int, workload: Workload, intermediate: int, steps: int) -> list[Tensor]:
    """Steps of the demo's layer: what comes out of it for this rank's tokens."""
    config = workload.config()
    router, shared = Router(workload), shared_expert(workload, intermediate)
    num_local = config.num_local_experts(workload.ranks)
    experts = Experts(workload, intermediate, rank * num_local, num_local)
    outputs = []
    with AllToAll(group, config) as a2a:
        for step in range(steps):
            x = step_input(workload, rank, step)
            recv = a2a.dispatch(x, *router(x))
            out = torch.zeros(*recv.x.shape[:-1], config.hidden, dtype=experts.dtype)
            outputs.append(a2a.combine(experts(recv, out), recv).float() + shared(x).float())
    return outputs


@dataclasses.dataclass(frozen=True)
class Gate(Accident):
    """All ranks come to a place, and go on when the test says so.

    Attributes:
        folder: that ranks and test tell each other in.
    """

    folder: str = ""

    def happen(self) -> None:
        folder = Path(self.folder)
        (folder / f"{time.monotonic_ns()}.here").touch()
        deadline = time.monotonic() + WAIT_S
        while not (folder / "open").exists():
            assert time.monotonic() < deadline, "the gate stayed shut"
            time.sleep(0.005)


def open_gate(folder: Path, num_ranks: int, act: Callable[[], object]) -> None:
    """Once all ranks have come, act and let them go on.

    Raises:
        TimeoutError: they did not all come.
    """
    deadline = time.monotonic() + WAIT_S
    while len(list(folder.glob("*.here"))) < num_ranks:
        if time.monotonic() > deadline:
            raise TimeoutError("not all ranks came to the gate")
        time.sleep(0.01)
    act()
    (folder / "open").touch()


def run_through(
    folder: Path,
    pool: RankPool,
    program: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    act: Callable[[], object],
    absent: Collection[int] = (),
) -> list[Any]:
    """Run a program with a `Gate` in it on all ranks; `act` before the gate opens. `absent` as in `RankPool.run`."""
    keeper = threading.Thread(target=open_gate, args=(folder, len(jobs), act), daemon=True)
    keeper.start()
    try:
        return pool.run(program, jobs, absent=absent, timeout_s=90.0)
    finally:
        keeper.join(WAIT_S)
        assert (folder / "open").exists(), "not all ranks came to the gate"


def alone_until_named(group: Any, config: Config, folder: str, rank: int) -> tuple[list[int], float]:
    """One round whole; then one in the middle of which hosts are parted; then until nobody is waited for.

    Returns:
        The ranks that errors named, in order, and the seconds that the longest call took.
    """
    x = torch.randn(config.max_num_tokens, config.hidden, dtype=torch.bfloat16)
    ids = (torch.arange(config.num_topk) + torch.arange(config.max_num_tokens)[:, None]) % config.num_experts
    weights = torch.ones(ids.shape)
    named, longest = [], 0.0
    with AllToAll(group, config) as a2a:
        for number in range(8):
            start = time.monotonic()
            try:
                recv = a2a.dispatch(x, ids, weights)
                if number == 1:
                    Gate(number, "combine_send", "gate", f"{folder}").happen()
                    start = time.monotonic()
                a2a.combine(recv.x * 1, recv)
            except PeerTimeoutError as error:
                named.append(error.rank)
            longest = max(longest, time.monotonic() - start)
    assert rank not in named
    return named, longest


def open_and_close(group: Any, config: Config, times: int) -> int:
    """Objects one after another; the threads that are left."""
    before = threading.active_count()
    for _ in range(times):
        with AllToAll(group, config) as a2a:
            ids = torch.zeros(1, config.num_topk, dtype=torch.int32) + torch.arange(config.num_topk, dtype=torch.int32)
            x = torch.ones(1, config.hidden, dtype=torch.bfloat16)
            recv = a2a.dispatch(x, ids, torch.ones(1, config.num_topk))
            out = a2a.combine(recv.x.clone(), recv)
            assert out.shape == x.shape
    return threading.active_count() - before


def construct(group: Any, config: Config) -> str:
    """The error that there is."""
    try:
        with AllToAll(group, config):
            return "none"
    except MoebiusError as error:
        return f"{type(error).__name__}: {error}"


def construct_without_a_way(group: Any, config: Config) -> str:
    """The same, where gloo is told an interface that does not exist."""
    before = os.environ["GLOO_SOCKET_IFNAME"]
    os.environ["GLOO_SOCKET_IFNAME"] = "nowhere0"
    try:
        return construct(group, config)
    finally:
        os.environ["GLOO_SOCKET_IFNAME"] = before


def environment() -> dict[str, str]:
    """For a process that starts anew."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def dropped(group: Any, config: Config) -> list[str]:
    """Objects that are not closed, only let go of; the threads that stay."""
    before = set(threading.enumerate())
    for _ in range(3):
        a2a = AllToAll(group, config)
        recv = a2a.dispatch(torch.ones(1, config.hidden).bfloat16(), torch.tensor([[0, 1]]), torch.ones(1, 2))
        a2a.combine(recv.x.clone(), recv)
        dist.barrier(group)
        del a2a, recv
        gc.collect()
    deadline = time.monotonic() + WAIT_S
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    return [thread.name for thread in left]


def beside_other_traffic(group: Any, config: Config) -> bool:
    """Rounds with collectives and messages of the user's own in the middle of each."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    ids = torch.arange(2 * size).view(size, 2)[:4].int()
    x = torch.full((len(ids), config.hidden), float(rank + 1), dtype=torch.bfloat16)
    right = True
    with AllToAll(group, config) as a2a:
        for _ in range(10):
            pending = a2a.dispatch_send(x, ids, torch.full((len(ids), 2), 0.5))
            total = torch.ones(1)
            dist.all_reduce(total, group=group)
            got = torch.zeros(1)
            sending = dist.isend(torch.tensor([float(rank)]), (rank + 1) % size, group=group)
            dist.recv(got, (rank - 1) % size, group=group)
            recv = pending.receive()
            home = a2a.combine_send(recv.x.clone(), recv)
            dist.barrier(group)
            right = right and torch.equal(home.receive(), x) and total.item() == size
            right = right and got.item() == (rank - 1) % size
            if sending is not None:
                sending.wait()
    return right
