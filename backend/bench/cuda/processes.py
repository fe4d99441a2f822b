"""Ranks as processes, each with a GPU of its own, over the launcher that the other benchmarks use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moebius.bench.ranks import RankPool

from .devices import CudaDevice, HostDevice, NoDeviceError
from .measure import Bench, Measured

if TYPE_CHECKING:
    from moebius.bench.ranks import RankContext

    from .suites import Point

POINT_TIMEOUT_S = 120.0
_benches: dict[bool, Bench] = {}  # of this process; the pool calls a function, so it lives here


def measure_here(context: RankContext, *, point: Point, seconds: float, on_gpu: bool) -> Measured:
    """What a process of the pool does for one point. Collective."""
    if on_gpu not in _benches:
        device = CudaDevice(1, context.rank) if on_gpu else HostDevice(1)
        _benches[on_gpu] = Bench(device, lambda: [context.group], seconds, context.start_line.wait)
    return _benches[on_gpu].measure(point)


class GpuPool:
    """R processes with a GPU each."""

    def __init__(self, ranks: int, seconds: float, *, on_gpu: bool = True) -> None:
        """Start them.

        Args:
            ranks: how many.
            seconds: of each schedule.
            on_gpu: false lets processors stand in.

        Raises:
            NoDeviceError: there are fewer GPUs.
        """
        if on_gpu and torch.cuda.device_count() < ranks:
            raise NoDeviceError(
                f"`--ranks {ranks}` needs as many GPUs (got {torch.cuda.device_count()}); "
                f"`--virtual-ranks {ranks}` runs them on one"
            )
        self._pool, self._seconds, self._on_gpu = RankPool(ranks, 0), seconds, on_gpu

    def measure(self, point: Point) -> list[Measured]:
        """What each process found."""
        found: list[Measured] = self._pool.run(
            measure_here, timeout_s=POINT_TIMEOUT_S, point=point, seconds=self._seconds, on_gpu=self._on_gpu
        )
        return found

    def close(self) -> None:
        """End them."""
        self._pool.close()
