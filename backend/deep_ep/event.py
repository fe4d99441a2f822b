"""The event that DeepEP's calls return."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from torch import Tensor


class EventHandle:
    """A point in the work of this rank: on CUDA, in that of the current stream.

    On the CPU all work before it is done by the time it is made.
    """

    def __init__(self) -> None:
        """Record the point."""
        self._event: torch.cuda.Event | None = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # before, no device has any work
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def current_stream_wait(self) -> None:
        """Make later work on the current stream wait for it."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class EventOverlap:
    """What a caller waits on before it uses a result, also as a context manager that waits at its end.

    Unlike DeepEP's, waiting without an event is legal and does nothing: callers need not know whether the call that
    returned it was asynchronous.

    Attributes:
        event: the event, or None where the call was synchronous.
        extra_tensors: kept alive as long as this object.
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: Sequence[Tensor] | None = None) -> None:
        """Hold `event` and the tensors that its work reads."""
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Make later work on the current stream wait for the event."""
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.current_stream_wait()
