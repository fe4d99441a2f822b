"""Who the ranks are: a `torch.distributed` process group, or virtual ranks inside one process."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from .virtual_network import VirtualNetwork

MAX_RANKS = 4096  # arbitrary, a power of two: twice the largest expert-parallel group that was ever published


class VirtualWorld:
    """What the virtual ranks of one process share, in the order in which each of them asks."""

    def __init__(self, size: int, network: VirtualNetwork | None = None) -> None:
        """Make an empty world of `size` ranks, all on one host where there is no network."""
        self.size = size
        self.network = network
        self._lock = threading.Lock()
        self._asked = [0] * size
        self._shared: dict[int, tuple[str, Any, int]] = {}

    def share(self, rank: int, fingerprint: str, make: Callable[[], Any]) -> Any:
        """What all ranks get at their n-th call; the first to call makes it, the last lets go of it.

        Raises:
            ConfigError: this rank asks with another fingerprint than the first one did.
        """
        with self._lock:
            turn = self._asked[rank]
            if turn not in self._shared:
                self._shared[turn] = (fingerprint, make(), 0)
            first, shared, num_asked = self._shared[turn]
            if first != fingerprint:
                raise ConfigError(f"ranks must agree on their config: expected {first!r} (got {fingerprint!r})")
            self._asked[rank] += 1
            self._shared[turn] = (first, shared, num_asked + 1)
            if num_asked + 1 == self.size:
                del self._shared[turn]
            return shared


@dataclasses.dataclass(frozen=True, eq=False)
class VirtualRank:
    """One of several ranks that live in this process; takes the place of a process group.

    Attributes:
        world: what the ranks share.
        rank: this rank.
    """

    world: VirtualWorld
    rank: int

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.world.size

    def share(self, fingerprint: str, make: Callable[[], Any]) -> Any:
        """See `VirtualWorld.share`."""
        return self.world.share(self.rank, fingerprint, make)


def virtual_ranks(num_ranks: int, network: VirtualNetwork | None = None) -> list[VirtualRank]:
    """Make `num_ranks` ranks that live in this process, to be used by one thread each or by one thread in turn.

    One thread can drive them all in hook mode, every send half before the first receive half, as long as every round
    is combined: a dispatch that has to close one that was not waits for the other ranks to do the same.

    Args:
        num_ranks: how many.
        network: puts them on several virtual hosts, with an emulated network in between; CPU only.

    Raises:
        ConfigError: `num_ranks` is not an int of at least 1, or more than a process could ever hold.
    """
    if not isinstance(num_ranks, int) or isinstance(num_ranks, bool) or num_ranks < 1:
        raise ConfigError(f"`num_ranks` must be an int of at least 1 (got {num_ranks!r})")
    if num_ranks > MAX_RANKS:
        raise ConfigError(f"`num_ranks` must be at most {MAX_RANKS} (got {num_ranks})")
    world = VirtualWorld(num_ranks, network)
    return [VirtualRank(world, rank) for rank in range(num_ranks)]
