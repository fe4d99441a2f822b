"""The order of the halves of micro-batches, on one stream and on two."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import moebius
from moebius import AllToAll, ConfigError, ShapeError, StateError
from moebius.graphs import Batch, interleave, moe_layer, split
from tests.graphs.fake_cuda import FakeCuda, Stream
from tests.graphs.steps import HIDDEN, InterleavedStep, batch_of, config, expert_out, reference_step
from tests.helpers.compare import assert_same

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moebius import Dispatched

LAYERS = 3
HALVES = ("dispatch", "combine")


class Sent:
    """A half that was sent; receiving it returns its name."""

    def __init__(self, cuda: FakeCuda, name: str, log: list[str]) -> None:
        self.cuda, self.name, self.log = cuda, name, log

    def receive(self) -> str:
        self.cuda.work(f"receive {self.name}")
        self.log.append(self.name)
        return self.name


class Layers:
    """A micro-batch made of names, which looks after the lifetime of what it hands to a half."""

    def __init__(self, cuda: FakeCuda, name: str, fails_at: str = "") -> None:
        self.cuda, self.name, self.fails_at = cuda, name, fails_at
        self.received: list[str] = []

    def send(self, name: str, given: Tensor) -> Sent:
        assert given.numel() == 1
        self.cuda.work(f"send {name}")
        return Sent(self.cuda, name, self.received)

    def run(self) -> Batch[str]:
        for layer in range(LAYERS):
            for half in HALVES:
                name = f"{half} {self.name}{layer}"
                self.cuda.work(f"compute {name}")
                if name == self.fails_at:
                    raise ValueError(name)
                given = torch.zeros(1)
                alive = weakref.ref(given)
                send = self.sender(name, given)
                del given
                got = yield send
                del send
                assert got == name
                assert alive() is not None, "what a half reads was let go before the computing stream had waited for it"
        self.cuda.work(f"compute end {self.name}")
        return self.name

    def sender(self, name: str, given: Tensor) -> Any:
        return lambda: self.send(name, given)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_on_one_stream_each_receives_when_its_turn_comes_again(cuda: FakeCuda) -> None:
    assert interleave([Layers(cuda, "a").run(), Layers(cuda, "b").run()]) == ["a", "b"]
    assert cuda.names()[:10] == [
        "compute dispatch a0",
        "send dispatch a0",
        "compute dispatch b0",
        "send dispatch b0",
        "receive dispatch a0",
        "compute combine a0",
        "send combine a0",
        "receive dispatch b0",
        "compute combine b0",
        "send combine b0",
    ]
    assert cuda.names()[-4:] == ["receive combine a2", "compute end a", "receive combine b2", "compute end b"]
    assert len(cuda.done) == 2 * (LAYERS * 2 * 3 + 1)


@pytest.mark.parametrize("num_batches", [1, 2, 3])
def test_on_two_streams_every_half_is_ordered_and_none_waits_for_the_other_batch(
    cuda: FakeCuda, num_batches: int
) -> None:
    comm = Stream("comm")
    names = "abc"[:num_batches]
    batches = [Layers(cuda, name).run() for name in names]
    before = cuda.work("before")
    assert interleave(batches, comm_stream=comm) == list(names)  # type: ignore[arg-type]
    after = cuda.work("after")

    assert all(done.stream is comm for done in cuda.done if done.name.startswith(("send", "receive")))
    assert all(done.stream is cuda.current for done in cuda.done if done.name.startswith("compute"))
    assert all(before.is_before(done) and done.is_before(after) for done in cuda.done if done not in (before, after))
    for name in names:
        chain = [
            cuda.find(f"{what} {half} {name}{layer}")
            for layer in range(LAYERS)
            for half in HALVES
            for what in ("compute", "send", "receive")
        ]
        for first, second in zip(chain, [*chain[1:], cuda.find(f"compute end {name}")], strict=True):
            assert first.is_before(second), f"{second.name} does not wait for {first.name}"
    for done in cuda.done:  # what was let go on the computing stream may be handed to any half
        if done.name.startswith("send"):
            earlier = cuda.done[: cuda.done.index(done)]
            assert all(other.is_before(done) for other in earlier if other.stream is cuda.current)
    if num_batches > 1:
        # The point of it: one batch computes while the other's tokens travel.
        assert not cuda.find("receive dispatch a0").is_before(cuda.find("compute dispatch b0"))
        assert not cuda.find("receive dispatch b0").is_before(cuda.find("compute combine a0"))
        assert not cuda.find("receive combine a0").is_before(cuda.find("compute combine b0"))


@pytest.mark.parametrize("fails_at", ["dispatch a0", "combine a0", "dispatch b1", "combine b2"])
@pytest.mark.parametrize("num_streams", [1, 2])
def test_after_a_failure_the_streams_are_joined_and_nothing_is_left_unreceived(
    cuda: FakeCuda, fails_at: str, num_streams: int
) -> None:
    batches = [Layers(cuda, name, fails_at) for name in "ab"]
    running = [batch.run() for batch in batches]
    comm: Any = Stream("comm") if num_streams == 2 else None
    with pytest.raises(ValueError, match=fails_at):
        interleave(running, comm_stream=comm)
    after = cuda.work("after")
    sent = {name.removeprefix("send ") for name in cuda.names() if name.startswith("send")}
    assert sent == {name for batch in batches for name in batch.received}
    assert all(batch.gi_frame is None for batch in running)  # type: ignore[attr-defined]
    if num_streams == 2:
        assert all(done.is_before(after) for done in cuda.done)


def test_a_broken_capture_does_not_hide_what_broke_it(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Stream, other: Stream) -> None:
        if self is main:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    main = cuda.current
    monkeypatch.setattr(Stream, "wait_stream", broken)
    with pytest.raises(ValueError, match="combine a0"):
        interleave([Layers(cuda, "a", "combine a0").run()], comm_stream=Stream("comm"))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="CUDA error"):
        interleave([Layers(cuda, "a").run()], comm_stream=Stream("comm"))  # type: ignore[arg-type]


def test_no_batch_and_a_batch_without_rounds(cuda: FakeCuda) -> None:
    def silent() -> Batch[int]:
        return 7
        yield

    assert interleave([]) == []
    assert interleave([silent(), silent()]) == [7, 7]
    assert cuda.names() == []


def test_the_second_stream_joins_a_capture_even_if_nothing_is_sent(cuda: FakeCuda) -> None:
    """Else the stream that captures would wait for one that does not take part, which ends the capture."""

    def failing() -> Batch[int]:
        raise ValueError("before any half")
        yield

    before = cuda.work("before")
    comm = Stream("comm")
    with pytest.raises(ValueError, match="before any half"):
        interleave([failing()], comm_stream=comm)  # type: ignore[arg-type]
    with cuda.stream(comm):
        assert before.is_before(cuda.work("on the second stream"))


@pytest.fixture
def alone() -> Iterator[AllToAll]:
    with AllToAll(moebius.virtual_ranks(1)[0], config()) as a2a:
        yield a2a


def test_more_batches_than_open_rounds_are_refused(alone: AllToAll) -> None:
    step = InterleavedStep(alone, num_parts=3)
    batch = batch_of(9, 1)
    with pytest.raises(StateError, match="at most depth = 2 rounds may be open"):
        step(*batch.tensors, num_valid_tokens=torch.tensor([9]))
    step.num_parts = 2
    assert_same(step(*batch.tensors, num_valid_tokens=torch.tensor([9])), reference_step([batch])[0], "afterwards")


@pytest.mark.parametrize("weights_at", ["dispatch", "combine"])
def test_a_layer_gives_the_weights_to_the_half_that_takes_them(weights_at: str) -> None:
    batch = batch_of(7, 2)
    with AllToAll(moebius.virtual_ranks(1)[0], config(weights_at=weights_at)) as a2a:

        def experts(recv: Dispatched) -> Tensor:
            return expert_out(0, recv.x)

        (got,) = interleave([moe_layer(a2a, experts, *batch.tensors)])
        early = batch.topk_weights if weights_at == "dispatch" else None
        recv = a2a.dispatch(batch.x, batch.topk_ids, early)
        want = a2a.combine(experts(recv), recv, None if early is not None else batch.topk_weights)
    assert got.shape == (7, HIDDEN)
    assert_same(got, want, weights_at)


def test_a_batch_is_split_with_its_tokens() -> None:
    for num_tokens in range(9):
        for num_parts in (1, 2, 3):
            for num_valid in range(num_tokens + 1):
                parts = split(num_tokens, torch.tensor([num_valid], dtype=torch.int32), num_parts)
                assert len(parts) == num_parts
                rows = torch.arange(num_tokens)
                assert torch.equal(torch.cat([rows[part.rows] for part in parts]), rows)
                sizes = [rows[part.rows].numel() for part in parts]
                assert max(sizes) - min(sizes) <= 1
                valid = torch.cat([rows[part.rows][: int(part.num_valid_tokens)] for part in parts])
                assert valid.tolist() == list(range(num_valid))
                assert all(part.num_valid_tokens.dtype == torch.int32 for part in parts)


def test_an_impossible_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="`num_parts` must be an int of at least 1"):
        split(4, torch.tensor([4]), 0)
    for wrong in (4, torch.tensor([1, 2])):
        with pytest.raises(ShapeError, match="`num_valid_tokens` must be a tensor of one element"):
            split(4, wrong)  # type: ignore[arg-type]
