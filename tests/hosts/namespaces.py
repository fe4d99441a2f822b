"""Hosts inside one machine: network namespaces with addresses of their own, joined by a bridge in one more."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import subprocess

from tests.helpers.launch import Place

INTERFACE = "eth0"
_numbers = itertools.count()


class Namespaces:
    """Some hosts on one wire, made and taken away as a context manager; nothing of it shows outside.

    Attributes:
        names: of the hosts' namespaces.
    """

    def __init__(self, num_hosts: int) -> None:
        prefix = f"moebius-{os.getpid()}-{next(_numbers)}"
        self.names = [f"{prefix}-{host}" for host in range(num_hosts)]
        self._switch = f"{prefix}-switch"

    def __enter__(self) -> Namespaces:
        try:
            ip("netns", "add", self._switch)
            ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self._switch, "link", "set", "bridge", "up")
            for host, name in enumerate(self.names):
                ip("netns", "add", name)
                ip("-n", self._switch, "link", "add", f"port{host}", "type", "veth", "peer", INTERFACE, "netns", name)
                ip("-n", self._switch, "link", "set", f"port{host}", "master", "bridge", "up")
                ip("-n", name, "address", "add", f"{self.address(host)}/24", "dev", INTERFACE)
                ip("-n", name, "link", "set", INTERFACE, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.names, self._switch):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", name)

    def address(self, host: int) -> str:
        """Of a host, on the wire."""
        return f"10.77.0.{host + 1}"

    def places(self, *hosts: int) -> list[Place]:
        """One for each rank, from the number of its host."""
        return [Place(INTERFACE, self.names[host]) for host in hosts]

    def cut_off(self, host: int) -> None:
        """Pull the plug at the switch: nothing tells the sockets of either side."""
        ip("-n", self._switch, "link", "set", f"port{host}", "down")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@functools.cache
def why_not() -> str | None:
    """Why namespaces cannot be made here; None where they can."""
    if shutil.which("ip") is None:
        return "the command `ip` (iproute2) is missing"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    try:
        with Namespaces(2):
            return None
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or error
        return f"network namespaces are not allowed here: {str(told).strip()}"
