"""What stands behind a handle: the round it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from moebius.deep_ep.exchanges import DEPTH
from moebius.errors import RoutingError, ShapeError, StateError

if TYPE_CHECKING:
    from torch import Tensor

    from moebius.all_to_all import AllToAll
    from moebius.deep_ep.exchanges import CallShape
    from moebius.results import Dispatched

Handle = tuple["Tensor", "Tensor", int, int, int]


class HandleState:
    """One dispatch, from its send half until its handle is dropped.

    Attributes:
        call_shape: shapes and format of its exchange.
        exchange: the `AllToAll` it runs on.
        topk_ids: the routing, copied: the caller may overwrite its own before combine.
        staging: what `get_next_low_latency_combine_buffer` handed out for it.
    """

    def __init__(self, call_shape: CallShape, exchange: AllToAll, topk_ids: Tensor) -> None:
        """Note the round that `exchange` has just begun."""
        self.call_shape = call_shape
        self.exchange = exchange
        self.topk_ids = topk_ids.clone()
        self._given = (topk_ids.data_ptr(), topk_ids._version)
        self.staging: Tensor | None = None
        self._epoch = exchange.epoch
        self._received: Dispatched | None = None
        self._is_combined = False

    def received(self, result: Dispatched) -> None:
        """Note what its receive half returned."""
        self._received = result

    def open(self) -> Dispatched:
        """What combine is to be given. A result combined before, or overwritten since, is dispatched once more.

        A handle of DeepEP may be combined any number of times, at any time, while a round of ours is combined once.
        Rows are ordered by rank and token, so the same routing gives the same rows again and any expert output fits.
        All ranks come here alike, from the same calls.

        Raises:
            StateError: its receive hook has not been called.
        """
        if self._received is None:
            raise StateError("the handle's tokens are not received: call the hook of its dispatch before combine")
        if self._is_combined or self.exchange.epoch - self._epoch >= DEPTH:
            x = torch.zeros((1, self.call_shape.hidden), dtype=torch.bfloat16, device=self.topk_ids.device)
            self._received = self.exchange.dispatch(x.expand(len(self.topk_ids), -1), self.topk_ids)
            self._epoch = self.exchange.epoch
            self._is_combined = False
        return self._received

    def combined(self) -> None:
        """Note that its combine is on the way."""
        self._is_combined = True

    def weights(self, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """The weights of combine, 0 where `topk_ids` drops a choice that dispatch had made.

        Raises:
            ShapeError: `topk_ids` has another shape than at dispatch.
            RoutingError: `topk_ids` names another expert than at dispatch.
        """
        if topk_ids.shape != self.topk_ids.shape:
            raise ShapeError(
                f"`topk_idx` must have the shape it had at dispatch: expected {list(self.topk_ids.shape)} "
                f"(got {list(topk_ids.shape)})"
            )
        is_host = topk_ids.device.type == "cpu"
        if not is_host and (topk_ids.data_ptr(), topk_ids._version) == self._given:
            return topk_weights
        if is_host and torch.equal(topk_ids.to(self.topk_ids.dtype), self.topk_ids):
            return topk_weights
        is_dropped = topk_ids < 0
        if not is_host:  # a look at the values would stall the stream: another expert's id is not noticed
            return topk_weights.masked_fill(is_dropped, 0.0)
        if bool(((topk_ids != self.topk_ids) & ~is_dropped).any()):
            raise RoutingError("`topk_idx` must name the experts it named at dispatch, or -1 to drop a choice")
        return topk_weights.masked_fill(is_dropped, 0.0)


class HandleTable:
    """Finds the round of a handle by the identity of its first tensor; forgets it with that tensor."""

    def __init__(self) -> None:
        """Start empty."""
        self._by_src_info: Any = WeakTensorKeyDictionary()

    def add(self, handle: Handle, of: HandleState) -> None:
        """Remember `of` as long as the handle lives."""
        self._by_src_info[handle[0]] = of

    def find(self, handle: Any) -> HandleState:
        """The round of `handle`.

        Raises:
            StateError: it is no handle of this buffer.
        """
        if isinstance(handle, tuple | list) and len(handle) == 5 and isinstance(handle[0], torch.Tensor):
            found: HandleState | None = self._by_src_info.get(handle[0])
            if found is not None:
                return found
        raise StateError("`handle` must be what low_latency_dispatch of this buffer returned, not a copy or another's")

    def clear(self) -> None:
        """Forget all."""
        self._by_src_info.clear()
