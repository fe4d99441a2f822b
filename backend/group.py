"""Who the ranks are: a `torch.distributed` process group, or virtual ranks inside one process."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

from .errors import ConfigError


class VirtualWorld:
    """What the virtual ranks of one process share: the heaps they will exchange, in order of creation."""

    def __init__(self, size: int) -> None:
        """Make an empty world of `size` ranks."""
        self.size = size
        self._lock = threading.Lock()
        self._shared: dict[int, tuple[Any, list[Any]]] = {}

    def share(self, sequence: int, fingerprint: Any, make: Any) -> list[Any]:
        """What all ranks get for their `sequence`-th object; the first to ask makes it.

        Raises:
            ConfigError: this rank asks with another fingerprint than the first one did.
        """
        with self._lock:
            if sequence not in self._shared:
                self._shared[sequence] = (fingerprint, make())
            first, shared = self._shared[sequence]
        if first != fingerprint:
            raise ConfigError(f"ranks must agree on their config: expected {first!r} (got {fingerprint!r})")
        return shared


@dataclasses.dataclass(eq=False)
class VirtualRank:
    """One of several ranks that live in this process; takes the place of a process group.

    Attributes:
        rank: this rank.
        size: number of ranks.
    """

    world: VirtualWorld
    rank: int
    num_created: int = 0

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.world.size


def virtual_ranks(num_ranks: int) -> list[VirtualRank]:
    """Make `num_ranks` ranks that live in this process, to be used by one thread each or by one thread in turn.

    One thread can drive them all in hook mode: every send half before the first receive half.

    Raises:
        ConfigError: `num_ranks` is not an int of at least 1.
    """
    if not isinstance(num_ranks, int) or isinstance(num_ranks, bool) or num_ranks < 1:
        raise ConfigError(f"`num_ranks` must be an int of at least 1 (got {num_ranks!r})")
    world = VirtualWorld(num_ranks)
    return [VirtualRank(world, rank) for rank in range(num_ranks)]
