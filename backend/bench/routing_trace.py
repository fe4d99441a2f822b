"""Routings recorded from a model that served, to be replayed instead of drawn ones."""

from __future__ import annotations

import dataclasses
import functools
import os
import pickle
import zipfile
from typing import Any

import torch
from torch import Tensor

from moebius.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RoutingTrace:
    """The experts of recorded tokens, layer by layer.

    Attributes:
        num_experts: E.
        num_topk: K.
        layers: [N, K] int32 of each layer, in the order of recording; -1 is unrouted, no row is all unrouted.
    """

    num_experts: int
    num_topk: int
    layers: tuple[Tensor, ...]

    def sample(self, layer: int, num_tokens: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """The routing of `num_tokens` recorded one after the other, from a random place, round the end.

        Neighbours stay neighbours: what makes recorded batches uneven is that their tokens are alike.

        Returns:
            topk_ids [T, K] int32 and topk_weights [T, K] fp32, equal over the choices of a token.
        """
        recorded = self.layers[layer % len(self.layers)]
        # The place is a share of the recording, so that layers of other lengths give about the same tokens.
        first = int(torch.rand(1, generator=random, dtype=torch.float64).item() * len(recorded))
        ids = recorded[torch.arange(first, first + num_tokens) % len(recorded)]
        valid = (ids >= 0).float()
        return ids, valid / valid.sum(1, keepdim=True)


def read_routing_trace(path: str | os.PathLike[str]) -> RoutingTrace:
    """Read a `.pt` or `.npz` file; the same file is read once a process.

    A `.pt` holds {"num_experts": E, "num_topk": K, "layers": {name: integers [N, K]}}, or one tensor [steps, tokens, K]
    or [N, K]; an `.npz` holds an array a layer, and perhaps `num_experts`. Where E is not said it is the highest expert
    plus one.

    Raises:
        ConfigError: it holds no such thing.
    """
    return _read(os.fspath(path))


@functools.lru_cache(maxsize=2)
def _read(path: str) -> RoutingTrace:
    try:
        content: Any = _read_npz(path) if path.endswith(".npz") else torch.load(path, weights_only=True)
    except OSError as error:
        raise ConfigError(f"cannot read the routing trace {path}: {error.strerror or error}") from None
    except (RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} is no routing trace: {error}") from None
    if isinstance(content, Tensor):
        content = {"layers": {"0": content}}
    if not isinstance(content, dict) or not isinstance(content.get("layers"), dict) or not content["layers"]:
        raise ConfigError(f'{path} is no routing trace: expected {{"layers": {{name: [tokens, K]}}, ..}}')
    layers = [_layer(path, name, ids) for name, ids in content["layers"].items()]
    highest = max(int(ids.max()) for ids in layers)
    num_experts, num_topk = int(content.get("num_experts") or highest + 1), layers[0].shape[1]
    if any(ids.shape[1] != num_topk for ids in layers) or content.get("num_topk", num_topk) != num_topk:
        raise ConfigError(f"{path}: all layers must have the same top-k (got {[ids.shape[1] for ids in layers]})")
    if highest >= num_experts:
        raise ConfigError(f"{path}: experts must be below {num_experts} (got {highest})")
    return RoutingTrace(num_experts, num_topk, tuple(layers))


def _layer(path: str, name: object, ids: Any) -> Tensor:
    if not isinstance(ids, Tensor) or ids.dim() not in (2, 3) or ids.is_floating_point():
        raise ConfigError(f"{path}: layer {name} must be an integer tensor [tokens, K] or [steps, tokens, K]")
    rows = ids.reshape(-1, ids.shape[-1]).int()
    rows = torch.where(rows < 0, -1, rows)
    rows = rows[(rows >= 0).any(1)]
    if not len(rows):
        raise ConfigError(f"{path}: layer {name} routes no token")
    return rows.contiguous()


def _read_npz(path: str) -> dict[str, Any]:
    try:
        import numpy as np
    except ImportError:
        raise ConfigError("an .npz trace needs numpy: pip install numpy, or save it with torch.save") from None
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    experts = arrays.pop("num_experts", None)
    arrays.pop("num_topk", None)
    return {"num_experts": 0 if experts is None else int(experts), "layers": arrays}


def replayed(path: os.PathLike[str] | None) -> tuple[str, dict[str, int]]:
    """The name of a trace and the shape that it dictates; nothing without one."""
    if path is None:
        return "", {}
    trace = read_routing_trace(path)
    return os.path.abspath(path), {"experts": trace.num_experts, "topk": trace.num_topk}
