"""The extension with the CUDA engine. Addresses, handles and streams are ints; strides are bytes.

A half returns 0 when it is enqueued, 1 when it is not because an earlier one failed (`take_fault` tells), and 2 when
the stream is not part of the capture that the round belongs to. Everything may raise `CudaError`.
"""

from collections.abc import Sequence
from typing import Any

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
    def has_fault(self) -> bool: ...
    def take_fault(self) -> dict[str, Any] | None: ...
    def num_rounds(self) -> int: ...
    def remote_bytes(self) -> int: ...
    def dead(self) -> list[bool]: ...
    def mask(self, rank: int, is_dead: bool, /) -> None: ...
    def round_of(self, handle: int, /) -> int: ...
    def synchronize(self, stream: int, /) -> None: ...

def num_devices() -> int: ...
def num_multiprocessors(device: int, /) -> int: ...
def capture_id(stream: int, /) -> int: ...
