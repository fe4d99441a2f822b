"""How ranks reach each other: by memory that they map, or by NVSHMEM, which has the network, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moebius import heap, native
from moebius.errors import ConfigError, CudaError, MoebiusError, PeerAccessError
from moebius.group import VirtualRank
from moebius.wire import shape_of

from .engine import Machine
from .memory import SymmetricMemory
from .memory import allocate as allocate_direct

if TYPE_CHECKING:
    import torch

    from moebius.config import Config
    from moebius.heap import Group

TRANSPORTS = ("auto", "direct", "nvshmem")


def machine_for(group: Group, device: torch.device, transport: str) -> Machine:
    """What runs the kernels; for "nvshmem" collective.

    Raises:
        ConfigError: `transport` is none; and as `Machine.of_device` and `nvshmem.world.join`.
    """
    if transport not in TRANSPORTS:
        raise ConfigError(f"`transport` must be one of {', '.join(TRANSPORTS)} (got {transport!r})")
    if transport != "nvshmem":
        return Machine.of_device(device)
    from moebius.nvshmem.world import join

    return join(group, device).machine


def connect(group: Group, config: Config, machine: Machine, transport: str) -> tuple[Machine, SymmetricMemory]:
    """Make the heaps of all ranks; "auto" takes NVSHMEM where they cannot map each other's. Collective.

    Raises:
        PeerAccessError: neither way is there; says why.
    """
    from moebius.nvshmem.memory import allocate

    if transport == "nvshmem":
        return allocate(group, config, machine.device)
    rank, num_ranks = heap.rank_and_size(group)
    num_bytes = native.core().HeapLayout(shape_of(config, num_ranks)).total
    try:
        return machine, allocate_direct(group, rank, num_bytes, repr(config), machine)
    except PeerAccessError as caught:  # raised on every rank, so all go on alike
        if transport == "direct" or isinstance(group, VirtualRank):
            raise
        direct = caught
    try:
        return allocate(group, config, machine.device)
    except (ConfigError, CudaError):
        raise
    except MoebiusError as error:
        raise PeerAccessError(f"{direct}; nor by way of NVSHMEM: {error}") from error
