"""The symmetric heap in device memory: a rank's own, and its peers' as this device addresses them."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING, Any

from moebius.group import VirtualRank

if TYPE_CHECKING:
    from collections.abc import Callable

    from moebius.heap import Group

    from .engine import Machine


@dataclasses.dataclass
class SymmetricMemory:
    """The heaps of all ranks.

    Attributes:
        rank: this rank.
        addresses: [R] of each rank's heap, on this rank's device.
        num_bytes: of one heap.
        owned: what frees the memory when it is forgotten.
        how: "virtual", or how memory travels between processes: "vmm", "ipc" or "fabric".
    """

    rank: int
    addresses: list[int]
    num_bytes: int
    how: str
    owned: Any = None
    _free: Any = None

    def free_with(self, free: Callable[[], None]) -> None:
        """Call `free` once, when this is closed or forgotten; not at the end of the process, which frees all."""
        self._free = weakref.finalize(self, free)
        self._free.atexit = False

    def close(self) -> None:
        """Let go of it; the kernels that use it have ended. May be repeated."""
        self.owned = None
        if self._free is not None:
            self._free()


def allocate(group: Group, rank: int, num_bytes: int, fingerprint: str, machine: Machine) -> SymmetricMemory:
    """Make a heap of `num_bytes` on every rank's device and map them all.

    Collective over a process group. Virtual ranks share one device and what the first of them makes.

    Args:
        group: the ranks.
        rank: this one.
        num_bytes: size of each rank's heap.
        fingerprint: what all ranks must agree on, in words.
        machine: whose memory it is.

    Raises:
        ConfigError: the ranks' fingerprints differ, or virtual ranks are on several devices.
        PeerAccessError: a rank's memory cannot be mapped here; raised on every rank.
        CudaError: there is not enough memory.
    """
    if isinstance(group, VirtualRank):

        def make() -> list[Any]:
            return [machine.native.Memory(machine.ordinal, num_bytes) for _ in range(group.size)]

        heaps = group.share(f"{fingerprint} on {machine.device}", make)
        return SymmetricMemory(rank, [heap.address for heap in heaps], num_bytes, "virtual", heaps)
    from .peers import allocate_processes

    return allocate_processes(group, rank, num_bytes, fingerprint, machine)
