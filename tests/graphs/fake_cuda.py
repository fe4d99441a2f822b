"""What of torch.cuda captures and orders work, without a device: who waited for whom, and how captures end.

Streams keep vector clocks, so that a test can ask whether one piece of work is ordered before another; graphs keep what
ran between their begin and end.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

Clock = dict[str, int]


@dataclasses.dataclass
class Event:
    """A point in a stream: how far every stream was known to have come."""

    clock: Clock


class Stream:
    """A queue, whose n-th piece of work is done when its own clock says n."""

    device = torch.device("cuda:0")

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock: Clock = {name: 0}

    def work(self) -> Event:
        """Put a piece of work at the end."""
        self.clock[self.name] += 1
        return self.record_event()

    def record_event(self) -> Event:
        return Event(dict(self.clock))

    def wait_event(self, event: Event) -> None:
        for name, count in event.clock.items():
            self.clock[name] = max(self.clock.get(name, 0), count)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


@dataclasses.dataclass
class Done:
    """A piece of work that has been put on a stream."""

    name: str
    stream: Stream
    after: Event  # its own place, and all that it waited for

    def is_before(self, other: Done) -> bool:
        return other.after.clock.get(self.stream.name, 0) >= self.after.clock[self.stream.name]


class Graph:
    """A capture.

    Attributes:
        made: all of them, in order.
    """

    made: list[Graph]
    cuda: FakeCuda

    def __init__(self) -> None:
        self.state = "new"
        self.made.append(self)

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert self.state == "new"
        assert capture_error_mode == "thread_local"
        assert self.cuda.current.name == "capture"
        self.pool = pool
        self.state = self.cuda.capturing = "capturing"

    def capture_end(self) -> None:
        self.cuda.capturing = ""
        if self.cuda.breaks:
            self.state = "broken"
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.state = "captured"

    def replay(self) -> None:
        assert self.state == "captured"
        self.cuda.replayed.append(self)

    def reset(self) -> None:
        self.state = "reset"


class FakeCuda:
    """Takes the place of what `moebius.graphs` uses of torch.cuda.

    Attributes:
        done: all work, in the order in which it was enqueued.
        current: the current stream.
        capturing: not empty in a capture.
        breaks: captures end with an error of CUDA.
        replayed: graphs, in order.
        given_back: pools that the allocator was told to leave.
        calls: synchronisations, and emptied caches.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[Done] = []
        self.current = Stream("main")
        self.capturing = ""
        self.breaks = False
        self.replayed: list[Graph] = []
        self.given_back: list[Any] = []
        self.calls: list[str] = []
        self._num_pools = 0
        self.graph_class = type("CUDAGraph", (Graph,), {"made": [], "cuda": self})
        for name, value in {
            "current_stream": lambda device=None: self.current,
            "stream": self.stream,
            "device": lambda device: contextlib.nullcontext(),
            "is_current_stream_capturing": lambda: bool(self.capturing),
            "synchronize": lambda device=None: self.calls.append("synchronize"),
            "empty_cache": lambda: self.calls.append("empty_cache"),
            "graph_pool_handle": self.graph_pool_handle,
            "CUDAGraph": self.graph_class,
            "Stream": lambda device: Stream("capture"),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, self.give_back(name), raising=False)

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph_pool_handle(self) -> tuple[int, int]:
        self._num_pools += 1
        return (0, self._num_pools)

    def give_back(self, name: str) -> Callable[[int, Any], None]:
        return lambda device, pool: self.given_back.append((name, device, pool))

    def work(self, name: str) -> Done:
        """Enqueue on the current stream."""
        self.done.append(Done(name, self.current, self.current.work()))
        return self.done[-1]

    def names(self, stream: str | None = None) -> list[str]:
        """Of the work so far."""
        return [done.name for done in self.done if stream in (None, done.stream.name)]

    def find(self, name: str) -> Done:
        return next(done for done in self.done if done.name == name)
