"""Turns the tensors of a call into what the engine takes, after checking all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .checks import (
    CPU,
    FLOAT,
    INDEX_DTYPES,
    address_of,
    check_matrix,
    check_tensor,
    fail,
    misaligned,
    place_name,
)
from .config import SCALE_GROUP
from .wire import DTYPE_CODE

if TYPE_CHECKING:
    from torch import Tensor

    from .config import Config
    from .errors import ShapeError
    from .wire import Wire

# What dispatch receive takes: tensors to receive into, statistics, and what these are kept alive by.
Receiving = tuple["tuple[Tensor | None, Tensor | None] | None", tuple[int, bool, int], object]
PLAIN_RECEIVING: Receiving = (None, (0, False, 0), None)

NOT_QUANTISED = -1
SCALE_ALIGNMENT = 4  # bytes; of a scale as a device reads it


class Place(NamedTuple):
    """Where an engine wants the tensors of its calls.

    Attributes:
        device_index: of the CUDA device, -1 for memory of the host.
        alignment: that addresses of rows are multiples of, in bytes.
        reads_late: the values are read after the call has returned.
    """

    device_index: int = CPU
    alignment: int = 1
    reads_late: bool = False


class Arguments:
    """The checks of one configuration on one rank."""

    def __init__(self, config: Config, wire: Wire, num_ranks: int, place: Place) -> None:
        """Take what all calls are checked against."""
        self._index, self._alignment, self._reads_late = place
        self._scale_alignment = min(self._alignment, SCALE_ALIGNMENT)
        self._config = config
        self._wire = wire
        self._num_ranks = num_ranks
        self._num_local = config.num_local_experts(num_ranks)
        self._num_rows = num_ranks * config.max_num_tokens
        self._has_weights = config.weights_at == "dispatch"
        self._can_quantise = config.payload == "fp8_e4m3"
        self._most_tokens = config.max_num_tokens
        self._is_opaque = config.payload == "opaque"
        self._payload_bytes, self._payload_len = wire.payload_bytes, wire.payload_len
        self._num_topk = config.num_topk
        self._has_scales = wire.scale_dtype is not None
        self._output_dtypes = (wire.output_dtype,)
        self._output_size = wire.output_dtype.itemsize
        self._expert_out_shape: tuple[int, ...] = (self._num_local, self._num_rows, wire.hidden)
        if config.layout == "token_major":
            self._expert_out_shape = self._expert_out_shape[1:]
        # Bytes that a stride of the experts' outputs counts; none where there is one element along it or none.
        num_experts = self._num_local if len(self._expert_out_shape) == 3 else 1
        self._expert_unit = self._output_size if num_experts > 1 else 0
        self._row_unit = self._output_size if self._num_rows > 1 else 0
        self._x_dtypes: tuple[torch.dtype, ...] = (wire.dtype,)
        if self._can_quantise:
            self._x_dtypes = (*DTYPE_CODE, torch.float8_e4m3fn)

    def dispatch(
        self, x: Any, topk_ids: Any, topk_weights: Any, scales: Any, num_valid_tokens: Any
    ) -> tuple[tuple[int, ...], int, tuple[Tensor, Tensor | None]]:
        """Check the inputs of dispatch send.

        Returns:
            The engine's arguments; T; what was made here and has to live until the call returns. The last three of the
            arguments are the tokens to send and, for an engine that reads late, where the number of the valid ones is
            and whether it is int64.

        Raises:
            ShapeError: names the argument.
        """
        num_tokens, x_ptr, x_stride, x_dtype = self._check_x(x)
        if (x_ptr | x_stride) & (self._alignment - 1):
            raise misaligned("x", self._alignment, x)
        shape = (num_tokens, self._num_topk)
        ids_ptr, ids = check_matrix("topk_ids", topk_ids, shape, INDEX_DTYPES, self._index)
        weights_ptr, weights = 0, None
        if self._has_weights:
            weights_ptr, weights = check_matrix("topk_weights", topk_weights, shape, FLOAT, self._index)
        elif topk_weights is not None:
            raise fail("topk_weights", "None: this config takes the weights at combine", topk_weights)

        x_code, scales_ptr, scales_stride = NOT_QUANTISED, 0, 0
        if self._can_quantise and x_dtype in DTYPE_CODE:
            x_code = DTYPE_CODE[x_dtype]
            if scales is not None:
                raise fail("scales", f"None: x in {x_dtype} is quantised on the way", scales)
        elif self._has_scales:
            scales_ptr, scales_stride = self._check_scales(scales, num_tokens)
        elif scales is not None:
            raise fail("scales", "None: this payload has no scales", scales)

        num_sent, valid_ptr, has_int64_valid = num_tokens, 0, False
        if num_valid_tokens is not None:
            num_sent, valid_ptr, has_int64_valid = self._num_valid(num_valid_tokens, num_tokens)
        sent = (
            x_ptr,
            x_stride,
            x_code,
            scales_ptr,
            scales_stride,
            ids_ptr,
            ids.dtype is torch.int64,
            weights_ptr,
            num_sent,
            valid_ptr,
            has_int64_valid,
        )
        return sent, num_tokens, (ids, weights)

    def _check_x(self, x: Any) -> tuple[int, int, int, torch.dtype]:
        """Check x; returns T, its address, the bytes from row to row, and its dtype."""
        # What is no tensor, or no matrix with strides, lacks one of these. `contextlib.suppress` costs more.
        try:
            num_tokens, length = x.shape
            dtype = x.dtype
            size = dtype.itemsize
            if self._is_opaque:
                fits = length * size == self._payload_bytes
            else:
                fits = length == self._payload_len and dtype in self._x_dtypes
            is_there = x.is_cpu if self._index == CPU else x.get_device() == self._index
            if fits and is_there and num_tokens <= self._most_tokens:
                row, step = x.stride()
                address = address_of(x) if step == 1 or x.is_contiguous() else None
                if address is not None:
                    # Rows of which there is one or none may stand apart in any way.
                    return num_tokens, address, row * size if num_tokens > 1 else 0, dtype
        except (AttributeError, RuntimeError, TypeError, ValueError):
            pass
        raise self._bad_x(x)

    def _bad_x(self, x: Any) -> ShapeError:
        most = f"[T <= {self._config.max_num_tokens}, "
        if self._config.payload == "opaque":
            what = f"rows of {self._wire.payload_bytes} bytes]"
        else:
            what = f"{self._wire.payload_len}] {' or '.join(str(dtype) for dtype in self._x_dtypes)}"
        return fail("x", f"{most}{what} on {place_name(self._index)}, contiguous rows", x)

    def _check_scales(self, scales: Any, num_tokens: int) -> tuple[int, int]:
        """Check scales that the caller made; returns their address and the bytes from row to row."""
        if self._config.scale_format == "ue8m0":
            raise fail("x", "bf16, fp16 or fp32: UE8M0 scales are made here, with the quantisation", scales)
        dtypes, length = FLOAT, self._config.hidden // SCALE_GROUP
        if self._config.payload == "opaque":
            wanted = f"[{num_tokens}, rows of {self._wire.scale_bytes} bytes] on {place_name(self._index)}"
            if not isinstance(scales, torch.Tensor) or self._wire.scale_bytes % scales.dtype.itemsize:
                raise fail("scales", wanted, scales)
            dtypes, length = (scales.dtype,), self._wire.scale_bytes // scales.dtype.itemsize
        shape = (num_tokens, length)
        address, strides = check_tensor("scales", scales, shape, dtypes, rows=True, index=self._index)
        row_bytes = strides[0] * scales.dtype.itemsize if num_tokens > 1 else 0
        if (address | row_bytes) & (self._scale_alignment - 1):
            raise misaligned("scales", self._scale_alignment, scales)
        return address, row_bytes

    def _num_valid(self, num_valid_tokens: Any, num_tokens: int) -> tuple[int, int, bool]:
        if not isinstance(num_valid_tokens, torch.Tensor) or num_valid_tokens.numel() != 1:
            raise fail("num_valid_tokens", "a tensor of one int32 or int64", num_valid_tokens)
        shape = tuple(num_valid_tokens.shape)
        address, _ = check_tensor("num_valid_tokens", num_valid_tokens, shape, INDEX_DTYPES, index=self._index)
        if self._reads_late:
            return num_tokens, address, num_valid_tokens.dtype is torch.int64
        return min(max(int(num_valid_tokens), 0), num_tokens), 0, False

    def receiving(self, out: Any, out_scales: Any, expert_stats: Any, wait_stats: Any) -> Receiving:
        """Check what a dispatch is to be received into, and what it is to count."""
        if out is None and out_scales is None and expert_stats is None and wait_stats is None:
            return PLAIN_RECEIVING
        given = (out, out_scales) if out is not None or out_scales is not None else None
        if given is not None:
            self.out(*given)
        counters = self.expert_stats(expert_stats) if expert_stats is not None else (0, False)
        stats = (*counters, self.wait_stats(wait_stats) if wait_stats is not None else 0)
        return given, stats, (expert_stats, wait_stats)

    def out(self, out: Any, out_scales: Any) -> None:
        """Check the tensors that a dispatch is to be received into.

        Raises:
            ShapeError: one of them does not fit, or the layout is token_major, which shows the heap itself.
        """
        if self._config.layout == "token_major":
            name, given = ("out", out) if out is not None else ("out_scales", out_scales)
            raise fail(name, "None: token_major shows the tokens in place", given)
        rows = (self._num_local, self._num_rows)
        if out is not None:
            shape = (*rows, self._wire.payload_len)
            address, _ = check_tensor("out", out, shape, (self._wire.dtype,), index=self._index)
            if address & (self._alignment - 1):
                raise misaligned("out", self._alignment, out)
        if out_scales is not None:
            if self._wire.scale_dtype is None:
                raise fail("out_scales", "None: this payload has no scales", out_scales)
            shape = (*rows, self._wire.scale_len)
            # Row-major or column-major in the last two dimensions.
            is_tensor = isinstance(out_scales, torch.Tensor) and out_scales.dim() == 3
            as_rows = out_scales.transpose(1, 2) if is_tensor and out_scales.stride(-1) != 1 else out_scales
            wanted = (shape[0], shape[2], shape[1]) if as_rows is not out_scales else shape
            address, _ = check_tensor("out_scales", as_rows, wanted, (self._wire.scale_dtype,), index=self._index)
            if address & (self._scale_alignment - 1):
                raise misaligned("out_scales", self._scale_alignment, out_scales)

    def expert_stats(self, stats: Any) -> tuple[int, bool]:
        """Check a counter per local expert; returns its address and whether it is int64."""
        address, _ = check_tensor("expert_stats", stats, (self._num_local,), INDEX_DTYPES, index=self._index)
        return address, stats.dtype is torch.int64

    def wait_stats(self, stats: Any) -> int:
        """Check a counter per source rank; returns its address."""
        address, _ = check_tensor("wait_stats", stats, (self._num_ranks,), (torch.int64,), index=self._index)
        return address

    def expert_out(self, expert_out: Any) -> tuple[int, int, int]:
        """Check the experts' outputs; returns address, bytes from expert to expert and from row to row."""
        shape = self._expert_out_shape
        address, strides = check_tensor(
            "expert_out", expert_out, shape, self._output_dtypes, rows=True, index=self._index
        )
        expert_bytes = strides[0] * self._expert_unit
        row_bytes = strides[-2] * self._row_unit
        if (address | expert_bytes | row_bytes) & (self._alignment - 1):
            raise misaligned("expert_out", self._alignment, expert_out)
        return address, expert_bytes, row_bytes

    def combine_weights(self, topk_weights: Any, num_tokens: int) -> Tensor | None:
        """Check the weights that combine is given."""
        if self._has_weights:
            if topk_weights is not None:
                raise fail("topk_weights", "None: this config takes the weights at dispatch", topk_weights)
            return None
        return check_matrix("topk_weights", topk_weights, (num_tokens, self._num_topk), FLOAT, self._index)[1]

    def combined(self, out: Any, num_tokens: int) -> int:
        """Check the tensor that a combine is to be received into; returns the bytes from row to row."""
        shape = (num_tokens, self._wire.hidden)
        address, strides = check_tensor("out", out, shape, self._output_dtypes, rows=True, index=self._index)
        if strides[0] < shape[1] and num_tokens > 1:
            raise fail("out", "rows that do not overlap", out)
        row_bytes = strides[0] * self._output_size
        if (address | (row_bytes if num_tokens > 1 else 0)) & (self._alignment - 1):
            raise misaligned("out", self._alignment, out)
        return row_bytes
