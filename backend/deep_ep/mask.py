"""DeepEP's mask of ranks that are taken out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moebius.deep_ep.keywords import strict_keywords
from moebius.errors import ConfigError, ShapeError, StateError

if TYPE_CHECKING:
    from torch import Tensor

    from moebius.deep_ep.low_latency import LowLatency


class Mask:
    """The calls that need `enable_shrink`."""

    enable_shrink: bool
    group_size: int
    _low_latency: LowLatency

    @strict_keywords
    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Take a rank out of later rounds (`mask=True`) or let it in again, in this rank's view alone.

        Raises:
            StateError: the buffer was not made with `enable_shrink`.
            ConfigError: no such rank.
        """
        self._check_shrink()
        if not 0 <= rank_to_mask < self.group_size:
            raise ConfigError(f"`rank_to_mask` must be in [0, {self.group_size}) (got {rank_to_mask})")
        self._low_latency.exchanges.mask(rank_to_mask, dead=mask)

    @strict_keywords
    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Write 1 for every masked rank, 0 for the others, into `mask_status`: [R] int32.

        Raises:
            StateError: the buffer was not made with `enable_shrink`.
            ShapeError: `mask_status` is something else.
        """
        self._check_shrink()
        if tuple(mask_status.shape) != (self.group_size,) or mask_status.dtype != torch.int32:
            raise ShapeError(
                f"`mask_status` must be [{self.group_size}] torch.int32 "
                f"(got {list(mask_status.shape)} {mask_status.dtype})"
            )
        dead = self._low_latency.exchanges.dead_ranks()
        mask_status.copy_(torch.tensor([int(rank in dead) for rank in range(self.group_size)], dtype=torch.int32))

    @strict_keywords
    def low_latency_clean_mask_buffer(self) -> None:
        """Let every rank in again.

        Raises:
            StateError: the buffer was not made with `enable_shrink`.
        """
        self._check_shrink()
        for rank in self._low_latency.exchanges.dead_ranks():
            self._low_latency.exchanges.mask(rank, dead=False)

    def _check_shrink(self) -> None:
        if not self.enable_shrink:
            raise StateError("the mask buffer needs a Buffer made with `enable_shrink=True`")
