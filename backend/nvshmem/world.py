"""NVSHMEM's world: the ranks that meet in it, and the memory that they share. A process has one, once.

The library ends the process where it cannot go on, waits without a deadline, and frees memory only with all ranks
together. So nothing of it is called before every rank has said that it can be; memory is kept when an object is closed,
and used again, or freed, at the next collective call; and the end of the process waits for the others only so long.
"""

from __future__ import annotations

import atexit
import dataclasses
import datetime as dt
import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from moebius import heap, native
from moebius.cuda.engine import Machine
from moebius.cuda.memory import SymmetricMemory
from moebius.errors import ConfigError, MoebiusError, PeerAccessError, StateError, VersionError
from moebius.group import VirtualRank

if TYPE_CHECKING:
    from moebius.heap import Group

PROBE_BYTES = 4096  # of the memory that tells who is in reach: a page
FINALIZE_TIMEOUT_S = 10.0  # then the process ends without: a rank may have died


class Standing(NamedTuple):
    """What a rank tells the others before anything is begun."""

    members: tuple[int, ...]
    has_world: bool
    version: tuple[int, int, int]
    unique_id: bytes
    error: str


class Offer(NamedTuple):
    """What a rank wants, and which of its blocks nobody uses there."""

    fingerprint: str
    num_bytes: int
    free: frozenset[int]


@dataclasses.dataclass
class Block:
    """Memory of the symmetric heap; the same number is the same place on every rank.

    Attributes:
        number: blocks made before it, on any rank.
        address: here.
        num_bytes: its size.
        is_free: nobody uses it on this rank.
    """

    number: int
    address: int
    num_bytes: int
    is_free: bool = True


class World:
    """The ranks of one group, after NVSHMEM has been initialised among them.

    Attributes:
        members: the group's ranks, as `torch.distributed` numbers them all; their order is NVSHMEM's.
        machine: that launches the kernels, bound to NVSHMEM.
        has_remote: whether some rank has no way to another's memory but the network.
    """

    def __init__(self, group: Any, rank: int, members: tuple[int, ...], machine: Machine) -> None:
        """See who reaches whom; collective."""
        self.members = members
        self.machine = machine
        self._native = machine.native
        self._rank = rank
        self._num_made = 0
        self._blocks: list[Block] = []
        probe = self._make(PROBE_BYTES)
        reach = [peer == rank or self._native.peer(probe.address, peer) != 0 for peer in range(len(members))]
        is_lost = not all(reach) and not self._native.keeps_network_order()
        told = heap.gather(group, (all(reach), is_lost))
        self.has_remote = not all(reaches for reaches, _ in told)
        bad = next((peer for peer, (_, loses) in enumerate(told) if loses), None)
        if bad is not None:
            raise PeerAccessError(
                f"the GPU of rank {bad} does not keep the order of what the network writes (GPUDirect RDMA writes "
                "ordering), which the kernels need: use one whose driver does, sm_80 or later"
            )

    def allocate(self, group: Any, num_bytes: int, fingerprint: str, remote: frozenset[int]) -> SymmetricMemory:
        """A heap on every rank, all zero; collective.

        Args:
            group: the world's ranks.
            num_bytes: of each heap.
            fingerprint: what all ranks must agree on, in words.
            remote: ranks to be reached by way of the network although their memory is in reach; for tests.

        Raises:
            ConfigError: the ranks' fingerprints differ.
            PeerAccessError: some rank has not so much memory left.
        """
        # What was closed here may still run on other streams, or be on its way to a rank that gets other data next.
        torch.cuda.synchronize(self.machine.device)
        self._native.quiet()
        free = frozenset(block.number for block in self._blocks if block.is_free)
        offers = heap.gather(group, Offer(fingerprint, num_bytes, free))
        for peer, offer in enumerate(offers):
            if offer.fingerprint != offers[0].fingerprint:
                raise ConfigError(
                    f"ranks must agree on their config: expected {offers[0].fingerprint} as on rank 0 "
                    f"(rank {peer} got {offer.fingerprint})"
                )
        common = frozenset.intersection(*(offer.free for offer in offers))
        block, error = self._take(num_bytes, common), ""
        if block is None:
            try:
                block = self._make(num_bytes)
            except MoebiusError as caught:
                error = f"rank {self._rank} cannot allocate {num_bytes} bytes: {caught}"
        if block is not None:
            block.is_free = False
            self._native.zero(block.address, block.num_bytes)
        # Collective: nobody may write to memory that is not zeroed yet; a failure is everybody's.
        errors = [told for told in heap.gather(group, error) if told]
        if block is None or errors:
            if block is not None:
                block.is_free = True
            raise PeerAccessError(errors[0])
        found = block
        peers = range(len(self.members))
        addresses = [0 if peer in remote else self._native.peer(found.address, peer) for peer in peers]
        addresses[self._rank] = found.address

        def release() -> None:
            found.is_free = True

        return SymmetricMemory(self._rank, addresses, num_bytes, "nvshmem", self, release)

    def _take(self, num_bytes: int, common: frozenset[int]) -> Block | None:
        """The smallest block that fits and nobody uses; without one, those that nobody uses are freed. Collective."""
        unused = [block for block in self._blocks if block.number in common]
        fitting = [block for block in unused if block.num_bytes >= num_bytes]
        if fitting:
            return min(fitting, key=lambda block: (block.num_bytes, block.number))
        for block in unused:
            self._native.release(block.address)
            self._blocks.remove(block)
        return None

    def _make(self, num_bytes: int) -> Block:
        self._num_made += 1
        block = Block(self._num_made, self._native.allocate(num_bytes), num_bytes)
        self._blocks.append(block)
        return block


