"""The connection to one rank on another host: a thread that sends, a thread that receives, over a group of two.

A group of its own for every pair of ranks, because gloo closes all connections of a group when one wait in it runs out
of time. That is also the one way to end a wait that nobody will answer, and so `Link.cut` does it on purpose.
"""

from __future__ import annotations

import collections
import contextlib
import datetime as dt
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from moebius.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

log = logging.getLogger("moebius")

_HEADER, _DATA, _NEVER = 0, 1, 2  # tags
_FOREVER = dt.timedelta(days=3650)  # the engine has the deadlines; a thread that receives has none
_AT_ONCE = dt.timedelta(milliseconds=1)
_HEADER_WORDS = 5
_MESSAGE, _BYE, _BYE_HEARD = 0, 1, 2  # kinds
_END_S = 5.0  # for threads whose connection is cut: they wake at once


class Message(NamedTuple):
    """One put as it travels, behind its data's length.

    Attributes:
        offset: in the destination's heap.
        data: [bytes] uint8.
        signal: offset of the signal word, or NO_SIGNAL.
        word: to publish there, unsigned.
    """

    offset: int
    data: Tensor
    signal: int
    word: int


class Link:
    """One end of the connection of two ranks. Nothing but `close` waits for the other end."""

    def __init__(
        self,
        group: dist.ProcessGroupGloo,
        peer: int,
        most_bytes: int,
        deliver: Callable[[int, int, memoryview, int, int], bool],
    ) -> None:
        """Start the threads.

        Args:
            group: of these two ranks only; nobody else uses it.
            peer: the other rank, by its number in the engine.
            most_bytes: no message may be longer.
            deliver: called with (peer, offset, data, signal, word) as messages come; False if that is not allowed.
        """
        self.peer = peer
        self._group: Any = group  # its stub has no point-to-point calls
        self._other = 1 - group.rank()
        self._most_bytes, self._deliver = most_bytes, deliver
        self._waiting: collections.deque[tuple[int, Message | None]] = collections.deque()
        self._changed = threading.Condition()
        self._delivering = threading.Lock()
        self._is_closed = False  # here: what comes is not delivered any more
        self._is_given_up = False  # the engine does not send there any more, and closing does not wait
        self._is_broken = False  # the connection is gone
        self._was_heard = False  # the other end has all that was sent before the goodbye
        # Daemons, for a program may end without closing; `network` then closes while threads still run.
        self._threads = [
            threading.Thread(target=self._run, args=(work,), daemon=True, name=f"moebius-{name}-{peer}")
            for name, work in (("send", self._send), ("receive", self._receive))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_broken(self) -> bool:
        """Whether the connection is gone: cut, or lost because the other end has closed or died."""
        return self._is_broken

    def put(self, message: Message) -> None:
        """Send it, after what was put before; its data must not change any more."""
        self._enqueue(_MESSAGE, message)

    def give_up(self, is_given_up: bool) -> None:
        """Forget what has not begun to leave, for the other end does not listen; or take it back."""
        with self._changed:
            self._is_given_up = is_given_up
            if is_given_up:
                self._waiting.clear()

    def say_goodbye(self) -> None:
        """Deliver nothing more here, and ask the other end to tell when it has all that was put."""
        with self._delivering:
            self._is_closed = True
        self._enqueue(_BYE, None)

    def wait_until_heard(self, deadline: float) -> bool:
        """Whether the other end said so before `deadline` (of `time.monotonic`); not waiting where it is given up."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._was_heard or self._is_broken or self._is_given_up, max(0.0, deadline - time.monotonic())
            )
            return self._was_heard

    def cut(self) -> None:
        """Close the connection, whatever the other end does, and wait for the threads to end."""
        with self._changed:
            self._is_closed = self._is_broken = True
            self._changed.notify_all()
        with contextlib.suppress(RuntimeError):  # which is the purpose: the wait runs out of time
            self._group.recv([torch.empty(1)], self._other, _NEVER).wait(_AT_ONCE)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_END_S)

    def _enqueue(self, kind: int, message: Message | None) -> None:
        with self._changed:
            if not self._is_broken:
                self._waiting.append((kind, message))
                self._changed.notify_all()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except ProtocolError as error:
            log.error("rank %d: %s; the connection is cut", self.peer, error)
            self.cut()
        except RuntimeError as error:
            # The deadline of whoever waits for that rank will name it, if anybody waits.
            log.debug("rank %d: the connection is gone: %s", self.peer, error)
        finally:
            with self._changed:
                self._is_broken = True
                self._waiting.clear()
                self._changed.notify_all()

    def _send(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_broken)
                if self._is_broken:
                    return
                kind, message = self._waiting.popleft()
            header = torch.zeros(_HEADER_WORDS, dtype=torch.int64)
            header[0] = kind
            if message is not None:
                header[1], header[2], header[3] = message.offset, message.data.numel(), message.signal
                header[4] = message.word - (1 << 64) if message.word >> 63 else message.word
            self._group.send([header], self._other, _HEADER).wait(_FOREVER)
            if message is not None and message.data.numel():
                self._group.send([message.data], self._other, _DATA).wait(_FOREVER)

    def _receive(self) -> None:
        header, room = torch.zeros(_HEADER_WORDS, dtype=torch.int64), bytearray()
        while True:
            self._group.recv([header], self._other, _HEADER).wait(_FOREVER)
            kind, offset, num_bytes, signal, word = header.tolist()
            if kind == _BYE:
                self._enqueue(_BYE_HEARD, None)
                continue
            if kind == _BYE_HEARD:
                with self._changed:
                    self._was_heard = True
                    self._changed.notify_all()
                continue
            if not 0 <= num_bytes <= self._most_bytes:
                raise ProtocolError(f"a message of {num_bytes} bytes came, of at most {self._most_bytes}")
            if num_bytes > len(room):
                room = bytearray(num_bytes)
            if num_bytes:
                into = torch.frombuffer(room, dtype=torch.uint8, count=num_bytes)
                self._group.recv([into], self._other, _DATA).wait(_FOREVER)
            with self._delivering:
                if self._is_closed:
                    continue
                taken = self._deliver(self.peer, offset, memoryview(room)[:num_bytes], signal, word % (1 << 64))
            if not taken:
                raise ProtocolError(f"a message came for offset {offset}, signal {signal}, where it may not write")
