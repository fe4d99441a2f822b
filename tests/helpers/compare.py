"""Compare to the bit, and say where and what when it differs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, so that -0.0 and 0.0 differ and NaN equals itself."""
    return tensor.contiguous().view(BITS[tensor.element_size()])


def assert_same(
    got: Tensor, want: Tensor, what: str, *, any_nan: bool = False, label: Callable[[Tensor], str] | None = None
) -> None:
    """Fail unless both hold the same bits.

    Args:
        got: what came.
        want: what should have.
        what: names the tensor in the message.
        any_nan: a NaN equals any other NaN; for results of arithmetic, whose NaN bits the hardware chooses.
        label: reads who a row is; tells the rows apart in the message.

    Raises:
        AssertionError: names the first coordinate that differs, both values, and how many differ.
    """
    assert isinstance(got, Tensor), f"{what}: expected a tensor (got {type(got).__name__})"
    assert got.dtype == want.dtype, f"{what}: expected dtype {want.dtype} (got {got.dtype})"
    assert got.shape == want.shape, f"{what}: expected shape {tuple(want.shape)} (got {tuple(got.shape)})"
    differs = as_bits(got) != as_bits(want)
    if any_nan and got.is_floating_point():
        got_nan, want_nan = got.float().isnan(), want.float().isnan()
        differs &= ~(got_nan & want_nan)
    if not bool(differs.any()):
        return
    where = tuple(int(place) for place in differs.nonzero()[0])
    message = (
        f"{what}{list(where)}: expected {want[where].item()!r} (got {got[where].item()!r}); "
        f"{int(differs.sum())} of {differs.numel()} differ{specials(got, want)}"
    )
    if label is not None and got.dim() > 1:
        message += f"; expected the row of {label(want[where[:-1]])} (got the row of {label(got[where[:-1]])})"
    raise AssertionError(message)


def specials(got: Tensor, want: Tensor) -> str:
    """Where the NaN or the infinities differ, the first thing to know."""
    if not got.is_floating_point():
        return ""
    notes = []
    for name, test in (("NaN", torch.isnan), ("inf", torch.isinf)):
        counts = [int(test(values.float()).sum()) for values in (want, got)]
        if counts[0] != counts[1]:
            notes.append(f"{name}: expected {counts[0]} (got {counts[1]})")
    return "".join(f", {note}" for note in notes)
