"""A decode step, captured for each bucket of batch sizes and replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor

from moebius.errors import ConfigError, StateError

from .buckets import Buckets
from .capture import Recorder
from .static import Result, StaticInputs, StaticOutputs

if TYPE_CHECKING:
    from types import TracebackType

    from moebius import AllToAll


class GraphedStep(Generic[Result]):
    """A decode step as a CUDA graph for each bucket; a batch is padded to the next one, and its padding is never sent.

    The step is a function of tensors, `step(*inputs, num_valid_tokens=...)`, whose first dimensions are the batch; it
    may call the rounds of its `AllToAll` any number of times, eagerly written, and passes `num_valid_tokens` on to each
    dispatch. Replays, eager calls and the graphs of other steps may follow one another in any order. On the CPU engine
    nothing is captured: the step is called, padded in the same way.

    Collective: every rank captures, and every call of one rank is answered by a call on the others, each with its own
    batch and so its own bucket; a rank without tokens calls with T = 0. One call at a time: all buckets share their
    inputs, outputs and memory. Not for several threads at once.

    Attributes:
        buckets: the batch sizes.
        device: of the tensors.
    """

    def __init__(
        self,
        step: Callable[..., Result],
        a2a: AllToAll | Sequence[AllToAll],
        example: Sequence[Tensor],
        *,
        buckets: Iterable[int] | None = None,
        padding: Sequence[float] | None = None,
        num_warm_ups: int = 2,
        stream: torch.cuda.Stream | None = None,
        pool: Any = None,
    ) -> None:
        """Allocate the inputs; `capture` does the rest.

        Args:
            step: what is captured. It returns [T, ...] tensors: one, or a tuple. In a graph it must not wait for the
                device (no `.item()`, no `.tolist()`).
            a2a: every `AllToAll` that the step calls.
            example: [any, ...] each: inputs as the step takes them, of which all but the first dimension counts.
            buckets: batch sizes; None for the powers of two up to `max_num_tokens`, and that.
            padding: what the rows of each input hold past the batch: -1 for slots of a KV cache, say; None for zeros.
            num_warm_ups: eager runs of each bucket before capture: the first loads kernels and tunes them.
            stream: of the device, to warm up and capture on; None for one of its own.
            pool: of `torch.cuda.graph_pool_handle`, to share memory with graphs that never run at the same time as
                these; None for one of its own.

        Raises:
            ConfigError: an argument is impossible; names it.
            ShapeError: an example is no tensor with a first dimension, or on another device than `a2a`.
        """
        self._a2as: tuple[AllToAll, ...] = tuple(a2a) if isinstance(a2a, Sequence) else (a2a,)
        if not self._a2as:
            raise ConfigError("`a2a` must name every AllToAll that the step calls (got none)")
        self.device = self._a2as[0].device
        if any(other.device != self.device for other in self._a2as):
            raise ConfigError(f"`a2a` must be on one device (got {', '.join(str(each.device) for each in self._a2as)})")
        if not isinstance(num_warm_ups, int) or num_warm_ups < 1:
            raise ConfigError(f"`num_warm_ups` must be an int of at least 1 (got {num_warm_ups!r})")
        most = min(each.config.max_num_tokens for each in self._a2as)
        self.buckets = Buckets.up_to(most) if buckets is None else Buckets(buckets)
        self._step: Callable[..., Result] = step
        self._num_warm_ups = num_warm_ups
        values = (0,) * len(example) if padding is None else padding
        self._inputs = StaticInputs(example, values, self.buckets.largest, self.device)
        self._outputs: StaticOutputs[Result] = StaticOutputs(self.buckets.largest)
        self._recorder = Recorder(self.device, stream, pool) if self.device.type == "cuda" else None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._is_warm = self._is_captured = self._is_closed = False
        self._last_stream: torch.cuda.Stream | None = None

    def __enter__(self) -> GraphedStep[Result]:
        """Return itself; leaving the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """[N, ...] each, N the largest bucket: where the batch lies in every replay.

        A caller that writes its T rows here, and calls with `[:T]` of these, saves the copies.
        """
        return self._inputs.tensors

    @property
    def captured(self) -> bool:
        """Whether it can be called."""
        return self._is_captured

    def warm_up(self) -> None:
        """Run the step eagerly on padding alone, for every bucket; `capture` does it unless it was done.

        Collective. Does not wait for the device, so one thread can warm up several virtual ranks, before it captures
        the first of them.

        Raises:
            ShapeError: the step returned something else than [T, ...] tensors, or other ones for another bucket.
            StateError: buckets differ in their number of rounds; it is captured already; or something is closed.
            PeerTimeoutError: a rank did not deliver within the deadline.
        """
        self._check_open()
        if self._is_captured:
            raise StateError("this step is captured already: a warm-up would move the results that its graphs write")
        self._follow_stream()
        self._inputs.fill([static[:0] for static in self._inputs.tensors], 0)
        rounds: dict[int, int] = {}
        with self._recorder.warming_up() if self._recorder is not None else contextlib.nullcontext(), torch.no_grad():
            for bucket in reversed(self.buckets.sizes):
                for _ in range(self._num_warm_ups):
                    before = self._num_rounds()
                    result = self._call_step(bucket)
                    if not rounds:
                        self._outputs.adopt(result, self.device)
                    self._outputs.write(result, bucket)
                    rounds[bucket] = self._num_rounds() - before
        if len(set(rounds.values())) > 1:
            counts = ", ".join(f"{rounds[bucket]} for {bucket} tokens" for bucket in self.buckets)
            raise StateError(
                f"a step must have the same rounds in every bucket, for ranks may be in different ones (got {counts})"
            )
        self._is_warm = True

    def capture(self) -> None:
        """Warm up, unless it was done, and capture a graph for each bucket; again, and it does nothing.

        The warm-up is collective, the capture itself is not: it sends nothing. Waits for the device.

        Raises:
            StateError: the capture failed in the middle; no graph is kept, the message says what to do.
            MoebiusError: as `warm_up`.
        """
        self._check_open()
        if self._is_captured:
            return
        if not self._is_warm:
            self.warm_up()
        if self._recorder is not None:
            for a2a in self._a2as:
                a2a.synchronize()
            runs = [(bucket, self._run_of(bucket)) for bucket in reversed(self.buckets.sizes)]
            self._graphs = self._recorder.capture(runs)
        self._is_captured = True

    def __call__(self, *inputs: Tensor) -> Result:
        """Replay the graph of the batch's bucket, on the current stream; does not wait for the device.

        Collective: every rank calls, each with its own T.

        Args:
            inputs: [T, ...] each, T from 0 to the largest bucket.

        Returns:
            What the step returned, cut to T rows: views of memory that the next call overwrites, at the same addresses
            for all buckets.

        Raises:
            ShapeError: an input is not as `example`, or T is larger than every bucket; nothing was run.
            StateError: nothing is captured yet; or something is closed.
            PeerTimeoutError: of an earlier call: a rank did not deliver within the deadline. On the CPU, of this one.
        """
        self._check_open()
        if not self._is_captured:
            raise StateError("this step is not captured: call capture() on every rank first")
        num_tokens, bucket = self._put(inputs)
        if self._recorder is not None:
            self._graphs[bucket].replay()
        else:
            self._run(bucket)
        return self._outputs.shown(num_tokens)

    def eager(self, *inputs: Tensor) -> Result:
        """What a call would do, padding included, with the step called instead of its graph replayed.

        A rank may do this while others replay. Arguments, result and errors as of a call; `warm_up` must have run.
        """
        self._check_open()
        if not self._is_warm:
            raise StateError("this step is not warmed up: call warm_up() or capture() on every rank first")
        num_tokens, bucket = self._put(inputs)
        self._run(bucket)
        return self._outputs.shown(num_tokens)

    def close(self) -> None:
        """Let go of the graphs. Not collective, may be repeated; waits for the device. Results stay readable."""
        if self._graphs:
            torch.cuda.synchronize(self.device)  # one of them may be running
        for graph in self._graphs.values():
            graph.reset()
        self._graphs = {}
        self._is_closed = True

    def _put(self, inputs: Sequence[Tensor]) -> tuple[int, int]:
        """Check a batch and put it in its place; returns T and its bucket."""
        num_tokens = self._inputs.check(inputs)
        bucket = self.buckets.of(num_tokens)
        self._follow_stream()
        with torch.no_grad():
            self._inputs.fill(inputs, num_tokens)
        return num_tokens, bucket

    def _follow_stream(self) -> None:
        """Put the current stream behind the one of the last call: both use the same memory."""
        if self._recorder is None:
            return
        if torch.cuda.is_current_stream_capturing():
            raise StateError("a captured step cannot be captured into another graph: call the function itself there")
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None and stream != self._last_stream:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream

    def _run_of(self, bucket: int) -> Callable[[], None]:
        return lambda: self._run(bucket)

    def _run(self, bucket: int) -> None:
        """The step on the static tensors; what is captured."""
        with torch.no_grad():
            self._outputs.write(self._call_step(bucket), bucket)

    def _call_step(self, bucket: int) -> Result:
        return self._step(*self._inputs.rows(bucket), num_valid_tokens=self._inputs.num_valid_tokens)

    def _num_rounds(self) -> int:
        """Rounds that were begun by eager calls so far."""
        return sum(a2a.epoch for a2a in self._a2as)

    def _check_open(self) -> None:
        """Check that the memory that the graphs use is there, and that no earlier round failed."""
        if self._is_closed:
            raise StateError("this GraphedStep is closed")
        for a2a in self._a2as:
            if a2a.closed:
                raise StateError(
                    "an AllToAll that this step was captured with is closed: close the step, and capture anew"
                )
            a2a.check()
