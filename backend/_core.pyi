"""The core extension. Addresses are ints; strides are bytes."""

from collections.abc import Sequence
from typing import Any

from typing_extensions import Buffer

class Shape:
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
        has_outbox: bool = False,
    ) -> None: ...

class HeapLayout:
    def __init__(self, shape: Shape) -> None: ...
    @property
    def total(self) -> int: ...
    @property
    def cell_bytes(self) -> int: ...
    @property
    def scales_in_cell(self) -> int: ...
    @property
    def ids_in_cell(self) -> int: ...
    @property
    def reply_stride(self) -> int: ...
    def cell(self, slot: int, src_rank: int, i: int) -> int: ...
    def regions(self) -> list[tuple[str, int]]: ...

class Segment:
    @staticmethod
    def create(num_bytes: int) -> Segment: ...
    @staticmethod
    def attach(pid: int, fd: int, num_bytes: int) -> Segment: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def fd(self) -> int: ...
    def close_fd(self) -> None: ...

class Network:
    # To be implemented in Python: called with the GIL, from the thread that runs a half, and must not raise.
    # `data` is the address of `num_bytes` bytes that stay as they are until the next `quiet`.
    def __init__(self) -> None: ...
    def put_signal(self, dst: int, offset: int, data: int, num_bytes: int, signal: int, word: int) -> None: ...
    def put(self, dst: int, offset: int, data: int, num_bytes: int) -> None: ...
    def quiet(self, timeout_ns: int) -> int: ...
    def give_up(self, dst: int, is_given_up: bool) -> None: ...

NO_SIGNAL: int

def deliver(
    layout: HeapLayout, heap: Segment, src: int, offset: int, data: Buffer, signal: int, word: int, /
) -> bool: ...

class EmulatedNetwork:
    def __init__(
        self,
        *,
        layout: HeapLayout,
        heaps: Sequence[Segment],
        seed: int,
        latency_ns: int,
        max_delay_ns: int,
        max_piece_bytes: int,
        bytes_per_ns: float,
    ) -> None: ...
    def way_out(self, rank: int, /) -> Network: ...
    def cut(self, a: int, b: int, after_ns: int, is_stalled: bool, /) -> None: ...
    def traffic(self, rank: int, /) -> tuple[int, int, int]: ...
    @property
    def num_refused(self) -> int: ...
    def wait_idle(self, timeout_ns: int, /) -> bool: ...

class Engine:
    def __init__(
        self,
        *,
        shape: Shape,
        is_token_major: bool,
        scale_format: int,
        output_dtype: int,
        hidden: int,
        timeout_ns: int,
        num_cores: int,
        rank: int,
        heaps: Sequence[Segment | None],
        pids: Sequence[int],
        simd: str,
        network: Network | None = None,
        chunk_bytes: int = 0,
    ) -> None: ...
    def dispatch_send(
        self,
        x: int,
        x_stride: int,
        x_dtype: int,
        scales: int,
        scales_stride: int,
        topk_ids: int,
        has_int64_ids: bool,
        topk_weights: int,
        num_tokens: int,
        /,
    ) -> bool: ...
    def dispatch_recv(
        self,
        epoch: int,
        x: int,
        scales: int,
        expert_stride: int,
        row_stride: int,
        group_stride: int,
        scale_element: int,
        src_info: int,
        layout_range: int,
        expert_num_tokens: int,
        src_num_tokens: int,
        expert_stats: int,
        has_int64_stats: bool,
        wait_stats: int,
        /,
    ) -> bool: ...
    def combine_send(self, epoch: int, expert_out: int, expert_stride: int, row_stride: int, /) -> bool: ...
    def combine_recv(
        self, epoch: int, out: int, out_stride: int, num_tokens: int, topk_weights: int, wait_stats: int, /
    ) -> bool: ...
    @property
    def num_rounds(self) -> int: ...
    @property
    def remote_bytes(self) -> int: ...
    def is_dead(self, rank: int) -> bool: ...
    def mask(self, rank: int, is_dead: bool) -> None: ...
    def fault(self) -> dict[str, Any]: ...

def simd_levels() -> list[str]: ...
