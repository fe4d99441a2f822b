"""What the CPU engine of one rank sends by, to ranks on other hosts; and how those connections come about."""

from __future__ import annotations

import atexit
import ctypes
import datetime as dt
import functools
import os
import threading
import time
import uuid
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from moebius import heap, native
from moebius.errors import PeerAccessError

from .link import Link, Message

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moebius import _core

PrefixStore: Any = dist.distributed_c10d.PrefixStore
_CONNECT = dt.timedelta(seconds=60)
_MOST_GOODBYE_S = 5.0


def join(group: dist.ProcessGroup, own: heap.SymmetricHeap, layout: _core.HeapLayout, timeout_s: float) -> Any:
    """Connect this rank to its remote ones. Collective.

    Args:
        group: all ranks; used here only, so nothing that its user sends mixes with ours.
        own: this rank's heap; its remote ranks are those without a segment.
        layout: of every heap.
        timeout_s: deadline of the engine's waits, which bounds how long closing may take too.

    Returns:
        A `_core.Network` with a `close`.

    Raises:
        PeerAccessError: two ranks cannot reach each other; raised on every rank.
    """
    name = heap.gather(group, uuid.uuid4().hex)[0]
    groups: dict[int, dist.ProcessGroupGloo] = {}
    error = ""
    try:
        store = dist.distributed_c10d._get_default_store()
        groups = _pair_groups(own, PrefixStore(f"moebius/{name}", store))
    except RuntimeError as caught:
        error = f"rank {own.rank} cannot reach all ranks of other hosts: {caught}"
    errors = [told for told in heap.gather(group, error) if told]
    if errors:
        raise PeerAccessError(f"{errors[0]}; GLOO_SOCKET_IFNAME names the interface whose address the others can reach")
    segment = own.segments[own.rank]
    assert segment is not None  # the own heap is always mapped
    deliver = functools.partial(_deliver, layout, segment)
    links = {peer: Link(pair, peer, layout.total, deliver) for peer, pair in groups.items()}
    return _network(links, min(timeout_s, _MOST_GOODBYE_S))


def _pair_groups(own: heap.SymmetricHeap, store: Any) -> dict[int, dist.ProcessGroupGloo]:
    """A group of two for every remote rank; ascending, for then ranks cannot wait for one another in a ring."""
    groups: dict[int, dist.ProcessGroupGloo] = {}
    how: Any = _CONNECT
    for peer, segment in enumerate(own.segments):
        if segment is not None:
            continue
        low, high = sorted((own.rank, peer))
        place = 0 if own.rank == low else 1
        groups[peer] = dist.ProcessGroupGloo(PrefixStore(f"{low}-{high}", store), place, 2, how)
        how = groups[peer].options  # the same sockets' loop serves all pairs
    return groups


def _deliver(
    layout: _core.HeapLayout, segment: _core.Segment, src: int, offset: int, data: memoryview, signal: int, word: int
) -> bool:
    taken: bool = native.core().deliver(layout, segment, src, offset, data, signal, word)
    return taken


@functools.cache
def _network_type() -> type:
    """The class, made when the extension that its base is in is there."""

    class HostsNetwork(native.core().Network):  # type: ignore[misc]  # a base that is found at run time
        """See csrc/cpu/network.h. Messages are copied, so they have left the outbox when a put returns."""

        def __init__(self, links: dict[int, Link], goodbye_s: float) -> None:
            """Take the links over; they are closed after this object is gone, or when the program ends."""
            super().__init__()
            self._links = links
            self._open = OpenLinks(list(links.values()), goodbye_s)
            weakref.finalize(self, self._open.close_later).atexit = False

        def put_signal(self, dst: int, offset: int, data: int, num_bytes: int, signal: int, word: int) -> None:
            """The data, then the word."""
            self._links[dst].put(Message(offset, _copy_of(data, num_bytes), signal, word))

        def put(self, dst: int, offset: int, data: int, num_bytes: int) -> None:
            """The data alone."""
            self._links[dst].put(Message(offset, _copy_of(data, num_bytes), native.core().NO_SIGNAL, 0))

        def quiet(self, timeout_ns: int) -> int:
            """Nothing is still in the outbox."""
            del timeout_ns
            return -1

        def give_up(self, dst: int, is_given_up: bool) -> None:
            """See `Link.give_up`."""
            self._links[dst].give_up(is_given_up)

        def close(self) -> None:
            """Wait until the others have what was sent, within a limit, and disconnect. May be repeated."""
            self._open.close()

    return HostsNetwork


def _network(links: dict[int, Link], goodbye_s: float) -> Any:
    return _network_type()(links, goodbye_s)


def _copy_of(address: int, num_bytes: int) -> torch.Tensor:
    copy = torch.empty(num_bytes, dtype=torch.uint8)
    if num_bytes:
        ctypes.memmove(copy.data_ptr(), address, num_bytes)
    return copy


class OpenLinks:
    """Links to be closed once, by whoever is first: their user, the collector of garbage, the program's end."""

    def __init__(self, links: list[Link], goodbye_s: float) -> None:
        """Remember them."""
        self._links, self._goodbye_s = links, goodbye_s
        self._closing = threading.Lock()
        self._process = os.getpid()
        _open.add(self)

    def close(self) -> None:
        """Close them; a second caller waits for the first. A process that was forked since has them not to close."""
        if self._process != os.getpid():
            return
        with self._closing:
            if self in _open:
                close_links(self._links, self._goodbye_s)
                _open.discard(self)

    def close_later(self) -> None:
        """The same from a collection of garbage, which may run in any thread, in one of the links' own too."""
        threading.Thread(target=self.close, daemon=True, name="moebius-close").start()


_open: set[OpenLinks] = set()


@atexit.register
def close_all() -> None:
    """A thread that still waits in gloo when the interpreter ends would crash it."""
    for links in list(_open):
        links.close()


def close_links(links: Sequence[Link], goodbye_s: float) -> None:
    """Close them all, and wait for the slowest only."""
    deadline = time.monotonic() + goodbye_s
    for link in links:
        link.say_goodbye()
    for link in links:
        link.wait_until_heard(deadline)
    for link in links:
        link.cut()
