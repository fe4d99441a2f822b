"""Records which experts tokens were routed to in a live run, layer by layer: MOEBIUS_VLLM_TRACE=FILE.

Each rank writes a file of its own, `FILE` with `.rank0` and so on before its suffix, by `torch.save`:

    {"num_experts": E, "num_topk": K, "layers": {name: int16 [tokens, K]}}

Tokens are in the order in which this rank dispatched them, its prompts' and those that it generated; -1 is a token that
goes nowhere. What vLLM runs to warm up, or to keep an idle rank in step, is left out, and so is what runs in a CUDA
graph, as no Python of ours runs then.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import multiprocessing.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from moebius import env

if TYPE_CHECKING:
    from torch import Tensor

MOST_TOKENS = 1 << 20  # of a layer: 16 MiB at top-8; what comes after is not recorded
_log = logging.getLogger("moebius")
_recorders: dict[tuple[int, int], Recorder] = {}


@dataclasses.dataclass
class Recorder:
    """The routing of this rank's tokens, for all layers with as many experts.

    Attributes:
        path: where it is written.
        num_experts: E.
        num_topk: K.
    """

    path: Path
    num_experts: int
    num_topk: int

    def __post_init__(self) -> None:
        """Arrange for the file to be written when the process ends."""
        self._names: dict[int, str] = {}
        self._parts: dict[str, list[Tensor]] = {}
        self._tokens: dict[str, int] = {}
        self._written = 0
        atexit.register(self.write)
        # vLLM's workers are processes of multiprocessing, which end without the above.
        multiprocessing.util.Finalize(None, self.write, exitpriority=100)

    def add(self, layer: object, topk_ids: Tensor) -> None:
        """Record one call of a layer, told from others by identity; named in the order of their first calls."""
        context = get_forward_context()
        if context.attn_metadata is None:  # a dummy run
            return
        if topk_ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # copying to the host waits for the device; and replays would not come here
        if id(layer) not in self._names:
            names = [name for name, module in context.no_compile_layers.items() if isinstance(module, MoERunner)]
            at = len(self._names)
            self._names[id(layer)] = names[at] if at < len(names) else f"moe.{at}"
        name = self._names[id(layer)]
        have = self._tokens.get(name, 0)
        part = topk_ids[: MOST_TOKENS - have].to(device="cpu", dtype=torch.int16, copy=True)
        self._parts.setdefault(name, []).append(part)
        self._tokens[name] = have + part.shape[0]
        # Killed processes write nothing at their end: now and then, so that copying stays a small share.
        if sum(self._tokens.values()) > 2 * self._written + 1000:
            self.write()

    def write(self) -> None:
        """Write the file anew; whoever reads it meanwhile has the one before."""
        total = sum(self._tokens.values())
        if total == self._written:
            return
        self._parts = {name: [torch.cat(parts)] for name, parts in self._parts.items()}
        layers = {name: parts[0] for name, parts in self._parts.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        torch.save({"num_experts": self.num_experts, "num_topk": self.num_topk, "layers": layers}, beside)
        beside.replace(self.path)
        self._written = total


def recorder(num_experts: int, num_topk: int, rank: int) -> Recorder | None:
    """That of layers of a shape, or None where nothing is to be recorded."""
    asked = env.vllm_trace()
    if asked is None:
        return None
    shape = (num_experts, num_topk)
    if shape not in _recorders:
        path = Path(asked)
        other = f".experts{num_experts}-top{num_topk}" if _recorders else ""  # a model with layers of several shapes
        _recorders[shape] = Recorder(path.with_name(f"{path.stem}.rank{rank}{other}{path.suffix}"), *shape)
        _log.info("moebius records the routing of rank %d in %s", rank, _recorders[shape].path)
    return _recorders[shape]
