"""What a rank in a process of its own does on a GPU; imported by name there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from moebius import AllToAll, Config, PeerTimeoutError, native
from moebius.cuda.engine import CudaEngine, Machine
from moebius.cuda.peers import allocate_processes
from moebius.heap import rank_and_size
from moebius.wire import shape_of
from tests.helpers.rounds import Halves, Result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moebius import engines
    from tests.helpers.rounds import RankRound


def device_of(rank: int) -> torch.device:
    """GPUs in turn; with fewer than ranks, several on one."""
    return torch.device("cuda", rank % torch.cuda.device_count())


class Shared(AllToAll):
    """`AllToAll` whose memory travels in one given way."""

    how = ""

    @classmethod
    def by(cls, how: str) -> type[Shared]:
        return type("Shared", (cls,), {"how": how})

    def _make_engine(  # type: ignore[override]
        self, group: Any, config: Config, device: torch.device, num_sms: int | None, transport: str
    ) -> engines.Engine:
        machine = Machine.of_device(device)
        rank, num_ranks = rank_and_size(group)
        num_bytes = native.core().HeapLayout(shape_of(config, num_ranks)).total
        memory = allocate_processes(group, rank, num_bytes, repr(config), machine, (self.how,) if self.how else ())
        assert not self.how or memory.how == self.how
        return CudaEngine(config, machine, memory, num_sms or 0)


def rounds(group: Any, how: str, config: Config, given: Sequence[RankRound], times: int) -> Result:
    """Make, run the rounds, close; over and over."""
    rank, _ = rank_and_size(group)
    device = device_of(rank)
    torch.cuda.set_device(device)
    for _ in range(times):
        with Shared.by(how)(group, config, device, num_sms=8) as a2a:
            halves = Halves(a2a, given)
            for number in range(len(given)):
                halves.dispatch(number)
                halves.combine(number)
    return Result.of(halves)


def memory_after(group: Any, config: Config, times: int) -> tuple[int, int]:
    """Free bytes of the device after the first and after the last of several objects."""
    device = device_of(rank_and_size(group)[0])
    torch.cuda.set_device(device)
    free = []
    for _ in range(times):
        AllToAll(group, config, device).close()
        torch.cuda.empty_cache()
        # Ranks may share a device: what is free is measured when none of them has an object.
        torch.distributed.barrier(group)
        free.append(torch.cuda.mem_get_info(device)[0])
        torch.distributed.barrier(group)
    return free[1], free[-1]


def waits_in_vain(group: Any, config: Config, given: RankRound) -> dict[str, Any]:
    """Rank 1 makes the object and then no call; rank 0 tells whom it blames, and how long that took."""
    rank, _ = rank_and_size(group)
    device = device_of(rank)
    torch.cuda.set_device(device)
    a2a = AllToAll(group, config, device, num_sms=8)
    if rank == 1:
        time.sleep(6 * config.timeout_s)
        a2a.close()
        return {}
    halves = Halves(a2a, [given])
    begun = time.monotonic()
    try:
        halves.dispatch(0)
    except PeerTimeoutError as error:
        seconds = time.monotonic() - begun
        told = {"rank": error.rank, "op": error.op, "half": error.half, "seconds": seconds, "dead": a2a.dead_ranks}
        a2a.close()
        return told
    return {}
