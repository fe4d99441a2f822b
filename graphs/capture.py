"""Capturing: all of it or nothing, whatever fails on the way."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING, Any

import torch

from moebius.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


class Recorder:
    """Captures functions as CUDA graphs of one device that share a memory pool.

    Attributes:
        stream: where they are warmed up and captured.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None, pool: Any) -> None:
        """Take where to capture.

        Args:
            device: of everything that is captured.
            stream: None for one of its own.
            pool: of `torch.cuda.graph_pool_handle`; None for one of its own.
        """
        self._device = device
        self._pool = pool
        self.stream = torch.cuda.Stream(device) if stream is None else stream  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def warming_up(self) -> Iterator[None]:
        """Run on the capture stream, after what the current stream has been given, and before what it will be.

        Libraries keep workspaces by stream: those made here are not taken from the pool of a graph.
        """
        current = torch.cuda.current_stream(self._device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def capture(self, runs: Sequence[tuple[int, Callable[[], None]]]) -> dict[int, torch.cuda.CUDAGraph]:
        """Capture every function; in this order, so that the largest, if first, sizes the pool for all.

        Args:
            runs: a bucket and what to capture for it.

        Returns:
            The graphs by bucket.

        Raises:
            StateError: one of them failed; no graph of any bucket is left, and nothing was run.
        """
        torch.cuda.synchronize(self._device)
        gc.collect()  # what is freed in the middle of a capture may break it
        torch.cuda.empty_cache()
        pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        graphs: dict[int, torch.cuda.CUDAGraph] = {}
        try:
            for bucket, run in runs:
                graphs[bucket] = torch.cuda.CUDAGraph()
                self._capture_one(graphs[bucket], pool, run)
        except BaseException as error:
            for graph in graphs.values():
                graph.reset()
            if not isinstance(error, Exception):
                raise
            raise StateError(
                f"capture of the bucket of {bucket} tokens failed, {type(error).__name__}: {error}. Nothing was sent "
                "and no graph was kept: correct the step and call capture() again, on this rank alone if the others "
                "have theirs"
            ) from error
        return graphs

    def _capture_one(self, graph: torch.cuda.CUDAGraph, pool: Any, run: Callable[[], None]) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self.stream):
            # Other threads may go on allocating: they are none of this capture's business.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                run()
                graph.capture_end()
            except BaseException:
                self._abandon(graph, pool)
                raise

    def _abandon(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """Leave capture mode after a failure, so that what comes next finds the stream and the allocator as before."""
        try:
            graph.capture_end()
        except RuntimeError:
            # CUDA has ended the capture, with an error, and torch stopped there: its allocator would go on asking this
            # graph whether to allocate for it. Errors: it had got further than that.
            with contextlib.suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(self._device.index, pool)
                torch._C._cuda_releasePool(self._device.index, pool)
