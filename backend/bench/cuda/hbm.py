"""What the device's memory allows: the rate of a large copy, and the time of a copy that moves as many bytes as a half.

Bytes are counted as read plus written, so a copy of n bytes moves 2 n. The copy of the same bytes walks through memory
several times the size of the last cache, so that it finds nothing there; what it copies for is often smaller and partly
cached, as the tokens and rows of a real step are. It runs as graphs do: many copies in one, the time over their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .schedules import GATE_S

if TYPE_CHECKING:
    from .devices import Device

STREAM_BYTES = 2 << 30  # of each of the two blocks, on a GPU
HOST_BYTES = 4 << 20
TIMES_L2 = 4
COPIES = 20
REPLAYS = 9
LEAST = 16


class CopyBound:
    """Times copies on a device."""

    def __init__(self, device: Device) -> None:
        """Make the blocks, and measure the rate of a large copy."""
        self._device = device
        size = STREAM_BYTES if device.is_cuda else HOST_BYTES
        self._source = torch.ones(size, dtype=torch.uint8, device=device.where)
        self._target = torch.empty_like(self._source)
        device.synchronize()
        self.stream_gbps: float = round(2 * size / self._time(size, 1) / 1e3, 1)
        self._known: dict[int, float] = {}

    def same_bytes_us(self, moved: int) -> float:
        """Median time of a copy that reads and writes `moved` bytes in all."""
        length = min(max(moved // 2 // LEAST * LEAST, LEAST), len(self._source))
        if length not in self._known:
            self._known[length] = round(self._time(length, COPIES), 3)
        # More than the blocks hold is that many times the blocks.
        return self._known[length] * max(1.0, moved / 2 / len(self._source))

    def stream_us(self, moved: int) -> float:
        """The time of `moved` bytes at the rate of a large copy."""
        return moved / self.stream_gbps / 1e3

    def _time(self, length: int, copies: int) -> float:
        """Median microseconds of a copy of `length` bytes."""
        device = self._device
        # Places that a copy takes in turn: as many as fit, or as leave nothing of the first in the cache.
        places = max(1, min(len(self._source) // length, -(-TIMES_L2 * device.l2_bytes // (2 * length))))

        def body() -> list[Any]:
            stamps = [device.stamp()]
            for number in range(copies):
                begin = number % places * length
                self._target[begin : begin + length].copy_(self._source[begin : begin + length])
            return [*stamps, device.stamp()]

        # A graph may copy by another engine than an eager call does: the faster of the two is the bound.
        graph = device.capture(body)
        graphs, eager = [], []
        with device.main():
            for number in range(REPLAYS + 1):
                device.synchronize()
                device.gate(GATE_S / 40)
                graph.replay()
                device.synchronize()
                device.gate(GATE_S / 4)
                stamps = body()
                device.synchronize()
                if number:
                    graphs.append(device.between_us(*graph.result) / copies)
                    eager.append(device.between_us(*stamps) / copies)
        return min(_median(graphs), _median(eager))


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
