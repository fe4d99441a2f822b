"""Which stream a call's work goes to, as users of DeepEP expect it; on the CPU there is none."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from moebius.deep_ep.event import EventHandle, EventOverlap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


class Streams:
    """The communication streams of one buffer, a stream for each device, made when one is first asked for."""

    def __init__(self) -> None:
        """Start with none."""
        self._by_device: dict[torch.device, torch.cuda.Stream] = {}

    def of(self, device: torch.device) -> torch.cuda.Stream:
        """The stream of a CUDA device that asynchronous calls run on."""
        found = self._by_device.get(device)
        if found is None:
            found = self._by_device[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return found

    @contextlib.contextmanager
    def asynchronous(self, device: torch.device, is_wanted: bool, *tensors: Tensor | None) -> Iterator[None]:
        """Run the body on the communication stream, after what is on the current one, where that `is_wanted`.

        Args:
            device: of the call.
            is_wanted: the call is to be asynchronous.
            tensors: that the body uses; they may be dropped by their owners before the work is done.
        """
        if not is_wanted or device.type != "cuda":
            yield
            return
        stream = self.of(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            yield
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(stream)

    def event(self, device: torch.device, is_wanted: bool, *tensors: Tensor) -> EventOverlap:
        """The event after an asynchronous body; an empty one where none `is_wanted`."""
        if not is_wanted:
            return EventOverlap()
        if device.type != "cuda":
            return EventOverlap(EventHandle(), tensors)
        with torch.cuda.stream(self.of(device)):
            return EventOverlap(EventHandle(), tensors)


def on_this_stream(device: torch.device, finish: Callable[[], None]) -> Callable[[], None]:
    """`finish`, to run on the stream that is current now, whichever is when it is called."""
    if device.type != "cuda":
        return finish
    stream = torch.cuda.current_stream(device)

    def run() -> None:
        with torch.cuda.stream(stream):
            finish()

    return run
