"""`python -m moebius doctor`: what runs here, what does not, and why."""

from __future__ import annotations

import ctypes
import itertools
import os
import pathlib
import tempfile
from typing import Any

import torch

from moebius import native
from moebius.cuda import shared
from moebius.errors import MoebiusError

from .console import out, size
from .machine import is_busy, machine

SHARED_MEMORY = pathlib.Path("/dev/shm")
LOW_SHARED_MEMORY = 16 << 20  # what the bound's buffers of the default shapes take; Docker gives 64 MiB
_INSIDE = "  "


def examine() -> dict[str, Any]:
    """Look at everything; raises nothing.

    Returns:
        machine, engines (each with `works`, and `why` where it does not), nvshmem (likewise), memory, warnings, works.
    """
    engines = {"cpu": _cpu_engine(), "cuda": _cuda_engine()}
    memory = {"dev_shm": _shared_memory(), "memfd": _memfd()}
    works = any(engine["works"] for engine in engines.values())
    found = {"kind": "doctor", "machine": machine(), "engines": engines, "memory": memory, "works": works}
    found["nvshmem"] = _nvshmem()
    return {**found, "warnings": _warnings(found)}


def _cpu_engine() -> dict[str, Any]:
    try:
        core: Any = native.core()
        levels = list(core.simd_levels())
        return {"works": True, "simd": native.simd_level(), "simd_available": levels}
    except MoebiusError as error:
        return {"works": False, "why": str(error)}


def _cuda_engine() -> dict[str, Any]:
    reasons = []
    try:
        native.cuda().num_devices()
    except MoebiusError as error:
        reasons.append(str(error))
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        reasons.append(f"torch {torch.__version__} is built without CUDA")
    found: dict[str, Any] = {"works": not reasons, "why": "; ".join(reasons), "driver": _driver(), "devices": []}
    if not reasons:
        found["devices"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        found["strangers"] = _strangers()
        found["between_processes"] = _between_processes()
    return found


def _nvshmem() -> dict[str, Any]:
    """The way to GPUs of other hosts. Loads the library, and calls nothing of it that needs a GPU."""
    found: dict[str, Any] = {"works": False, "why": "", "version": None}
    try:
        extension = native.nvshmem()
        found["version"] = ".".join(map(str, extension.version_loaded()))
        extension.num_devices()
    except MoebiusError as error:
        return {**found, "why": str(error)}
    return {**found, "works": True}


def _strangers() -> list[tuple[int, int]]:
    """Pairs of GPUs that cannot address each other's memory."""
    pairs = itertools.combinations(range(torch.cuda.device_count()), 2)
    return [(one, other) for one, other in pairs if not torch.cuda.can_device_access_peer(one, other)]


def _between_processes() -> dict[str, Any]:
    """How the memory of the first GPU can travel to another process."""
    try:
        return {"works": True, "ways": sorted(shared.ways(0))}
    except (MoebiusError, RuntimeError) as error:
        return {"works": False, "why": str(error)}


def _driver() -> str | None:
    """Version of CUDA that the driver speaks; asks without making a context."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _shared_memory() -> dict[str, Any]:
    try:
        with tempfile.NamedTemporaryFile(dir=SHARED_MEMORY):
            room = os.statvfs(SHARED_MEMORY)
    except OSError as error:
        return {"works": False, "why": str(error)}
    return {"works": True, "free_bytes": room.f_bavail * room.f_frsize}


def _memfd() -> dict[str, Any]:
    if not hasattr(os, "memfd_create"):
        return {"works": False, "why": "this system has no memfd_create"}
    try:
        os.close(os.memfd_create("moebius"))
    except OSError as error:
        return {"works": False, "why": str(error)}
    return {"works": True}


def _warnings(found: dict[str, Any]) -> list[str]:
    warnings = []
    about, memory = found["machine"], found["memory"]
    if about["cores"] < 2:
        warnings.append("one core: two ranks take turns on it, so latencies will be those of the scheduler")
    if is_busy(about):
        warnings.append(f"the machine is busy (load {about['load_1min']}): do not trust its latencies")
    if not memory["memfd"]["works"]:
        warnings.append("no memfd_create: ranks in several processes cannot share memory, virtual ranks can")
    if memory["dev_shm"].get("free_bytes", LOW_SHARED_MEMORY) < LOW_SHARED_MEMORY:
        free = size(memory["dev_shm"]["free_bytes"])
        warnings.append(f"/dev/shm has only {free} left for the buffers of `demo` and `bench` (in Docker: --shm-size)")
    simd = found["engines"]["cpu"].get("simd")
    if simd == "scalar":
        warnings.append("the CPU engine runs without SIMD: several times slower")
    cuda = found["engines"]["cuda"]
    for one, other in cuda.get("strangers", []):
        warnings.append(
            f"GPUs {one} and {other} have no peer access (`nvidia-smi topo -p2p rw`): their ranks cannot reach each "
            "other's memory; choose others with CUDA_VISIBLE_DEVICES"
        )
    if not cuda.get("between_processes", {"works": True})["works"]:
        warnings.append(
            f"virtual ranks run on CUDA, ranks in several processes do not: {cuda['between_processes']['why']}"
        )
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        warnings.append("this torch has no gloo: no ranks in several processes from the command line")
    return warnings


def print_findings(found: dict[str, Any]) -> None:
    """The findings as text."""
    about, memory = found["machine"], found["memory"]
    out(f"moebius {about['moebius']}, torch {about['torch']}, Python {about['python']}")
    ram = f", {size(about['memory_bytes'])} memory" if about["memory_bytes"] else ""
    out(f"{about['cpu']}, {about['cores']} cores{ram}, {about['system']}")
    out()
    out("Engines")
    for name, engine in found["engines"].items():
        if not engine["works"]:
            out(f"{_INSIDE}{name:<6} not here: {engine['why']}")
        elif name == "cpu":
            out(f"{_INSIDE}{name:<6} works, SIMD {engine['simd']} (available: {', '.join(engine['simd_available'])})")
        else:
            out(f"{_INSIDE}{name:<6} works, driver for CUDA {engine['driver']}")
            for index, device in enumerate(engine["devices"]):
                out(f"{_INSIDE}{'':<6} cuda:{index} {device}")
            if engine["between_processes"]["works"]:
                ways = ", ".join(engine["between_processes"]["ways"])
                out(f"{_INSIDE}{'':<6} memory between processes by {ways}")
    network = found["nvshmem"]
    version = f" {network['version']}" if network["version"] else ""
    state = "works" if network["works"] else f"not here: {network['why']}"
    out()
    out("Between hosts")
    out(f"{_INSIDE}NVSHMEM{version}, for cuda: {state}")
    out()
    out("Memory between processes")
    free = memory["dev_shm"].get("free_bytes")
    for name, one in (("memfd", memory["memfd"]), ("/dev/shm", memory["dev_shm"])):
        state = "works" if one["works"] else f"not here: {one['why']}"
        out(f"{_INSIDE}{name:<9} {state}" + (f", {size(free)} free" if name == "/dev/shm" and free is not None else ""))
    if found["warnings"]:
        out()
        out("Warnings")
        for warning in found["warnings"]:
            out(f"{_INSIDE}- {warning}")
    out()
    out("Ready: python -m moebius demo" if found["works"] else "No engine works here.")
