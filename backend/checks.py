"""Checks of the tensors that callers pass: by name, with what was expected and what came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

INDEX_DTYPES = (torch.int64, torch.int32)


def describe(tensor: Any) -> str:
    """What came, for an error message."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}"


def fail(name: str, expected: str, tensor: Any) -> ShapeError:
    """The error of a tensor that is not as expected."""
    return ShapeError(f"`{name}` must be {expected} (got {describe(tensor)})")


def check_tensor(
    name: str, tensor: Any, shape: Sequence[int | None], dtypes: Sequence[torch.dtype], *, rows: bool = False
) -> None:
    """Check a dense CPU tensor of one of `dtypes`; None in `shape` leaves that dimension free.

    Args:
        name: of the argument.
        tensor: what came.
        shape: expected sizes.
        dtypes: those allowed.
        rows: only the last dimension has to be contiguous; the others may have any stride.

    Raises:
        ShapeError: it is anything else.
    """
    if isinstance(tensor, Tensor) and tensor.dtype in dtypes and tensor.device.type == "cpu":
        sizes = tensor.shape
        if len(sizes) == len(shape) and tensor.layout is torch.strided:
            fits = all(want is None or have == want for have, want in zip(sizes, shape, strict=True))
            if fits and (is_row_contiguous(tensor) if rows else tensor.is_contiguous()):
                return
    sizes_wanted = ", ".join("any" if size is None else str(size) for size in shape)
    contiguity = "contiguous rows" if rows else "contiguous"
    names = " or ".join(str(dtype) for dtype in dtypes)
    raise fail(name, f"[{sizes_wanted}] {names} on cpu, {contiguity}", tensor)


def is_row_contiguous(tensor: Tensor) -> bool:
    """Whether the last dimension is contiguous and no other runs backwards or overlaps it."""
    return tensor.is_contiguous() or tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 or tensor.numel() == 0


def check_index(name: str, tensor: Any, num_rows: int, num_cols: int) -> Tensor:
    """Check a [num_rows, num_cols] index tensor; returned contiguous, copied if it has to be.

    Raises:
        ShapeError: shape, dtype or device is another.
    """
    check_tensor(name, tensor, (num_rows, num_cols), INDEX_DTYPES, rows=True)
    checked: Tensor = tensor
    return checked if checked.is_contiguous() else checked.contiguous()


def check_weights(name: str, tensor: Any, num_rows: int, num_cols: int) -> Tensor:
    """Check [num_rows, num_cols] fp32 weights; returned contiguous, copied if they have to be.

    Raises:
        ShapeError: shape, dtype or device is another.
    """
    check_tensor(name, tensor, (num_rows, num_cols), (torch.float32,), rows=True)
    checked: Tensor = tensor
    return checked if checked.is_contiguous() else checked.contiguous()
