"""What `CudaDevice` asks of torch, noted by a stand-in for `torch.cuda`: forks, joins, captures and stamps in order."""

import contextlib
import gc
import inspect
import types
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moebius.bench.cuda import gpu
from moebius.bench.cuda.devices import CudaDevice, NoDeviceError
from moebius.bench.cuda.schedules import BY_HALF, BY_OP, CHAINED, LOCKSTEP, Schedule, play
from moebius.bench.cuda.tables import gpu_line


class Fake:
    """The part of `torch.cuda` that is used; notes what was enqueued, and where."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.nodes: list[Any] = []  # of the graph: weak references to events
        self.now = "default"
        self.capturing = False
        self.names = iter(["main", "lane0", "lane1"])
        fake = self

        class Stream:
            def __init__(self, where: torch.device) -> None:
                self.name = next(fake.names)

            def wait_event(self, event: Any) -> None:
                fake.log.append(f"{self.name} waits for {event.at}")

        class Event:
            def __init__(self, enable_timing: bool = False, external: bool = False) -> None:
                self.timing, self.external, self.at = enable_timing, external, ""

            def record(self, stream: Any = None) -> None:
                assert not self.external or fake.capturing, "refused outside of a capture"
                self.at = stream.name if stream is not None else fake.now
                if self.timing:
                    fake.log.append(f"stamp on {self.at}{' in the graph' if self.external else ''}")
                if self.external:
                    fake.nodes.append(weakref.ref(self))

            def elapsed_time(self, end: Any) -> float:
                return 1.5

        self.Stream, self.Event = Stream, Event

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.now = self.now, stream.name
        yield
        self.now = before

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any, capture_error_mode: str) -> Iterator[None]:
        before, self.now, self.capturing = self.now, stream.name, True
        yield
        self.now, self.capturing = before, False

    def current_stream(self) -> Any:
        found = object.__new__(self.Stream)
        found.name = self.now
        return found

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def get_device_properties(self, where: torch.device) -> Any:
        return types.SimpleNamespace(multi_processor_count=132, L2_cache_size=60 << 20)

    def set_device(self, where: torch.device) -> None:
        pass

    def CUDAGraph(self) -> Any:  # torch's name
        return types.SimpleNamespace(replay=lambda: self.log.append(f"replay on {self.now}"))


class Exchange:
    def __init__(self, fake: Fake) -> None:
        self.fake = fake

    def step(self, lane: int, half: str, number: int) -> None:
        self.fake.log.append(f"{half} on {self.fake.now}")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(torch, "cuda", made)
    return made


def frame(*halves: str) -> list[str]:
    steps = [f"{half} on lane{lane}" for half in halves for lane in (0, 1)]
    return ["lane0 waits for main", "lane1 waits for main", *steps, "main waits for lane0", "main waits for lane1"]


def test_lanes_fork_from_and_join_the_main_stream(fake: Fake) -> None:
    device = CudaDevice(2)
    with device.main():
        stamps = play(device, Exchange(fake), BY_OP, 1)
    dispatch, combine = (frame(*halves) for _, halves in BY_OP.frames)
    assert fake.log == ["stamp on main", *dispatch, "stamp on main", *combine, "stamp on main"]
    assert device.between_us(stamps[0], stamps[1]) == 1500.0
    assert (device.num_sms, device.l2_bytes) == (132, 60 << 20)


def test_stamps_in_a_capture_are_nodes_of_the_graph(fake: Fake) -> None:
    device = CudaDevice(2)
    graph = device.capture(lambda: play(device, Exchange(fake), BY_OP, 2))
    assert fake.log.count("stamp on main in the graph") == len(graph.result) == 5
    assert "stamp on main" not in fake.log
    with device.main():
        graph.replay()
    assert fake.log[-1] == "replay on main"


@pytest.mark.parametrize("schedule", [CHAINED, LOCKSTEP, BY_OP, BY_HALF], ids=lambda schedule: schedule.name)
def test_events_live_as_long_as_the_graph_that_records_them(fake: Fake, schedule: Schedule) -> None:
    device = CudaDevice(2)
    graph = device.capture(lambda: play(device, Exchange(fake), schedule, 3))
    gc.collect()
    assert graph.result == [node() for node in fake.nodes]
    assert len(fake.nodes) == (2 if schedule is CHAINED else 1 + 3 * len(schedule.frames))


def test_a_gpu_that_is_not_there(fake: Fake) -> None:
    with pytest.raises(NoDeviceError, match="GPU number 3"):
        CudaDevice(1, 3)


def test_clocks_are_read_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 5.0, 22.0])
    monkeypatch.setattr(gpu, "monotonic", lambda: next(clock))
    watch = gpu.Watch(2, lambda index: {"sm_clock_mhz": str(1000 + index)})
    for _ in range(3):
        watch.look()
    assert watch.seen == [{"at_s": 1.0, "sm_clock_mhz": "1002"}, {"at_s": 22.0, "sm_clock_mhz": "1002"}]
    about = {"name": "g", "sms": 1, "stream_gbps": 1.0, "torch_cuda": "13", "meanwhile": watch.seen}
    before = dict.fromkeys(gpu.FIELDS, "345")
    line = gpu_line({"gpu": about | {"before": before}, "machine": {"torch": "2"}, "commit": None})
    assert "SM clock 345 MHz before, 1002 to 1002 meanwhile" in line


def test_torch_has_what_the_stand_in_has() -> None:
    assert {"stream", "capture_error_mode"} <= inspect.signature(torch.cuda.graph.__init__).parameters.keys()
    assert {"enable_timing", "external"} <= inspect.signature(torch.cuda.Event.__new__).parameters.keys()
    names = ("Stream", "stream", "current_stream", "is_current_stream_capturing", "CUDAGraph", "synchronize", "_sleep")
    assert all(hasattr(torch.cuda, name) for name in names)
    assert hasattr(torch.cuda.Stream, "wait_event")