_world: World | None = None


def prepare(device: torch.device) -> Machine:
    """What runs the kernels over NVSHMEM on a device. Asks CUDA before it calls anything of NVSHMEM.

    Raises:
        NativeNotBuiltError: the extension, or NVSHMEM's host library, is missing.
        CudaError: there is no GPU or no driver; says which.
        ConfigError: there are GPUs, but not this one, or torch cannot use them.
        VersionError: the host library is older than what the extension was built against, or another generation.
    """
    extension = native.nvshmem()
    machine = Machine.of_device(device, extension)
    built, loaded = extension.version_built(), extension.version_loaded()
    if loaded < built or loaded[0] != built[0]:
        raise VersionError(
            f"moebius._nvshmem was built against NVSHMEM {_dotted(built)}, which needs this or a later {built[0]}.x at "
            f"run time (got {_dotted(loaded)}): install another nvidia-nvshmem-cu12/-cu13, or build again"
        )
    return machine


def join(group: Group, device: torch.device) -> World:
    """The world of this process, made by the first call. Collective; every rank fails if one does.

    Args:
        group: the ranks; the same at every call.
        device: of this rank; the same at every call.

    Raises:
        NativeNotBuiltError, CudaError, VersionError: see `prepare`.
        ConfigError: virtual ranks, or another group or device than the world was made for.
        PeerAccessError: another rank cannot; says which, and why.
    """
    global _world  # NVSHMEM has one in a process, too
    rank, num_ranks = heap.rank_and_size(group)
    if isinstance(group, VirtualRank):
        raise ConfigError("virtual ranks share a process, and NVSHMEM wants one for each rank: use a process group")
    members = tuple(dist.get_process_group_ranks(group))
    machine, version, unique_id, problem = None, (0, 0, 0), b"", None
    try:
        machine = prepare(device)
        version = machine.native.version_loaded()
        _check_is_the_same(members, device)
        if rank == 0 and _world is None:
            with torch.cuda.device(device):
                unique_id = machine.native.make_unique_id()
    except MoebiusError as caught:
        problem = caught
    mine = Standing(members, _world is not None, version, unique_id, str(problem) if problem else "")
    told = heap.gather(group, mine)
    if problem is not None:
        raise problem
    for peer, theirs in enumerate(told):
        if theirs.error:
            raise PeerAccessError(f"rank {peer} cannot use NVSHMEM: {theirs.error}")
        if theirs.version != told[0].version:
            raise VersionError(
                f"ranks must have the same NVSHMEM: rank 0 has {_dotted(told[0].version)} (rank {peer} got "
                f"{_dotted(theirs.version)}): install one nvidia-nvshmem on all of them"
            )
        if theirs.has_world != told[0].has_world:
            raise StateError(f"NVSHMEM runs on rank 0 or on rank {peer}, but not on both: start all processes anew")
    assert machine is not None
    if _world is None:
        with torch.cuda.device(device):
            torch.empty(1, device=device)  # makes the context that NVSHMEM takes
            machine.native.init(rank, num_ranks, told[0].unique_id)
            _world = World(group, rank, members, machine)
        _finalize_at_exit(machine, rank, num_ranks, told[0].unique_id)
    return _world


def _check_is_the_same(members: tuple[int, ...], device: torch.device) -> None:
    if _world is None:
        return
    if members != _world.members:
        raise ConfigError(
            f"`group` must be of ranks {_world.members}, in this order (got {members}): NVSHMEM was initialised among "
            "them, and a process can do that once; use transport='direct', or other processes, for other groups"
        )
    if device != _world.machine.device:
        raise ConfigError(f"`device` must be {_world.machine.device}, where NVSHMEM was initialised (got {device})")


def _finalize_at_exit(machine: Machine, rank: int, num_ranks: int, unique_id: bytes) -> None:
    """Let NVSHMEM end in order when all ranks end; it waits for them, and without one that died it would for ever."""
    try:
        store = dist.distributed_c10d._get_default_store()
    except (AttributeError, ValueError):
        return  # a group that torch did not make: the process ends without
    name = hashlib.sha256(unique_id).hexdigest()[:16]
    keys = [f"moebius-nvshmem-{name}-{peer}" for peer in range(num_ranks)]

    def end() -> None:
        try:
            store.set(keys[rank], "ends")
            store.wait(keys, dt.timedelta(seconds=FINALIZE_TIMEOUT_S))
        except (RuntimeError, ValueError):  # what torch raises, also once the store's host is gone
            return
        with torch.cuda.device(machine.device):
            machine.native.finalize()

    atexit.register(end)


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))
