"""The state of the GPU that figures depend on, read and never set."""

from __future__ import annotations

import subprocess
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from .devices import Device

SECONDS_APART = 20.0
FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "most_sm_clock_mhz": "clocks.max.sm",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "state": "pstate",
    "used_mib": "memory.used",
}


def read_state(text: str, index: int) -> dict[str, str]:
    """What `nvidia-smi --query-gpu` printed for GPU `index`, by our names; {} for something else."""
    lines = [line for line in text.splitlines() if line.strip()]
    if index >= len(lines):
        return {}
    values = [value.strip() for value in lines[index].split(",")]
    return dict(zip(FIELDS, values, strict=True)) if len(values) == len(FIELDS) else {}


def state(index: int = 0) -> dict[str, str]:
    """Clocks, power and driver now; {} where nvidia-smi does not answer."""
    query = ["nvidia-smi", f"--query-gpu={','.join(FIELDS.values())}", "--format=csv,noheader,nounits"]
    try:
        ran = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return read_state(ran.stdout, index)


class Watch:
    """States of a GPU over a run, at most one every `SECONDS_APART`: asking takes its time."""

    def __init__(self, index: int, read: Callable[[int], dict[str, str]] = state) -> None:
        """Watch GPU `index`."""
        self._index, self._read, self._begin = index, read, monotonic()
        self.seen: list[dict[str, Any]] = []

    def look(self) -> None:
        """Note the state now, unless the last note is recent."""
        at = monotonic() - self._begin
        if not self.seen or at - self.seen[-1]["at_s"] >= SECONDS_APART:
            self.seen.append({"at_s": round(at, 1), **self._read(self._index)})


def describe(device: Device) -> dict[str, Any]:
    """What the device is, for a result file."""
    if not device.is_cuda:
        return {"name": "this processor, standing in for a GPU", "sms": device.num_sms, "torch_cuda": None}
    properties = torch.cuda.get_device_properties(device.where)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "sms": device.num_sms,
        "l2_bytes": device.l2_bytes,
        "memory_bytes": properties.total_memory,
        "torch_cuda": torch.version.cuda,
        "before": state(device.where.index or 0),
    }
