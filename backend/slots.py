"""The tensors that a slot's results are shown in: views of the heap, and the buffers that rows are packed into."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from .results import ResultTensors

if TYPE_CHECKING:
    from torch import Tensor

    from . import _core
    from .config import Config
    from .wire import Wire


@dataclasses.dataclass
class SlotBuffers(ResultTensors):
    """Results of one round; shapes and meaning as in `Dispatched`."""

    # What dispatch receive of the engine takes after the epoch, up to the statistics.
    arguments: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Read the addresses once; they stay."""
        # In token_major the heap is shown as it is: the engine gets no address to write to.
        is_expert_major = self.src_info is not None
        scales = self.scales if is_expert_major else None
        strides = [0, 0, 0, 0]
        if scales is not None:
            size = scales.element_size()
            # What lies contiguously is copied in one piece.
            piece = scales.shape[-1] * size if scales.stride(-1) == 1 else size
            strides = [*(stride * size for stride in scales.stride()), piece]
        self.arguments = (
            self.x.data_ptr() if is_expert_major else 0,
            scales.data_ptr() if scales is not None else 0,
            *strides,
            self.src_info.data_ptr() if self.src_info is not None else 0,
            self.layout_range.data_ptr() if self.layout_range is not None else 0,
            self.expert_num_tokens.data_ptr(),
            self.src_num_tokens.data_ptr(),
        )


def empty_scales(config: Config, wire: Wire, num_local_experts: int, num_rows: int) -> Tensor | None:
    """Scales of an expert_major result: column-major as DeepGEMM reads them, row-major for opaque ones."""
    if wire.scale_dtype is None:
        return None
    if config.payload == "opaque":
        return torch.empty(num_local_experts, num_rows, wire.scale_len, dtype=wire.scale_dtype)
    return torch.empty(num_local_experts, wire.scale_len, num_rows, dtype=wire.scale_dtype).transpose(1, 2)


def expert_major(
    config: Config, wire: Wire, num_ranks: int, x: Tensor | None = None, scales: Tensor | None = None
) -> SlotBuffers:
    """Buffers for one expert_major result; `x` and `scales` are made unless given."""
    num_local = config.num_local_experts(num_ranks)
    num_rows = num_ranks * config.max_num_tokens
    return SlotBuffers(
        x=x if x is not None else torch.empty(num_local, num_rows, wire.payload_len, dtype=wire.dtype),
        scales=scales if scales is not None else empty_scales(config, wire, num_local, num_rows),
        expert_num_tokens=torch.zeros(num_local, dtype=torch.int32),
        src_num_tokens=torch.zeros(num_ranks, dtype=torch.int32),
        topk_ids=None,
        topk_weights=None,
        src_info=torch.empty(num_local, num_rows, dtype=torch.int32),
        layout_range=torch.empty(num_local, num_ranks, dtype=torch.int64),
    )


def token_major(
    config: Config, wire: Wire, num_ranks: int, slot: int, heap: _core.Segment, layout: _core.HeapLayout
) -> SlotBuffers:
    """Views of the inbox cells of one slot, a row per cell."""
    num_rows = num_ranks * config.max_num_tokens
    first = layout.cell(slot, 0, 0)
    cells = torch.frombuffer(heap, dtype=torch.uint8, offset=first, count=num_rows * layout.cell_bytes)
    cells = cells.view(num_rows, layout.cell_bytes)

    def column(offset: int, length: int, dtype: torch.dtype) -> Tensor:
        return cells[:, offset : offset + length * dtype.itemsize].view(dtype)

    ids_bytes = config.num_topk * torch.int32.itemsize
    return SlotBuffers(
        x=column(0, wire.payload_len, wire.dtype),
        scales=column(layout.scales_in_cell, wire.scale_len, wire.scale_dtype) if wire.scale_dtype else None,
        expert_num_tokens=torch.zeros(config.num_local_experts(num_ranks), dtype=torch.int32),
        src_num_tokens=torch.zeros(num_ranks, dtype=torch.int32),
        topk_ids=column(layout.ids_in_cell, config.num_topk, torch.int32),
        topk_weights=column(layout.ids_in_cell + ids_bytes, config.num_topk, torch.float32),
        src_info=None,
        layout_range=None,
    )
