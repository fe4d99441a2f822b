"""moebius.graphs: decode steps captured as CUDA graphs, and the schedule of micro-batches.

Layers; imports go down only: `step` -> `capture`, `static` -> `buckets`; `micro_batches` stands alone. All of it runs
on the CPU engine too, where a step is not captured but called. See docs/graphs.md.
"""

from .buckets import Buckets
from .micro_batches import Batch, MicroBatch, Send, interleave, moe_layer, split
from .step import GraphedStep

__all__ = ["Batch", "Buckets", "GraphedStep", "MicroBatch", "Send", "interleave", "moe_layer", "split"]
