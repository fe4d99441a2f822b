"""Micro-batches whose communication runs under one another's computation.

A micro-batch is a generator that yields the send half of each of its rounds and is given what the receive half returns:

    recv = yield lambda: a2a.dispatch_send(x, topk_ids, topk_weights)

Who runs the halves, when and on which stream, is up to `interleave`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from moebius.errors import ConfigError, ShapeError
from moebius.results import Dispatched, Pending

if TYPE_CHECKING:
    from moebius import AllToAll

Output = TypeVar("Output")
Send = Callable[[], Pending[Any]]  # the send half of a round
Batch = Generator[Send, Any, Output]  # yields send halves, is given what their receive halves return


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Some rows of a batch.

    Attributes:
        rows: which.
        num_valid_tokens: [1] int32: how many of them are tokens and no padding.
    """

    rows: slice
    num_valid_tokens: Tensor


def split(num_tokens: int, num_valid_tokens: Tensor, num_parts: int = 2) -> list[MicroBatch]:
    """Cut a batch into micro-batches of about equal numbers of rows; the last may have none.

    There are always `num_parts`, so that all ranks have the same rounds, whatever their buckets. Can be captured.

    Args:
        num_tokens: rows of the batch, padding included.
        num_valid_tokens: [1] int32 or int64: how many of them are tokens.
        num_parts: how many micro-batches, at most `depth`.

    Raises:
        ConfigError: `num_parts` is no int of at least 1.
        ShapeError: `num_valid_tokens` is no tensor of one element.
    """
    if not isinstance(num_parts, int) or num_parts < 1:
        raise ConfigError(f"`num_parts` must be an int of at least 1 (got {num_parts!r})")
    if not isinstance(num_valid_tokens, Tensor) or num_valid_tokens.numel() != 1:
        raise ShapeError(f"`num_valid_tokens` must be a tensor of one element (got {num_valid_tokens!r})")
    starts = [-(-num_tokens * part // num_parts) for part in range(num_parts + 1)]
    return [
        MicroBatch(slice(start, end), (num_valid_tokens - start).clamp_(0, end - start))
        for start, end in itertools.pairwise(starts)
    ]


def moe_layer(
    a2a: AllToAll,
    experts: Callable[[Dispatched], Tensor],
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    scales: Tensor | None = None,
    num_valid_tokens: Tensor | None = None,
) -> Batch[Tensor]:
    """One layer of experts, as part of a micro-batch: the caller delegates to it with `yield from`.

    Args:
        a2a: the rounds.
        experts: what this rank's experts make of the tokens that came; returns `expert_out`.
        x: [T, H], as `AllToAll.dispatch` takes it; so are the others.
        topk_ids: [T, K].
        topk_weights: [T, K]; given to the half that the config says.
        scales: of an x that is already quantised.
        num_valid_tokens: one element.

    Returns:
        [T, H]: what combine returned.
    """
    is_late = a2a.config.weights_at == "combine"
    recv: Dispatched = yield functools.partial(
        a2a.dispatch_send,
        x,
        topk_ids,
        None if is_late else topk_weights,
        scales=scales,
        num_valid_tokens=num_valid_tokens,
    )
    late = topk_weights if is_late else None
    combined: Tensor = yield functools.partial(a2a.combine_send, experts(recv), recv, late)
    return combined


def interleave(batches: Sequence[Batch[Output]], *, comm_stream: torch.cuda.Stream | None = None) -> list[Output]:
    """Run micro-batches in turn, so that each computes while what the others sent travels.

    Collective: every rank runs the same number of micro-batches with the same rounds; the turns are then the same
    everywhere, and nobody waits for a half that its peer has yet to reach. At most `depth` micro-batches. Can be
    captured, and runs on the CPU engine.

    Args:
        batches: each has its own tensors; a round's halves run in the order in which they are yielded.
        comm_stream: None: all on the current stream, each receive as late as possible, so that it need not wait. Else
            all halves run there, under a budget of SMs that is theirs, and the current stream computes meanwhile. It
            is for batches so large that the transfer itself takes long. What the halves return is allocated on that
            stream: keep it for this.

    Returns:
        What each returned, in their order; safe to use on the current stream.

    Raises:
        StateError: more micro-batches than `depth`, or another break of the order of a round.
        MoebiusError: what a half raises. The other micro-batches are closed.
    """
    turns = [_Turn(batch) for batch in batches]
    schedule = _OneStream() if comm_stream is None else _TwoStreams(comm_stream)
    try:
        with schedule:
            while not all(turn.is_done for turn in turns):
                for turn in turns:
                    if not turn.is_done:
                        schedule.advance(turn)
    except BaseException:
        for turn in turns:
            turn.abandon()
        raise
    return [turn.output[0] for turn in turns]


class _Turn(Generic[Output]):
    """A micro-batch and where it stands."""

    def __init__(self, batch: Batch[Output]) -> None:
        self.batch = batch
        self.output: list[Output] = []  # what it returned, once it has
        self.pending: Pending[Any] | None = None  # sent, not received
        self.received: Any = None  # by the receive half, to be computed on
        self.arrival: torch.cuda.Event | None = None  # when `received` may be read
        self.send: Send | None = None  # kept with its tensors until the half has run

    @property
    def is_done(self) -> bool:
        return bool(self.output)

    def compute(self) -> Send | None:
        """Run up to the next send half, and return that; None at the end."""
        received, self.received = self.received, None
        try:
            self.send = self.batch.send(received)
        except StopIteration as end:
            self.send = None
            self.output.append(end.value)
        return self.send

    def abandon(self) -> None:
        """Stop. A receive half left out would block its slot for good, if the ranks all failed alike and go on."""
        self.batch.close()
        if self.pending is not None:
            with contextlib.suppress(RuntimeError):  # ours are; so is what a broken capture says
                self.pending.receive()


class _OneStream:
    """Everything on the current stream: a batch receives when its turn comes again, after the others have computed."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, turn: _Turn[Any]) -> None:
        if turn.pending is not None:
            turn.received = turn.pending.receive()
            turn.pending = None
        send = turn.compute()
        if send is not None:
            turn.pending = send()


class _TwoStreams:
    """Halves on a stream of their own; a batch receives right after its send, while the others compute.

    Memory goes back to the stream that it was allocated on. Two rules make that safe without `record_stream`, which
    would keep it until the end of a capture: a half waits for all that was computed before it, and what it reads is
    kept until the computing stream has waited for it.
    """

    def __init__(self, comm_stream: torch.cuda.Stream) -> None:
        self._comm = comm_stream
        self._compute = torch.cuda.current_stream(comm_stream.device)

    def __enter__(self) -> None:
        self._comm.wait_stream(self._compute)

    def __exit__(self, kind: object, *_: object) -> None:
        # After an error too: a capture can only end when every stream that took part has come back. One that CUDA has
        # broken says so again; the first error tells more.
        with contextlib.suppress(RuntimeError) if kind is not None else contextlib.nullcontext():
            self._compute.wait_stream(self._comm)

    def advance(self, turn: _Turn[Any]) -> None:
        if turn.arrival is not None:
            self._compute.wait_event(turn.arrival)
        send = turn.compute()
        if send is None:
            return
        self._comm.wait_stream(self._compute)
        with torch.cuda.stream(self._comm):
            turn.pending = send()
            turn.received = turn.pending.receive()
            turn.pending = None
            turn.arrival = self._comm.record_event()
