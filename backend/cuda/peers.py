"""Ranks in several processes: who they are, how their memory can travel, and the exchange of it."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from moebius import heap
from moebius.errors import ConfigError, CudaError, MoebiusError, PeerAccessError

from . import driver, files, shared
from .memory import SymmetricMemory

if TYPE_CHECKING:
    import torch.distributed as dist

    from .engine import Machine


class About(NamedTuple):
    """What a rank tells the others of itself before anything is made."""

    fingerprint: str
    host: str
    device: str  # as an error names it
    uuid: str
    ways: frozenset[str]
    address: bytes
    error: str


class Offer(NamedTuple):
    """What a rank's memory is mapped by."""

    num_bytes: int
    content: bytes
    error: str


def allocate_processes(
    group: dist.ProcessGroup, rank: int, num_bytes: int, fingerprint: str, machine: Machine, ways: tuple[str, ...] = ()
) -> SymmetricMemory:
    """See `memory.allocate`; `ways` are those to try, in order, instead of all that every rank has."""
    with torch.cuda.device(machine.device), files.FileServer() as server:
        torch.empty(1, device=machine.device)  # makes the context that the driver's calls need
        about = heap.gather(group, _about(rank, fingerprint, machine, server.address))
        _check_all(about)
        errors = []
        for how in ways or possible_ways(about):
            mapped, error = _exchange(group, rank, num_bytes, how, about, server, machine)
            if not error:
                memory = SymmetricMemory(rank, [one.address for one in mapped], num_bytes, how)
                memory.free_with(functools.partial(_close, mapped, machine))
                return memory
            errors.append(error)
    raise PeerAccessError("; ".join(errors))


def possible_ways(about: list[About]) -> list[str]:
    """What every rank can do, the best first.

    Raises:
        PeerAccessError: nothing; names two ranks.
    """
    common = frozenset.intersection(*(one.ways for one in about))
    other = next((rank for rank, one in enumerate(about) if one.host != about[0].host), None)
    if other is None:
        return [how for how in ("vmm", "ipc") if how in common]
    if "fabric" in common:
        return ["fabric"]
    raise PeerAccessError(
        f"ranks 0 ({about[0].device}) and {other} ({about[other].device}) are on different hosts, and not every GPU "
        "can share its memory over an NVLink fabric: put the ranks on one host, or on hosts of one NVLink domain (with "
        "an IMEX channel)"
    )


def _about(rank: int, fingerprint: str, machine: Machine, address: bytes) -> About:
    properties = torch.cuda.get_device_properties(machine.device)
    device, uuid = f"{machine.device}, {properties.name}", str(getattr(properties, "uuid", ""))
    ways, error = frozenset[str](), ""
    try:
        ways = frozenset(shared.ways(machine.ordinal))
    except (MoebiusError, RuntimeError) as caught:
        error = f"rank {rank} ({device}) cannot share memory: {caught}"
    # What two processes must share to pass files: the kernel, and the names of sockets.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    host = f"{os.uname().nodename} {boot} {Path('/proc/self/ns/net').readlink()}"
    return About(fingerprint, host, device, uuid, ways, address, error)


def _check_all(about: list[About]) -> None:
    for peer, theirs in enumerate(about):
        if theirs.fingerprint != about[0].fingerprint:
            raise ConfigError(
                f"ranks must agree on their config: expected {about[0].fingerprint} as on rank 0 "
                f"(rank {peer} got {theirs.fingerprint})"
            )
    errors = [theirs.error for theirs in about if theirs.error]
    if errors:
        raise PeerAccessError(errors[0])


def _exchange(
    group: dist.ProcessGroup,
    rank: int,
    num_bytes: int,
    how: str,
    about: list[About],
    server: files.FileServer,
    machine: Machine,
) -> tuple[list[shared.Mapped], str]:
    """Try one way. Every rank takes the same steps whatever fails where; one rank's failure is everybody's."""
    made, error = None, ""
    try:
        made = shared.make(how, machine.ordinal, num_bytes)
    except (CudaError, RuntimeError) as caught:
        error = f"rank {rank} ({about[rank].device}) cannot make {num_bytes} bytes of memory to share ({how}): {caught}"
    offer = Offer(num_bytes, made.content if made else b"", error)
    offers = heap.gather(group, offer)
    mapped: list[shared.Mapped] = []
    error = next((theirs.error for theirs in offers if theirs.error), "")
    if made is not None and not error:
        if made.fd >= 0:
            server.give(made.fd, len(about) - 1)
        for peer, theirs in enumerate(about):
            if peer == rank:
                mapped.append(made.mapped)
                continue
            try:
                mapped.append(_open(how, num_bytes, offers[peer], theirs, machine))
            except (CudaError, OSError, RuntimeError) as caught:
                error = _cannot_reach(rank, peer, how, about, machine, str(caught))
                break
    # Collective: nothing may be closed before all have mapped it.
    errors = [told for told in heap.gather(group, error) if told]
    if made is not None:
        made.close_fd()
    if errors:
        _close(mapped or ([made.mapped] if made is not None else []), machine)
        return [], errors[0]
    return mapped, ""


def _open(how: str, num_bytes: int, offer: Offer, theirs: About, machine: Machine) -> shared.Mapped:
    fd = files.fetch(theirs.address) if how == "vmm" else -1
    try:
        return shared.open_peer(how, machine.ordinal, num_bytes, offer.content, fd)
    finally:
        if fd >= 0:
            os.close(fd)


def _cannot_reach(rank: int, peer: int, how: str, about: list[About], machine: Machine, why: str) -> str:
    ranks = f"rank {rank} ({about[rank].device}) cannot map the memory of rank {peer} ({about[peer].device})"
    text = f"{ranks} by {how}: {why}"
    for other in range(torch.cuda.device_count()):
        if str(getattr(torch.cuda.get_device_properties(other), "uuid", "")) != about[peer].uuid:
            continue
        if other != machine.ordinal and not driver.call("cuDeviceCanAccessPeer", machine.ordinal, other):
            return (
                f"{text}; the two GPUs have no peer access (`nvidia-smi topo -p2p rw` shows who has): choose GPUs that "
                "have it with CUDA_VISIBLE_DEVICES"
            )
    return f"{text}; in containers, ranks need one IPC and network namespace and the same devices"


def _close(mapped: list[shared.Mapped], machine: Machine) -> None:
    with torch.cuda.device(machine.device):
        torch.cuda.synchronize()  # unmapping waits for nothing
        for one in mapped:
            one.close()
