"""A profile of the hook form: which kernels run between a send half and its receive half.

The profiler's trace (Chrome's format) lists every kernel with its stream, begin and length. On the stream of a rank
whose halves have kernels of the caller's between them, none of ours may begin or still run after the send half is
over and before the caller's last kernel is.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import pathlib

    from .world import World

OURS = "moebius"  # the namespace, part of the name of each of our kernels
COMPUTE_SIZE, HOST_SIZE = 4096, 64
HOOK_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a trace, in microseconds."""

    name: str
    stream: int
    begin: float
    end: float

    @property
    def is_ours(self) -> bool:
        """Whether it is a half."""
        return OURS in self.name


@dataclasses.dataclass(frozen=True)
class Gap:
    """What one rank's stream ran between two halves.

    Attributes:
        stream: the rank's.
        before: the half that ended.
        after: the half that followed.
        idle_us: from one to the other.
        compute_us: of that, the caller's kernels.
        num_compute: how many they were.
        overlap_us: how long a half ran into the caller's kernels; 0 is what is promised.
    """

    stream: int
    before: str
    after: str
    idle_us: float
    compute_us: float
    num_compute: int
    overlap_us: float


def read_kernels(trace: dict[str, Any]) -> list[Kernel]:
    """The kernels of a Chrome trace, by begin."""
    found = [
        Kernel(
            event["name"], int(event["args"]["stream"]), float(event["ts"]), float(event["ts"]) + float(event["dur"])
        )
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") == "kernel"
    ]
    return sorted(found, key=lambda kernel: kernel.begin)


def hook_gaps(kernels: list[Kernel]) -> list[Gap]:
    """Every pair of our kernels with kernels of the caller's between them, stream by stream."""
    gaps = []
    for stream in sorted({kernel.stream for kernel in kernels}):
        own = [kernel for kernel in kernels if kernel.stream == stream]
        last: Kernel | None = None
        between: list[Kernel] = []
        for kernel in own:
            if not kernel.is_ours:
                between.append(kernel)
                continue
            if last is not None and between:
                gaps.append(_gap(stream, last, between, kernel))
            last, between = kernel, []
    return gaps


def _gap(stream: int, before: Kernel, between: list[Kernel], after: Kernel) -> Gap:
    first, end = between[0].begin, max(kernel.end for kernel in between)
    overlap = max(before.end - first, 0.0) + max(end - after.begin, 0.0)
    compute = sum(kernel.end - kernel.begin for kernel in between)
    return Gap(
        stream, before.name, after.name, round(after.begin - before.end, 3), round(compute, 3), len(between),
        round(overlap, 3),
    )  # fmt: skip


def verdict(gaps: list[Gap], kernels: list[Kernel]) -> dict[str, Any]:
    """What the trace shows, for a result file; `clean` is whether nothing of ours ran in any gap."""
    return {
        "kernels": len(kernels),
        "ours": sum(kernel.is_ours for kernel in kernels),
        "gaps": [dataclasses.asdict(gap) for gap in gaps],
        "clean": bool(gaps) and all(gap.overlap_us == 0.0 for gap in gaps),
    }


def profile_hooks(world: World, path: pathlib.Path) -> dict[str, Any]:
    """Run rounds in the hook form with matrix products between the halves, under torch's profiler.

    Args:
        world: of one rank, its tokens loaded: between its halves the device has nothing else to run.
        path: where the trace goes.
    """
    from torch.profiler import ProfilerActivity, profile

    device = world.device
    size = COMPUTE_SIZE if device.is_cuda else HOST_SIZE
    weights = torch.randn(size, size, device=device.where, dtype=torch.bfloat16)
    target = torch.empty_like(weights)

    def rounds() -> None:
        for number in range(HOOK_ROUNDS):
            for half in ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv"):
                for lane in range(device.num_lanes):
                    with device.lane(lane):
                        world.step(lane, half, number)
                        torch.mm(weights, weights, out=target)

    rounds()
    world.settle()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.is_cuda else [])]
    with profile(activities=activities) as profiler:
        rounds()
        device.synchronize()
    world.settle()
    profiler.export_chrome_trace(str(path))
    kernels = read_kernels(json.loads(path.read_text(encoding="utf-8")))
    return verdict(hook_gaps(kernels), kernels)
