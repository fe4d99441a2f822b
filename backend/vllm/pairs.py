"""One row for each (token, local expert): what experts can take that know neither -1 nor an expert map.

vLLM's C++ experts for the CPU count and index by expert id without looking at it, and would compute a choice of weight
0 in full. Given a row for each pair, with the local expert as its only choice, they are right as they are and do
nothing in vain.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass
class Pairs:
    """The pairs of some tokens, ordered by token and choice. P is their number.

    Attributes:
        rows: [P] int64 - the token of each.
        ids: [P, 1] int32 - its local expert.
        weights: [P, 1] fp32 - the router's weight.
    """

    rows: Tensor
    ids: Tensor
    weights: Tensor

    @classmethod
    def of(cls, local_ids: Tensor, weights: Tensor) -> Pairs:
        """Those of `local_ids` [N, K], -1 where a choice is none of this rank's, and its weights [N, K]."""
        rows, choices = torch.nonzero(local_ids >= 0, as_tuple=True)
        at = (rows, choices)
        return cls(rows, local_ids[at].to(torch.int32).unsqueeze(1), weights[at].to(torch.float32).unsqueeze(1))

    def ones(self) -> Tensor:
        """[P, 1] fp32: the weights to hand to experts. The router's are applied in `add_up`, before rounding."""
        return torch.ones_like(self.weights)

    def add_up(self, results: Tensor, num_rows: int, *, out: Tensor | None = None) -> Tensor:
        """[num_rows, H]: the weighted results [P, H] of each token, added in fp32 in order; zeros for one without."""
        total = torch.zeros(num_rows, results.shape[1], dtype=torch.float32)
        total.index_add_(0, self.rows, results.to(torch.float32) * self.weights)
        return total.to(results.dtype) if out is None else out.copy_(total)
