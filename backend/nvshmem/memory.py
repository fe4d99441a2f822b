"""The heap of an object over NVSHMEM: its size depends on who reaches whom."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moebius import heap, native
from moebius.wire import shape_of

from .world import join

if TYPE_CHECKING:
    import torch

    from moebius.config import Config
    from moebius.cuda.engine import Machine
    from moebius.cuda.memory import SymmetricMemory
    from moebius.heap import Group


def allocate(
    group: Group, config: Config, device: torch.device, remote: frozenset[int] = frozenset()
) -> tuple[Machine, SymmetricMemory]:
    """Make the heaps of a group, and what launches kernels over them. Collective; raises as `join` and its `allocate`.

    Args:
        group: the ranks.
        config: the shape of the traffic.
        device: of this rank.
        remote: ranks to be reached by way of the network although their memory is in reach; for tests, and the same
            choice of pairs on all ranks.
    """
    world = join(group, device)
    has_outbox = world.has_remote or bool(remote)
    shape = shape_of(config, heap.rank_and_size(group)[1], has_outbox=has_outbox)
    num_bytes = native.core().HeapLayout(shape).total
    # The outbox is the heap's end: ranks that have none agree with the others about all the rest.
    return world.machine, world.allocate(group, num_bytes, repr(config), remote)
