"""The engines that run the halves, and how one is made. Today: the CPU engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import native
from .wire import DTYPE_CODE, SCALE_FORMAT_CODE, Wire, shape_of

if TYPE_CHECKING:
    from . import _core
    from .config import Config
    from .heap import SymmetricHeap


def make_cpu_engine(config: Config, heap: SymmetricHeap) -> _core.Engine:
    """Make the CPU engine of one rank over heaps that are mapped already."""
    wire = Wire.of(config)
    engine: _core.Engine = native.core().Engine(
        shape=shape_of(config, heap.num_ranks),
        is_token_major=config.layout == "token_major",
        scale_format=SCALE_FORMAT_CODE[config.scale_format],
        output_dtype=DTYPE_CODE[wire.output_dtype],
        hidden=config.hidden,
        timeout_ns=round(config.timeout_s * 1e9),
        num_cores=heap.num_cores,
        rank=heap.rank,
        heaps=heap.segments,
        pids=heap.pids,
        simd=native.simd_level(),
    )
    return engine
