"""Open files between the processes of one host, over a socket without a name in the file system."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

TIMEOUT_S = 60.0  # of the whole exchange; the ranks have just met in a collective call


class FileServer:
    """Gives a file to peers. Use as a context manager; the socket ends with it.

    Attributes:
        address: to be told to the peers.
    """

    def __init__(self) -> None:
        """Listen, at an address that nobody can guess."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.address = b"\0moebius-%d-" % os.getpid() + secrets.token_hex(16).encode()
        self._listener.bind(self.address)
        self._listener.listen(128)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> FileServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # closing alone would not wake who accepts
        self._listener.close()
        if self._thread is not None:
            self._thread.join()

    def give(self, fd: int, num_peers: int) -> None:
        """Begin to hand `fd` to `num_peers` processes of this user, in the background."""
        self._thread = threading.Thread(target=self._serve, args=(fd, num_peers), daemon=True)
        self._thread.start()

    def _serve(self, fd: int, num_peers: int) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        num_given = 0
        while num_given < num_peers:
            try:
                self._listener.settimeout(max(0.01, deadline - time.monotonic()))
                peer, _ = self._listener.accept()
            except OSError:
                return  # closed, or the time is over: whoever waits for us finds that out by itself
            with peer:
                if _user_of(peer) != os.getuid():
                    continue
                try:
                    socket.send_fds(peer, [b"f"], [fd])
                except OSError:
                    continue
                num_given += 1


def fetch(address: bytes) -> int:
    """The file that the process behind `address` gives; the caller closes it.

    Raises:
        OSError: it gives none, or not in time.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.settimeout(TIMEOUT_S)
        server.connect(address)
        _, files, _, _ = socket.recv_fds(server, 1, 1)
    if not files:
        raise OSError("the peer closed its socket without giving its file")
    return files[0]


def _user_of(peer: socket.socket) -> int:
    """User id of the process at the other end."""
    fields = struct.Struct("3i")
    _, uid, _ = fields.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, fields.size))
    return int(uid)
