"""How much memory a configuration takes, before anything is allocated."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from . import native
from .wire import Wire, shape_of

if TYPE_CHECKING:
    from .config import Config


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory of one rank.

    Attributes:
        regions: (name, bytes) of each part of the symmetric heap, in order.
        heap_bytes: their sum; exactly what `AllToAll` allocates to share.
        output_bytes: the private buffers that expert_major results are packed into, `depth` of them; reserved, and
            touched only as far as tokens arrive. 0 for token_major, which on the CPU shows the heap itself; on CUDA
            a result is a copy, of the rows of one dispatch inbox.
    """

    regions: tuple[tuple[str, int], ...]
    heap_bytes: int
    output_bytes: int


def plan(config: Config, num_ranks: int) -> Plan:
    """Compute the memory of one of `num_ranks` ranks.

    Raises:
        ConfigError: `num_ranks` does not divide the experts.
        NativeNotBuiltError: the extension, which owns the arithmetic, is missing.

    Source: csrc/layout.h.
    """
    layout = native.core().HeapLayout(shape_of(config, num_ranks))
    output_bytes = 0
    if config.layout == "expert_major":
        wire = Wire.of(config)
        rows = config.num_local_experts(num_ranks) * num_ranks * config.max_num_tokens
        output_bytes = config.depth * rows * (wire.payload_bytes + wire.scale_bytes)
    return Plan(tuple(layout.regions()), layout.total, output_bytes)
