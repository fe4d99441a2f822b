"""Checks of the tensors that callers pass: by name, with what was expected and what came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .errors import ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

INDEX_DTYPES = (torch.int64, torch.int32)
FLOAT = (torch.float32,)


_PLAIN = (Tensor, torch.nn.Parameter)


def address_of(tensor: Tensor) -> int | None:
    """Where the elements lie, 0 if there are none.

    None if they do not lie in memory as they are: those of a tracer, a freed storage, a lazy negation.
    """
    if tensor.is_neg() or (type(tensor) not in _PLAIN and isinstance(tensor, FakeTensor)):
        return None
    address = tensor.data_ptr()
    return address if address or tensor.numel() == 0 else None


def describe(tensor: Any) -> str:
    """What came, for an error message."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device} with strides {list(tensor.stride())}"


def fail(name: str, expected: str, tensor: Any) -> ShapeError:
    """The error of a tensor that is not as expected."""
    return ShapeError(f"`{name}` must be {expected} (got {describe(tensor)})")


CPU = -1


def place_name(index: int) -> str:
    """What torch calls the device of that index."""
    return "cpu" if index == CPU else f"cuda:{index}"


def misaligned(name: str, alignment: int, tensor: Any) -> ShapeError:
    """The error of a tensor whose rows do not begin where a device can copy them from."""
    return fail(name, f"at an address, and with rows, that are multiples of {alignment} bytes", tensor)


def check_tensor(
    name: str,
    tensor: Any,
    shape: tuple[int, ...],
    dtypes: Sequence[torch.dtype],
    *,
    rows: bool = False,
    index: int = CPU,
) -> tuple[int, tuple[int, ...]]:
    """Check a dense tensor of one of `dtypes`. On every call's path: each property is read once, in few calls.

    Args:
        name: of the argument.
        tensor: what came.
        shape: expected sizes.
        dtypes: those allowed.
        rows: only the last dimension has to be contiguous; the others may have any stride.
        index: of the CUDA device that it has to be on, -1 for the CPU.

    Returns:
        The tensor's address, and its strides in elements.

    Raises:
        ShapeError: it is anything else.
    """
    # What is no tensor, or none with strides, lacks one of these. `contextlib.suppress` costs more than the checks.
    try:
        # get_device() tells the CPU from a GPU, not from what is neither.
        is_there = tensor.is_cpu if index == CPU else tensor.get_device() == index
        if is_there and tensor.dtype in dtypes and tensor.shape == shape:
            strides: tuple[int, ...] = tensor.stride()
            if (rows and strides[-1] == 1) or tensor.is_contiguous():
                address = address_of(tensor)
                if address is not None:
                    return address, strides
    except (AttributeError, RuntimeError, TypeError):
        pass
    sizes = ", ".join(str(size) for size in shape)
    contiguity = "contiguous rows" if rows else "contiguous"
    names = " or ".join(str(dtype) for dtype in dtypes)
    raise fail(name, f"[{sizes}] {names} on {place_name(index)}, {contiguity}", tensor)


def check_matrix(
    name: str, tensor: Any, shape: tuple[int, int], dtypes: Sequence[torch.dtype], index: int = CPU
) -> tuple[int, Tensor]:
    """Check a matrix that is small enough to be copied when its rows are not adjacent.

    Returns:
        Its address, and it, contiguous.

    Raises:
        ShapeError: shape, dtype or device is another.
    """
    address, strides = check_tensor(name, tensor, shape, dtypes, rows=True, index=index)
    checked: Tensor = tensor
    if strides[0] != shape[1]:
        checked = tensor.contiguous()
        address = checked.data_ptr()
    return address, checked
