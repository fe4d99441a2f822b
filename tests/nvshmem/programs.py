"""What a rank in a process of its own does over NVSHMEM; imported by name there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from moebius import AllToAll, Config, PeerTimeoutError
from moebius.cuda.engine import CudaEngine
from moebius.heap import rank_and_size
from moebius.nvshmem import world
from moebius.nvshmem.memory import allocate
from tests.helpers.rounds import Halves, Result, dispatch_arguments
from tests.kernels.programs import device_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moebius import engines
    from tests.helpers.rounds import RankRound


class AllRemote(AllToAll):
    """`AllToAll` whose ranks write to each other's memory by puts only, as if it were out of reach."""

    def _make_engine(  # type: ignore[override]
        self, group: Any, config: Config, device: torch.device, num_sms: int | None, transport: str
    ) -> engines.Engine:
        rank, num_ranks = rank_and_size(group)
        others = frozenset(range(num_ranks)) - {rank}
        machine, memory = allocate(group, config, device, others)
        return CudaEngine(config, machine, memory, num_sms or 0)


def make(group: Any, config: Config, by_puts: bool) -> AllToAll:
    device = device_of(rank_and_size(group)[0])
    torch.cuda.set_device(device)
    return (AllRemote if by_puts else AllToAll)(group, config, device, num_sms=8, transport="nvshmem")


def seen(a2a: AllToAll) -> dict[str, Any]:
    """How the ranks reach each other: for the report."""
    made = world._world
    assert made is not None
    engine: Any = a2a._engine
    return {
        "version": made.machine.native.version_loaded(),
        "direct": [address != 0 for address in engine._memory.addresses],
        "out_of_reach": made.has_remote,
        "remote_bytes": a2a.remote_bytes,
        "blocks": len(made._blocks),
    }


def rounds(
    group: Any, config: Config, given: Sequence[RankRound], by_puts: bool, times: int = 1
) -> tuple[Result, dict[str, Any]]:
    """Make, run the rounds, close; over and over. The last results, and what was seen."""
    for _ in range(times):
        with make(group, config, by_puts) as a2a:
            halves = Halves(a2a, given)
            for number in range(len(given)):
                halves.dispatch(number)
                halves.combine(number)
            a2a.synchronize()
            found = seen(a2a)
    return Result.of(halves), found


def replays(group: Any, config: Config, given: RankRound, times: int) -> list[bool]:
    """Whether replays of a captured round over puts, with eager ones in between, give what an eager one gave."""
    a2a = make(group, config, by_puts=True)
    arguments = dispatch_arguments(config, given.inputs, a2a.device)

    def step() -> torch.Tensor:
        recv = a2a.dispatch(**arguments)
        return a2a.combine(recv.x.to(a2a.wire.output_dtype), recv)

    eager = step()
    a2a.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        home = step()
    same = []
    for _ in range(times):
        home.zero_()
        graph.replay()
        again = step()
        a2a.synchronize()
        same += [torch.equal(home, eager), torch.equal(again, eager)]
    a2a.close()
    return same


def waits_in_vain(group: Any, config: Config, given: RankRound) -> dict[str, Any]:
    """Rank 1 makes the object and then no call; rank 0 tells whom it blames, and how long that took."""
    a2a = make(group, config, by_puts=True)
    if rank_and_size(group)[0] == 1:
        time.sleep(6 * config.timeout_s)
        a2a.close()
        return {}
    halves = Halves(a2a, [given])
    begun = time.monotonic()
    try:
        halves.dispatch(0)
    except PeerTimeoutError as error:
        return {"rank": error.rank, "seconds": time.monotonic() - begun, "dead": a2a.dead_ranks}
    return {}
