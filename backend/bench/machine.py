"""What a result depends on: the machine, the versions, the commit, the command. No host name, no user, no paths."""

from __future__ import annotations

import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

import torch

from moebius._version import __version__

from .ranks import num_cores


def is_busy(about: dict[str, Any]) -> bool:
    """Whether other work would disturb a measurement."""
    return bool(about["load_1min"] > about["cores"] / 2)


def machine() -> dict[str, object]:
    """CPU, memory and versions."""
    return {
        "cpu": _cpu_model(),
        "cores": num_cores(),
        "load_1min": round(os.getloadavg()[0], 2),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "moebius": __version__,
    }


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "Hardware"):
            return value.strip()
    return platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def commit() -> str | None:
    """The commit of the source tree this file belongs to, `+` when it has changes; None where there is none."""
    here = pathlib.Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(
                ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return run.stdout.strip()

    # Installed into someone's repository, the package is not part of it.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    revision = git("rev-parse", "--short=12", "HEAD")
    return revision and revision + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def command() -> str:
    """The command as it can be typed again; of an absolute path, its last part."""
    words = [pathlib.PurePath(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", "moebius", *words])


def provenance() -> dict[str, Any]:
    """All of it, for a result file."""
    return {"machine": machine(), "commit": commit(), "command": command()}
