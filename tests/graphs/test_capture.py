"""Captures that fail leave nothing; replays follow the stream. On a torch.cuda that only keeps records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import moebius
from moebius import AllToAll, StateError
from moebius.graphs import GraphedStep
from moebius.graphs.capture import Recorder
from tests.graphs.fake_cuda import FakeCuda, Stream
from tests.graphs.steps import config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def runs(cuda: FakeCuda, *fails: int) -> list[tuple[int, Callable[[], None]]]:
    def run(bucket: int) -> Callable[[], None]:
        def work() -> None:
            assert cuda.capturing
            cuda.work(f"step {bucket}")
            if bucket in fails:
                raise ValueError(f"no experts for {bucket}")

        return work

    return [(bucket, run(bucket)) for bucket in (8, 4, 1)]


def test_all_buckets_are_captured_in_order_into_one_pool(cuda: FakeCuda) -> None:
    recorder = Recorder(DEVICE, None, None)
    graphs: Any = recorder.capture(runs(cuda))
    assert list(graphs) == [8, 4, 1]
    assert {graph.state for graph in graphs.values()} == {"captured"}
    assert {graph.pool for graph in graphs.values()} == {(0, 1)}
    assert cuda.names("capture") == ["step 8", "step 4", "step 1"]
    assert cuda.calls == ["synchronize", "empty_cache"]
    assert cuda.current.name == "main"


def test_stream_and_pool_may_be_given(cuda: FakeCuda) -> None:
    stream: Any = Stream("capture")
    graphs: Any = Recorder(DEVICE, stream, (0, 77)).capture(runs(cuda))
    assert {graph.pool for graph in graphs.values()} == {(0, 77)}
    assert all(done.stream is stream for done in cuda.done)


@pytest.mark.parametrize("breaks", [False, True])
def test_a_failure_in_the_middle_leaves_no_graph(cuda: FakeCuda, breaks: bool) -> None:
    recorder = Recorder(DEVICE, None, None)
    work = runs(cuda, 4)
    if breaks:
        failing = work[1][1]

        def broken() -> None:
            cuda.breaks = True
            failing()

        work[1] = (4, broken)
    message = r"bucket of 4 tokens failed, ValueError: no experts for 4\. Nothing was sent.*call capture\(\) again"
    with pytest.raises(StateError, match=message) as caught:
        recorder.capture(work)
    assert isinstance(caught.value.__cause__, ValueError)
    assert [graph.state for graph in cuda.graph_class.made] == ["reset", "reset"]  # type: ignore[attr-defined]
    assert (cuda.current.name, cuda.capturing) == ("main", "")
    names = ["_cuda_endAllocateToPool", "_cuda_releasePool"] if breaks else []
    assert cuda.given_back == [(name, 0, (0, 1)) for name in names]
    cuda.breaks = False
    again: Any = recorder.capture(runs(cuda))
    assert {graph.pool for graph in again.values()} == {(0, 2)}


def test_a_capture_that_breaks_at_its_end_leaves_no_graph(cuda: FakeCuda) -> None:
    cuda.breaks = True
    with pytest.raises(StateError, match="bucket of 8 tokens failed, RuntimeError: CUDA error"):
        Recorder(DEVICE, None, None).capture(runs(cuda))
    assert [graph.state for graph in cuda.graph_class.made] == ["reset"]  # type: ignore[attr-defined]
    assert len(cuda.given_back) == 2


def test_an_interrupt_goes_through_and_leaves_no_graph(cuda: FakeCuda) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Recorder(DEVICE, None, None).capture([(2, interrupted)])
    assert [graph.state for graph in cuda.graph_class.made] == ["reset"]  # type: ignore[attr-defined]
    assert cuda.current.name == "main"


def test_the_warm_up_is_between_what_comes_before_and_after(cuda: FakeCuda) -> None:
    before = cuda.work("before")
    with Recorder(DEVICE, None, None).warming_up():
        warm = cuda.work("warm-up")
        assert cuda.current.name == "capture"
    after = cuda.work("after")
    assert before.is_before(warm)
    assert warm.is_before(after)


@pytest.fixture
def graph(cuda: FakeCuda) -> Iterator[GraphedStep[Tensor]]:
    """A step whose tensors are on the CPU and whose captures are recorded; `scale` is 1 when it is captured."""
    with AllToAll(moebius.virtual_ranks(1)[0], config()) as a2a:
        step = GraphedStep(lambda x, num_valid_tokens: x * 2, a2a, [torch.zeros(1, 2)], buckets=(2, 4))
        step._recorder = Recorder(DEVICE, None, None)
        yield step


def test_the_graph_of_the_bucket_is_replayed(cuda: FakeCuda, graph: GraphedStep[Tensor]) -> None:
    graph.capture()
    for num_tokens, bucket in ((1, 2), (3, 4), (0, 2), (4, 4)):
        graph(torch.ones(num_tokens, 2))
        assert cuda.replayed[-1] is graph._graphs[bucket]  # type: ignore[comparison-overlap]


def test_a_call_on_another_stream_waits_for_the_last_one(cuda: FakeCuda, graph: GraphedStep[Tensor]) -> None:
    graph.capture()
    graph(torch.ones(1, 2))
    first = cuda.work("after the first call")
    other = Stream("other")
    with cuda.stream(other):
        graph(torch.ones(1, 2))
        second = cuda.work("after the second call")
    assert first.is_before(second)


def test_a_captured_step_is_not_captured_again(cuda: FakeCuda, graph: GraphedStep[Tensor]) -> None:
    graph.capture()
    cuda.capturing = "by the caller"
    for call in (graph, graph.eager):
        with pytest.raises(StateError, match="cannot be captured into another graph"):
            call(torch.ones(1, 2))
    cuda.capturing = ""
    assert cuda.replayed == []


def test_closing_waits_and_drops_the_graphs(cuda: FakeCuda, graph: GraphedStep[Tensor]) -> None:
    graph.capture()
    made = list(graph._graphs.values())
    cuda.calls.clear()
    graph.close()
    assert cuda.calls == ["synchronize"]
    assert {each.state for each in made} == {"reset"}  # type: ignore[attr-defined]


def test_after_a_failed_capture_it_is_captured_without_another_warm_up(
    cuda: FakeCuda, graph: GraphedStep[Tensor]
) -> None:
    calls = []

    def step(x: Tensor, num_valid_tokens: Tensor) -> Tensor:
        calls.append(bool(cuda.capturing))
        if cuda.capturing and x.shape[0] == 2 and calls.count(True) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    graph._step = step
    with pytest.raises(StateError, match="bucket of 2 tokens failed"):
        graph.capture()
    assert calls == [False] * 4 + [True] * 2
    assert not graph.captured
    assert graph._graphs == {}
    with pytest.raises(StateError, match="not captured"):
        graph(torch.ones(1, 2))
    graph.capture()
    assert calls == [False] * 4 + [True] * 4
    assert graph.captured


def test_an_engine_that_does_not_wait_is_asked_for_faults(
    cuda: FakeCuda, graph: GraphedStep[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(AllToAll, "check", lambda self: asked.append("check"))
    monkeypatch.setattr(AllToAll, "synchronize", lambda self: asked.append("synchronize"))
    graph.capture()
    assert asked == ["check", "check", "synchronize"]
    graph(torch.ones(1, 2))
    assert asked[3:] == ["check"]
