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


def has_memory(tensor: Tensor) -> bool:
    """Whether the elements lie in memory as they are: not those of a tracer, a freed storage, a lazy negation."""
    if tensor.is_neg() or (type(tensor) not in _PLAIN and isinstance(tensor, FakeTensor)):
        return False
    return tensor.data_ptr() != 0 or tensor.numel() == 0


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


def is_at(tensor: Tensor, index: int) -> bool:
    """Whether the tensor lies on the CPU (index -1), or on the CUDA device of that index."""
    return tensor.is_cpu if index == CPU else tensor.get_device() == index


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
) -> tuple[int, ...]:
    """Check a dense tensor of one of `dtypes`. On every call's path: each property is read once.

    Args:
        name: of the argument.
        tensor: what came.
        shape: expected sizes.
        dtypes: those allowed.
        rows: only the last dimension has to be contiguous; the others may have any stride.
        index: of the CUDA device that it has to be on, -1 for the CPU.

    Returns:
        The tensor's strides, in elements.

    Raises:
        ShapeError: it is anything else.
    """
    # What is no tensor, or none with strides, lacks one of these. `contextlib.suppress` costs more than the checks.
    try:
        if is_at(tensor, index) and tensor.dtype in dtypes and tensor.shape == shape:
            strides: tuple[int, ...] = tensor.stride()
            if ((rows and strides[-1] == 1) or tensor.is_contiguous()) and has_memory(tensor):
                return strides
    except (AttributeError, RuntimeError, TypeError):
        pass
    sizes = ", ".join(str(size) for size in shape)
    contiguity = "contiguous rows" if rows else "contiguous"
    names = " or ".join(str(dtype) for dtype in dtypes)
    raise fail(name, f"[{sizes}] {names} on {place_name(index)}, {contiguity}", tensor)


def check_matrix(
    name: str, tensor: Any, shape: tuple[int, int], dtypes: Sequence[torch.dtype], index: int = CPU
) -> Tensor:
    """Check a matrix that is small enough to be copied when its rows are not adjacent.

    Returns:
        It, contiguous.

    Raises:
        ShapeError: shape, dtype or device is another.
    """
    strides = check_tensor(name, tensor, shape, dtypes, rows=True, index=index)
    checked: Tensor = tensor
    return checked if strides[0] == shape[1] else checked.contiguous()
