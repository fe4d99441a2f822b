"""The symmetric heap: one segment a rank, mapped by all. Anonymous memory, so nothing can be left behind."""

from __future__ import annotations

import dataclasses
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist

from . import native
from .errors import ConfigError, PeerAccessError
from .group import VirtualRank

if TYPE_CHECKING:
    from . import _core

    Group = VirtualRank | dist.ProcessGroup


@dataclasses.dataclass
class SymmetricHeap:
    """This rank's segment and its peers'.

    Attributes:
        rank: this rank.
        segments: [R] the heap of every rank, mapped here; None for a rank on another host.
        pids: [R] process of every rank; 0 for one that lives in this process or on another host.
        num_cores: processor cores that the ranks may run on, all together.
        network: the way to the ranks on other hosts; None where there are none.
    """

    rank: int
    segments: list[_core.Segment | None]
    pids: list[int]
    num_cores: int
    network: _core.Network | None = None

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return len(self.segments)


def rank_and_size(group: Group) -> tuple[int, int]:
    """This rank and the number of ranks of a group.

    Raises:
        ConfigError: `group` is neither a process group that this rank belongs to nor a virtual rank.
    """
    if isinstance(group, VirtualRank):
        return group.rank, group.size
    if not isinstance(group, dist.ProcessGroup):
        raise ConfigError(
            f"`group` must be a torch.distributed process group or a rank of moebius.virtual_ranks (got {group!r})"
        )
    return dist.get_rank(group), dist.get_world_size(group)


def hosts(group: Group) -> tuple[int, ...]:
    """The host of every rank, by number; ranks of one host map each other's memory."""
    if isinstance(group, VirtualRank) and group.world.network is not None:
        return group.world.network.hosts(group.size)
    return (0,) * rank_and_size(group)[1]


def allocate(group: Group, layout: _core.HeapLayout, fingerprint: str) -> SymmetricHeap:
    """Make a heap of the layout's size on every rank of the group, and map those of this rank's host.

    Collective over a process group. Virtual ranks share what the first of them makes.

    Args:
        group: the ranks.
        layout: of every heap; with an outbox if the ranks are on several hosts.
        fingerprint: what all ranks must agree on, in words.

    Raises:
        ConfigError: the ranks' fingerprints differ.
        PeerAccessError: a rank's memory cannot be mapped here; raised on every rank.
    """
    if isinstance(group, VirtualRank):
        return _allocate_virtual(group, layout, fingerprint)
    return _allocate_processes(group, layout.total, fingerprint)


def _allocate_virtual(group: VirtualRank, layout: _core.HeapLayout, fingerprint: str) -> SymmetricHeap:
    segment = native.core().Segment
    host_of = hosts(group)

    def make() -> tuple[list[_core.Segment], _core.EmulatedNetwork | None]:
        segments = [segment.create(layout.total) for _ in range(group.size)]
        for made in segments:
            made.close_fd()
        network = group.world.network
        is_needed = network is not None and len(set(host_of)) > 1
        return segments, network.connect(layout, segments) if is_needed and network is not None else None

    segments, network = group.share(fingerprint, make)
    mapped = [made if host_of[peer] == host_of[group.rank] else None for peer, made in enumerate(segments)]
    way_out = None if network is None else network.way_out(group.rank)
    return SymmetricHeap(group.rank, mapped, [0] * group.size, len(os.sched_getaffinity(0)), way_out)


def _host() -> str:
    """What two processes must share to open each other's memory: the kernel and the PID namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{platform.node()} {boot} {Path('/proc/self/ns/pid').readlink()}"


class _About(NamedTuple):
    """What a rank tells the others about its segment."""

    fingerprint: str
    host: str
    pid: int
    fd: int
    cores: frozenset[int]
    error: str


def _allocate_processes(group: dist.ProcessGroup, num_bytes: int, fingerprint: str) -> SymmetricHeap:
    segment_type = native.core().Segment
    rank, _ = rank_and_size(group)
    mine, error = None, ""
    try:
        mine = segment_type.create(num_bytes)
    except OSError as caught:
        error = f"rank {rank} cannot allocate {num_bytes} bytes of shared memory: {caught}"
    cores = frozenset(os.sched_getaffinity(0))
    about = gather(group, _About(fingerprint, _host(), os.getpid(), mine.fd if mine else -1, cores, error))
    for peer, theirs in enumerate(about):
        if theirs.fingerprint != about[0].fingerprint:
            raise ConfigError(
                f"ranks must agree on their config: expected {about[0].fingerprint} as on rank 0 "
                f"(rank {peer} got {theirs.fingerprint})"
            )

    segments: list[_core.Segment | None] = []
    error = next((theirs.error for theirs in about if theirs.error), "")
    for peer, theirs in enumerate(about):
        if error:
            break
        if peer == rank and mine is not None:
            segments.append(mine)
        elif theirs.host != about[rank].host:
            error = f"ranks {rank} and {peer} do not share a host and a PID namespace, which the CPU engine needs"
        else:
            try:
                segments.append(segment_type.attach(theirs.pid, theirs.fd, num_bytes))
            except OSError as caught:
                error = f"rank {rank} cannot map the memory of rank {peer}: {caught}"
    # Collective: no segment may be closed before all have mapped it, and a failure is everybody's.
    errors = [told for told in gather(group, error) if told]
    if mine is not None:
        mine.close_fd()
    if errors:
        raise PeerAccessError(errors[0])
    pids = [0 if peer == rank else theirs.pid for peer, theirs in enumerate(about)]
    return SymmetricHeap(rank, segments, pids, len(frozenset().union(*(theirs.cores for theirs in about))))


def gather(group: dist.ProcessGroup, value: Any) -> list[Any]:
    """What every rank gives, by rank; collective."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
