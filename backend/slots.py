"""The tensors that results are shown in: views of the heap, and the buffers that rows are packed into."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

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

    # What dispatch receive of the engine takes after the round, up to the statistics: the addresses stay, and are
    # read once. The CUDA engine takes them as one object.
    arguments: tuple[int, ...] = ()
    native: Any = None

    def for_cpu(self) -> SlotBuffers:
        """Itself, with the arguments of the CPU engine."""
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
            _address(scales),
            *strides,
            _address(self.src_info),
            _address(self.layout_range),
            self.expert_num_tokens.data_ptr(),
            self.src_num_tokens.data_ptr(),
        )
        return self

    def for_device(self, extension: Any) -> SlotBuffers:
        """Itself, with the argument of the CUDA engine: scales go word by word, also bytes that are opaque."""
        strides = [0, 0, 0, 0]
        if self.scales is not None:
            size = self.scales.element_size()
            of_rows = [stride * size for stride in self.scales.stride()[:-1]]
            of_words = self.scales.stride(-1) * size if size == SCALE_WORD else SCALE_WORD
            strides = [*([0] * (2 - len(of_rows))), *of_rows, of_words, SCALE_WORD]
        self.native = extension.RecvBuffers(
            self.x.data_ptr(),
            _address(self.scales),
            *strides,
            _address(self.src_info),
            _address(self.layout_range),
            _address(self.topk_ids),
            _address(self.topk_weights),
            self.expert_num_tokens.data_ptr(),
            self.src_num_tokens.data_ptr(),
        )
        return self


SCALE_WORD = 4  # bytes


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _empty_scales(config: Config, wire: Wire, rows: tuple[int, int], device: torch.device | None) -> Tensor | None:
    """Scales of an expert_major result: column-major as DeepGEMM reads them, row-major for opaque ones."""
    if wire.scale_dtype is None:
        return None
    if config.payload == "opaque":
        return torch.empty(*rows, wire.scale_len, dtype=wire.scale_dtype, device=device)
    return torch.empty(rows[0], wire.scale_len, rows[1], dtype=wire.scale_dtype, device=device).transpose(1, 2)


def expert_major(
    config: Config,
    wire: Wire,
    num_ranks: int,
    device: torch.device,
    x: Tensor | None = None,
    scales: Tensor | None = None,
) -> SlotBuffers:
    """Buffers for one expert_major result; `x` and `scales` are made unless given."""
    num_local = config.num_local_experts(num_ranks)
    rows = (num_local, num_ranks * config.max_num_tokens)
    return SlotBuffers(
        x=x if x is not None else torch.empty(*rows, wire.payload_len, dtype=wire.dtype, device=device),
        scales=scales if scales is not None else _empty_scales(config, wire, rows, device),
        expert_num_tokens=torch.empty(num_local, dtype=torch.int32, device=device),
        src_num_tokens=torch.empty(num_ranks, dtype=torch.int32, device=device),
        topk_ids=None,
        topk_weights=None,
        src_info=torch.empty(*rows, dtype=torch.int32, device=device),
        layout_range=torch.empty(num_local, num_ranks, dtype=torch.int64, device=device),
    )


def token_major_copies(config: Config, wire: Wire, num_ranks: int, device: torch.device) -> SlotBuffers:
    """Buffers that a token_major result is copied to, a row per cell."""
    num_rows = num_ranks * config.max_num_tokens
    scales = None
    if wire.scale_dtype is not None:
        scales = torch.empty(num_rows, wire.scale_len, dtype=wire.scale_dtype, device=device)
    return SlotBuffers(
        x=torch.empty(num_rows, wire.payload_len, dtype=wire.dtype, device=device),
        scales=scales,
        expert_num_tokens=torch.empty(config.num_local_experts(num_ranks), dtype=torch.int32, device=device),
        src_num_tokens=torch.empty(num_ranks, dtype=torch.int32, device=device),
        topk_ids=torch.empty(num_rows, config.num_topk, dtype=torch.int32, device=device),
        topk_weights=torch.empty(num_rows, config.num_topk, dtype=torch.float32, device=device),
        src_info=None,
        layout_range=None,
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
        expert_num_tokens=torch.zeros(config.num_local_experts(num_ranks), dtype=torch.int32, device="cpu"),
        src_num_tokens=torch.zeros(num_ranks, dtype=torch.int32, device="cpu"),
        topk_ids=column(layout.ids_in_cell, config.num_topk, torch.int32),
        topk_weights=column(layout.ids_in_cell + ids_bytes, config.num_topk, torch.float32),
        src_info=None,
        layout_range=None,
    )
