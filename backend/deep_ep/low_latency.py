"""The two calls of DeepEP's low-latency mode, in terms of `AllToAll`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from moebius.deep_ep.exchanges import Exchanges
from moebius.deep_ep.handles import Handle, HandleState, HandleTable
from moebius.deep_ep.streams import Streams, on_this_stream
from moebius.errors import ConfigError, ShapeError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moebius.deep_ep.event import EventOverlap
    from moebius.deep_ep.exchanges import CallShape
    from moebius.results import Dispatched

Hook: TypeAlias = "Callable[[], None]"
DispatchResult: TypeAlias = "tuple[Tensor | tuple[Tensor, Tensor], Tensor, Handle, EventOverlap, Hook | None]"
CombineResult: TypeAlias = "tuple[Tensor, EventOverlap, Hook | None]"


class LowLatency:
    """Dispatch and combine of one buffer. Its results are fresh tensors, as in DeepEP, and outlive later calls."""

    def __init__(self, group: Any, num_ranks: int, timeout_s: float) -> None:
        """Start with no exchange: the first call tells the shapes."""
        self.exchanges = Exchanges(group, timeout_s)
        self.handles = HandleTable()
        self.streams = Streams()
        self._num_ranks = num_ranks
        self._spare_staging: dict[tuple[int, int, int], list[Tensor]] = {}

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        call_shape: CallShape,
        *,
        expert_stats: Tensor | None,
        wait_stats: Tensor | None,
        async_finish: bool,
        return_recv_hook: bool,
    ) -> DispatchResult:
        """See `Buffer.low_latency_dispatch`; `call_shape` holds its flags and shapes."""
        _check_finish(async_finish, return_recv_hook)
        if x.dtype != torch.bfloat16:
            raise ShapeError(f"`x` must be torch.bfloat16 (got {x.dtype})")
        exchange = self.exchanges.get(call_shape, x.device)
        rows, scales = call_shape.empty_rows(self._num_ranks, x.device)
        num_local_experts, num_rows, _ = rows.shape
        count = torch.empty(num_local_experts, dtype=torch.int32, device=x.device)
        handle: Handle = (
            torch.empty((num_local_experts, num_rows), dtype=torch.int32, device=x.device),
            torch.empty((num_local_experts, self._num_ranks), dtype=torch.int64, device=x.device),
            call_shape.max_num_tokens,
            call_shape.hidden,
            call_shape.num_experts,
        )
        arguments: dict[str, Any] = {
            "out": rows,
            "out_scales": scales,
            "expert_stats": expert_stats,
            "wait_stats": wait_stats,
        }
        # The copies below live on after the heap's own are overwritten, DEPTH dispatches later.
        hook: Hook | None = None
        if return_recv_hook:
            pending = exchange.dispatch_send(x, topk_idx, **arguments)
            state = HandleState(call_shape, exchange, topk_idx)

            def finish() -> None:
                _hand_over(pending.receive(), state, count, handle[0], handle[1])

            hook = _once(on_this_stream(x.device, finish))
        else:
            used = (x, topk_idx, rows, scales, count, handle[0], handle[1], expert_stats, wait_stats)
            with self.streams.asynchronous(x.device, async_finish, *used):
                result = exchange.dispatch(x, topk_idx, **arguments)
                state = HandleState(call_shape, exchange, topk_idx)
                _hand_over(result, state, count, handle[0], handle[1])
        self.handles.add(handle, state)
        received = rows if scales is None else (rows, scales)
        return received, count, handle, self.streams.event(x.device, async_finish, rows, count), hook

    def combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Any,
        *,
        zero_copy: bool,
        async_finish: bool,
        return_recv_hook: bool,
        out: Tensor | None,
        wait_stats: Tensor | None,
    ) -> CombineResult:
        """See `Buffer.low_latency_combine`."""
        _check_finish(async_finish, return_recv_hook)
        state = self.handles.find(handle)
        rows_shape = (*handle[0].shape, state.call_shape.hidden)
        # All is checked here, before the handle may have to be dispatched again: a rejected call sends nothing.
        _check("x", x, rows_shape, torch.bfloat16)
        _check("topk_weights", topk_weights, tuple(state.topk_ids.shape), torch.float32)
        if out is not None:
            _check("out", out, (len(state.topk_ids), state.call_shape.hidden), torch.bfloat16)
        if wait_stats is not None:
            _check("combine_wait_recv_cost_stats", wait_stats, (self._num_ranks,), torch.int64)
        source = state.staging if zero_copy else x
        if source is None:
            raise StateError(
                "`zero_copy` needs the experts' output in what get_next_low_latency_combine_buffer(handle) returned, "
                "and it was not called since the handle's last combine"
            )
        if out is None:
            out = torch.empty((len(topk_idx), state.call_shape.hidden), dtype=torch.bfloat16, device=x.device)
        hook: Hook | None = None
        if return_recv_hook:
            weights = state.weights(topk_idx, topk_weights)
            pending = state.exchange.combine_send(source, state.open(), weights, out=out, wait_stats=wait_stats)

            def finish() -> None:
                pending.receive()

            hook = _once(on_this_stream(x.device, finish))
        else:
            used = (source, topk_idx, topk_weights, out, wait_stats)
            with self.streams.asynchronous(x.device, async_finish, *used):
                weights = state.weights(topk_idx, topk_weights)
                state.exchange.combine(source, state.open(), weights, out=out, wait_stats=wait_stats)
        state.combined()
        if zero_copy:
            self._spare_staging.setdefault(rows_shape, []).append(source)
            state.staging = None
        return out, self.streams.event(x.device, async_finish, x, out), hook

    def staging(self, handle: Any) -> Tensor:
        """See `Buffer.get_next_low_latency_combine_buffer`. It stays the handle's until its next zero-copy combine."""
        state = self.handles.find(handle)
        if state.staging is None:
            src_info: Tensor = handle[0]
            rows_shape = (src_info.shape[0], src_info.shape[1], state.call_shape.hidden)
            spare = self._spare_staging.get(rows_shape)
            state.staging = (
                spare.pop() if spare else torch.empty(rows_shape, dtype=torch.bfloat16, device=src_info.device)
            )
        return state.staging

    def close(self) -> None:
        """Close every exchange; not collective."""
        self.exchanges.close()
        self.handles.clear()
        self._spare_staging.clear()


def _hand_over(result: Dispatched, state: HandleState, count: Tensor, src_info: Tensor, layout_range: Tensor) -> None:
    """Fill what the caller holds from what was received."""
    if result.src_info is None or result.layout_range is None:
        raise StateError("the exchange is not expert_major")
    count.copy_(result.expert_num_tokens)
    src_info.copy_(result.src_info)
    layout_range.copy_(result.layout_range)
    state.received(result)


def _once(finish: Hook) -> Hook:
    """`finish` as a hook that may be called again, without effect once it has succeeded."""
    is_done = False

    def hook() -> None:
        nonlocal is_done
        if not is_done:
            finish()
            is_done = True

    return hook


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or (tensor.numel() and tensor.stride(-1) != 1):
        raise ShapeError(
            f"`{name}` must be {list(shape)} {dtype} with contiguous rows "
            f"(got {list(tensor.shape)} {tensor.dtype} with strides {list(tensor.stride())})"
        )


def _check_finish(async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise ConfigError("`async_finish` and `return_recv_hook` exclude each other (got both)")
