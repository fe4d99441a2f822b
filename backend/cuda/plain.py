"""What the extension is told, once, to make a round's plain calls by itself (csrc/bindings/plain.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from moebius import rounds
from moebius.arguments import NOT_QUANTISED
from moebius.results import Dispatched, PendingCombine, PendingDispatch
from moebius.rounds import Round
from moebius.wire import DTYPE_CODE, Wire

if TYPE_CHECKING:
    from moebius.config import Config


def inputs(config: Config) -> list[tuple[torch.Tensor, int]]:
    """Tensors of the dtypes that x may have without scales, and what the engine calls each."""
    if config.payload == "opaque":
        return []  # any dtype: left to Python
    codes = DTYPE_CODE if config.payload == "fp8_e4m3" else {Wire.of(config).dtype: NOT_QUANTISED}
    return [(torch.empty(0, dtype=dtype, device="cpu"), code) for dtype, code in codes.items()]


def classes(sequence: Any) -> dict[str, Any]:
    """Those whose objects the extension makes, reads and changes, by what it calls them."""
    return {
        "sequence": type(sequence),
        "round": Round,
        "dispatched": Dispatched,
        "pending_dispatch": PendingDispatch,
        "pending_combine": PendingCombine,
    }


STAGES = (rounds.SENT, rounds.RECEIVED, rounds.REPLIED, rounds.COMBINED, rounds.LOST, rounds.OVERWRITTEN)
