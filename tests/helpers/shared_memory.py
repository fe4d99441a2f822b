"""What a crash would leave in /dev/shm: segments that no living process has open or mapped."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

SHM = Path("/dev/shm")
SETTLE_S = 3.0  # for processes of others on this machine, which may be between creating a segment and mapping it


def orphans() -> set[str]:
    """Names in /dev/shm that nobody alive uses. Segments of others that are at work do not count."""
    names = {path.name for path in SHM.iterdir()}
    return names - used() if names else names


def used() -> set[str]:
    """Names in /dev/shm that some process has open or mapped."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for line in (process / "maps").read_text().splitlines():
                _, at, name = line.partition(f" {SHM}/")
                if at:
                    found.add(name)
        with contextlib.suppress(OSError):
            for entry in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    target = Path(os.readlink(entry))
                    if target.parent == SHM:
                        found.add(target.name)
    return found


def left_since(before: set[str]) -> set[str]:
    """Orphans that were none before, and stay."""
    deadline = time.monotonic() + SETTLE_S
    while (left := orphans() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left
