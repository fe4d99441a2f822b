"""What a schedule is played on: a GPU, or this processor standing in for one, so that the flow runs anywhere.

A device has one lane (a stream) for each rank that it runs. `fork` makes every lane wait for all that was enqueued
before, `join` makes what comes next wait for every lane, `stamp` marks an instant between the two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

from moebius.errors import MoebiusError

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")
GATE_CLOCK_HZ = 2.0e9  # above the clock of any GPU we know: a gate lasts at least as long as asked
DEFAULT_L2_BYTES = 64 << 20


class NoDeviceError(MoebiusError):
    """There is no GPU to measure, or too few. The message says what is missing."""


class Replay(Protocol, Generic[Result]):
    """Recorded work.

    Attributes:
        result: what recording it returned; of stamps, those of the last replay.
    """

    result: Result

    def replay(self) -> None:
        """Enqueue it once more."""


class Device(Protocol):
    """A place to enqueue work.

    Attributes:
        where: of tensors.
        num_lanes: ranks that it runs.
        num_sms: multiprocessors, for all of them together.
        l2_bytes: of its last cache.
        is_cuda: a GPU, whose calls return before their work is done.
    """

    where: torch.device
    num_lanes: int
    num_sms: int
    l2_bytes: int
    is_cuda: bool

    def lane(self, index: int) -> contextlib.AbstractContextManager[Any]:
        """Inside, work goes to that lane."""

    def fork(self) -> None:
        """Let the lanes follow what was enqueued so far."""

    def join(self) -> None:
        """Let what comes next follow the lanes."""

    def stamp(self) -> Any:
        """Mark this instant."""

    def between_us(self, begin: Any, end: Any) -> float:
        """Microseconds from one stamp to another; their work is done."""

    def capture(self, body: Callable[[], Result]) -> Replay[Result]:
        """Record what `body` enqueues, to be replayed in one piece."""

    def main(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, work goes to the stream that lanes fork from."""

    def gate(self, seconds: float) -> None:
        """Hold back what comes next for so long, at least, so that it can be enqueued meanwhile."""

    def synchronize(self) -> None:
        """Wait until all is done."""


@dataclasses.dataclass
class _Graph(Generic[Result]):
    graph: Any
    result: Result

    def replay(self) -> None:
        self.graph.replay()


def _event(**options: bool) -> Any:
    make: Any = torch.cuda.Event  # untyped
    return make(**options)


class CudaDevice:
    """A GPU, with one stream a lane."""

    is_cuda = True

    def __init__(self, num_lanes: int, index: int = 0) -> None:
        """Make the streams.

        Raises:
            NoDeviceError: there is no such GPU.
        """
        # Streams beyond as many share a hardware queue, where one rank's wait would hold up another's send. Read when
        # CUDA starts.
        os.putenv("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        if not torch.cuda.is_available():
            build = "" if torch.version.cuda else f": torch {torch.__version__} is built without CUDA"
            raise NoDeviceError(f"no CUDA device here{build} (`python -m moebius doctor` says what is missing)")
        if index >= torch.cuda.device_count():
            raise NoDeviceError(f"expected a GPU number {index} (got {torch.cuda.device_count()} GPUs)")
        self.where, self.num_lanes = torch.device("cuda", index), num_lanes
        properties = torch.cuda.get_device_properties(self.where)
        self.num_sms = int(properties.multi_processor_count)
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or DEFAULT_L2_BYTES
        torch.cuda.set_device(self.where)
        self._main: Any = torch.cuda.Stream(self.where)  # type: ignore[no-untyped-call]
        self._lanes: list[Any] = [torch.cuda.Stream(self.where) for _ in range(num_lanes)]  # type: ignore[no-untyped-call]

    def lane(self, index: int) -> contextlib.AbstractContextManager[Any]:
        """See `Device`."""
        return torch.cuda.stream(self._lanes[index])

    def main(self) -> contextlib.AbstractContextManager[Any]:
        """See `Device`."""
        return torch.cuda.stream(self._main)

    def fork(self) -> None:
        """See `Device`."""
        begun = _event()
        begun.record()
        for lane in self._lanes:
            lane.wait_event(begun)

    def join(self) -> None:
        """See `Device`."""
        here = torch.cuda.current_stream()
        for lane in self._lanes:
            done = _event()
            done.record(lane)
            here.wait_event(done)

    def stamp(self) -> Any:
        """See `Device`."""
        # External, it is a node of the graph, recorded at every replay; outside of a capture that is refused.
        event = _event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record()
        return event

    def between_us(self, begin: Any, end: Any) -> float:
        """See `Device`."""
        return float(begin.elapsed_time(end)) * 1e3

    def capture(self, body: Callable[[], Result]) -> Replay[Result]:
        """See `Device`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._main, capture_error_mode="thread_local"):
            result = body()
        return _Graph(graph, result)

    def gate(self, seconds: float) -> None:
        """See `Device`."""
        torch.cuda._sleep(int(seconds * GATE_CLOCK_HZ))  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        """See `Device`."""
        torch.cuda.synchronize(self.where)


class _Again(Generic[Result]):
    result: Result

    def __init__(self, body: Callable[[], Result]) -> None:
        self._body = body

    def replay(self) -> None:
        self.result = self._body()


class HostDevice:
    """This processor: lanes take turns, everything is done when the call returns, a replay does it again."""

    is_cuda = False
    num_sms = 64
    l2_bytes = 1 << 20

    def __init__(self, num_lanes: int, clock: Callable[[], int] = perf_counter_ns) -> None:
        """Take times from `clock`, in nanoseconds."""
        self.where, self.num_lanes = torch.device("cpu"), num_lanes
        self._clock = clock

    def lane(self, index: int) -> contextlib.AbstractContextManager[Any]:
        """See `Device`."""
        del index
        return contextlib.nullcontext()

    def main(self) -> contextlib.AbstractContextManager[Any]:
        """See `Device`."""
        return contextlib.nullcontext()

    def fork(self) -> None:
        """See `Device`."""

    def join(self) -> None:
        """See `Device`."""

    def stamp(self) -> Any:
        """See `Device`."""
        return self._clock()

    def between_us(self, begin: Any, end: Any) -> float:
        """See `Device`."""
        return float(end - begin) / 1e3

    def capture(self, body: Callable[[], Result]) -> Replay[Result]:
        """See `Device`."""
        return _Again(body)

    def gate(self, seconds: float) -> None:
        """See `Device`."""

    def synchronize(self) -> None:
        """See `Device`."""
