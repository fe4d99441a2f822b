"""Where a case sits: one rank of a world, and the module under test."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

OURS = "moebius.deep_ep"

# A hidden size of upstream's list, and the most tokens of a rank; every case fits in these.
HIDDEN = 2048
MAX_TOKENS = 16


class SkipCase(Exception):  # not an error
    """The subject does not promise what the case checks."""


@dataclasses.dataclass
class Seat:
    """One rank.

    Attributes:
        module: the subject: `moebius.deep_ep`, `deep_ep`, or any module of that surface.
        group: what `Buffer` takes.
        device: where tensors live.
        is_ours: whether the subject promises what only this project promises.
    """

    module: Any
    group: Any
    rank: int
    num_ranks: int
    device: torch.device
    is_ours: bool
    _buffer: Any = None

    @property
    def num_experts(self) -> int:
        return 4 * self.num_ranks

    @property
    def num_local_experts(self) -> int:
        return 4

    @property
    def num_rows(self) -> int:
        return self.num_ranks * MAX_TOKENS

    def buffer(self) -> Any:
        """The buffer that all cases of this world use one after the other."""
        if self._buffer is None:
            self._buffer = self.new_buffer()
        return self._buffer

    def new_buffer(self, **options: Any) -> Any:
        buffer_type = self.module.Buffer
        num_bytes = buffer_type.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, self.num_ranks, self.num_experts)
        return buffer_type(
            self.group,
            0,
            num_bytes,
            low_latency_mode=True,
            num_qps_per_rank=self.num_local_experts,
            explicitly_destroy=True,
            **options,
        )

    def only_ours(self) -> None:
        """Skip unless the subject is ours: upstream promises less."""
        if not self.is_ours:
            raise SkipCase("upstream does not promise this")
