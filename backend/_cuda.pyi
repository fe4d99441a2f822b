"""The extension with the CUDA engine. Addresses, handles and streams are ints; strides are bytes.

A half returns 0 when it is enqueued, 1 when it is not because an earlier one failed (`take_fault` tells), and 2 when
the stream is not part of the capture that the round belongs to. Everything may raise `CudaError`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .all_to_all import AllToAll
from .results import Dispatched, PendingCombine, PendingDispatch
from .rounds import Round, Stage
from .slots import SlotBuffers

class Memory:
    def __init__(self, device: int, num_bytes: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...

class RecvBuffers:
    def __init__(
        self,
        x: int,
        scales: int,
        expert_stride: int,
        row_stride: int,
        group_stride: int,
        scale_element: int,
        src_info: int,
        layout_range: int,
        topk_ids: int,
        topk_weights: int,
        expert_num_tokens: int,
        src_num_tokens: int,
        /,
    ) -> None: ...

class Engine:
    def __init__(
        self,
        *,
        num_ranks: int,
        num_experts: int,
        num_topk: int,
        max_num_tokens: int,
        depth: int,
        payload_bytes: int,
        scale_bytes: int,
        reply_bytes: int,
        has_weights: bool,
        has_positions: bool,
        is_token_major: bool,
        scale_format: int,
        output_dtype: int,
        hidden: int,
        timeout_ns: int,
        num_sms: int,
        device: int,
        rank: int,
        heaps: Sequence[int],
    ) -> None: ...
    def dispatch_send(
        self,
        stream: int,
        capture: int,
        handle: int,
        x: int,
        x_stride: int,
        x_dtype: int,
        scales: int,
        scales_stride: int,
        topk_ids: int,
        has_int64_ids: bool,
        topk_weights: int,
        num_tokens: int,
        num_valid_tokens: int,
        has_int64_valid: bool,
        /,
    ) -> int: ...
    def dispatch_recv(
        self,
        stream: int,
        capture: int,
        handle: int,
        buffers: RecvBuffers,
        expert_stats: int,
        has_int64_stats: bool,
        wait_stats: int,
        /,
    ) -> int: ...
    def combine_send(
        self, stream: int, capture: int, handle: int, expert_out: int, expert_stride: int, row_stride: int, /
    ) -> int: ...
    def combine_recv(
        self,
        stream: int,
        capture: int,
        handle: int,
        out: int,
        out_stride: int,
        num_tokens: int,
        topk_weights: int,
        wait_stats: int,
        /,
    ) -> int: ...
    # Both halves, by one kernel where that can be: what the send half takes, then what the receive half has beside it.
    def dispatch(
        self,
        stream: int,
        capture: int,
        handle: int,
        x: int,
        x_stride: int,
        x_dtype: int,
        scales: int,
        scales_stride: int,
        topk_ids: int,
        has_int64_ids: bool,
        topk_weights: int,
        num_tokens: int,
        num_valid_tokens: int,
        has_int64_valid: bool,
        buffers: RecvBuffers,
        expert_stats: int,
        has_int64_stats: bool,
        wait_stats: int,
        /,
    ) -> int: ...
    def combine(
        self,
        stream: int,
        capture: int,
        handle: int,
        expert_out: int,
        expert_stride: int,
        row_stride: int,
        out: int,
        out_stride: int,
        num_tokens: int,
        topk_weights: int,
        wait_stats: int,
        /,
    ) -> int: ...
    def has_fault(self) -> bool: ...
    def take_fault(self) -> dict[str, Any] | None: ...
    def num_rounds(self) -> int: ...
    def remote_bytes(self) -> int: ...
    def dead(self) -> list[bool]: ...
    def mask(self, rank: int, is_dead: bool, /) -> None: ...
    def round_of(self, handle: int, /) -> int: ...
    def synchronize(self, stream: int, /) -> None: ...

class Plain:
    """The halves as most calls want them; None is returned where a call is another, and nothing has happened then.

    An owner is an `AllToAll`, an option an argument by keyword, in the order of `AllToAll`'s methods.
    """

    def dispatch_send(
        self,
        owner: AllToAll,
        x: object,
        topk_ids: object,
        topk_weights: object,
        scales: object,
        num_valid_tokens: object,
        out: object,
        out_scales: object,
        expert_stats: object,
        wait_stats: object,
        /,
    ) -> PendingDispatch | None: ...
    def dispatch_recv(self, pending: PendingDispatch, /) -> Dispatched | None: ...
    def combine_send(
        self,
        owner: AllToAll,
        expert_out: object,
        recv: object,
        topk_weights: object,
        out: object,
        wait_stats: object,
        /,
    ) -> PendingCombine | None: ...
    def combine_recv(self, pending: PendingCombine, /) -> Tensor | None: ...

    # Both halves, by one kernel where that can be.
    def dispatch(
        self,
        owner: AllToAll,
        x: object,
        topk_ids: object,
        topk_weights: object,
        scales: object,
        num_valid_tokens: object,
        out: object,
        out_scales: object,
        expert_stats: object,
        wait_stats: object,
        /,
    ) -> Dispatched | None: ...
    def combine(
        self,
        owner: AllToAll,
        expert_out: object,
        recv: object,
        topk_weights: object,
        out: object,
        wait_stats: object,
        /,
    ) -> Tensor | None: ...

def plain(
    *,
    engine: Engine,
    device_index: int,
    current_stream: Callable[[], int] | None,
    inputs: Sequence[tuple[Tensor, int]],
    sequence: object,
    rounds: list[Round | None],
    handles: list[int],
    shown: list[SlotBuffers | None],
    stages: tuple[Stage, ...],
    classes: dict[str, type],
) -> Plain | None:
    """What makes an engine's plain calls; None where this torch cannot be asked for tensors.

    Args:
        engine: that launches.
        device_index: of the CUDA device, -1 for memory of the host.
        current_stream: None is torch's.
        inputs: a tensor of each dtype that x may have without scales, and what the engine calls it, or -1.
        sequence: of the eager rounds.
        rounds: the last of each slot.
        handles: of each slot.
        shown: the result of each slot.
        stages: in order.
        classes: see `moebius.cuda.plain`.
    """

def num_devices() -> int: ...
def num_multiprocessors(device: int, /) -> int: ...
def capture_id(stream: int, /) -> int: ...
