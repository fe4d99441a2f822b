"""The `AllToAll` objects behind one `Buffer`: one for each shape and wire format that its calls have used."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from moebius.all_to_all import AllToAll
from moebius.config import SCALE_GROUP, Config
from moebius.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

DEPTH = 2  # rounds that may be open at once: two micro-batches; DeepEP allows one dispatch that is not yet received


@dataclasses.dataclass(frozen=True)
class CallShape:
    """What fixes an exchange: shapes, and the format in which tokens travel."""

    num_experts: int
    num_topk: int
    hidden: int
    max_num_tokens: int
    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool

    def canonical(self) -> CallShape:
        """Itself, with the flags of FP8 dropped where they say nothing, as upstream ignores them there."""
        if self.use_fp8 or not (self.round_scale or self.use_ue8m0):
            return self
        return dataclasses.replace(self, round_scale=False, use_ue8m0=False)

    def config(self, timeout_s: float) -> Config:
        """The config of its `AllToAll`.

        Raises:
            ConfigError: shapes or flags are impossible.
        """
        if self.use_fp8 and self.use_ue8m0 and not self.round_scale:
            raise ConfigError("`use_ue8m0` packs exponents: it needs `round_scale=True` (got False)")
        scales = "ue8m0" if self.use_ue8m0 else "pow2" if self.round_scale else "fp32"
        return Config(
            num_experts=self.num_experts,
            num_topk=self.num_topk,
            hidden=self.hidden,
            max_num_tokens=self.max_num_tokens,
            payload="fp8_e4m3" if self.use_fp8 else "bf16",
            scale_format=scales if self.use_fp8 else "fp32",  # type: ignore[arg-type]  # one of three literals
            weights_at="combine",
            output="bf16",
            depth=DEPTH,
            timeout_s=timeout_s,
        )

    def empty_rows(self, num_ranks: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Fresh rows [L, R*M, H] for the tokens received, and their scales as DeepGEMM's TMA wants them: by column."""
        num_local_experts = self.num_experts // num_ranks
        num_rows = num_ranks * self.max_num_tokens
        rows = (num_local_experts, num_rows, self.hidden)
        if not self.use_fp8:
            return torch.empty(rows, dtype=torch.bfloat16, device=device), None
        if self.use_ue8m0:
            columns, dtype = self.hidden // (4 * SCALE_GROUP), torch.int32
        else:
            columns, dtype = self.hidden // SCALE_GROUP, torch.float32
        scales = torch.empty((num_local_experts, columns, num_rows), dtype=dtype, device=device)
        return torch.empty(rows, dtype=torch.float8_e4m3fn, device=device), scales.transpose(1, 2)


class Exchanges:
    """Makes an `AllToAll` where a call shape is first used, and keeps them all until `close()`."""

    def __init__(self, group: Any, timeout_s: float) -> None:
        """Remember who the ranks are."""
        self._group = group
        self._timeout_s = timeout_s
        self._by_shape: dict[tuple[CallShape, torch.device], AllToAll] = {}
        self._masked: set[int] = set()

    def get(self, call_shape: CallShape, device: torch.device) -> AllToAll:
        """The exchange of `call_shape` for tensors on `device`.

        Collective where it is new, which it is on all ranks or on none: they make the same calls.
        """
        found = self._by_shape.get((call_shape, device))
        return found if found is not None else self._make(call_shape, device)

    def _make(self, call_shape: CallShape, device: torch.device) -> AllToAll:
        made = AllToAll(self._group, call_shape.config(self._timeout_s), device)
        for rank in self._masked:
            _mask(made, rank, dead=True)
        self._by_shape[call_shape, device] = made
        return made

    def dead_ranks(self) -> set[int]:
        """Ranks that a timeout or `mask()` has taken out."""
        return self._masked.union(*(exchange.dead_ranks for exchange in self._by_shape.values()))

    def mask(self, rank: int, *, dead: bool) -> None:
        """Take `rank` out of every exchange, or let it in again. Of this rank's view alone, as in DeepEP."""
        for exchange in self._by_shape.values():
            _mask(exchange, rank, dead=dead)
        if dead:
            self._masked.add(rank)
        else:
            self._masked.discard(rank)

    def close(self) -> None:
        """Close them all; not collective."""
        for exchange in self._by_shape.values():
            exchange.close()
        self._by_shape.clear()


def _mask(exchange: AllToAll, rank: int, *, dead: bool) -> None:
    mask_rank = getattr(exchange, "mask_rank", None)
    if mask_rank is None:
        raise UnsupportedError("this engine masks only ranks that fail; masking one by hand is not covered")
    mask_rank(rank, dead=dead)
