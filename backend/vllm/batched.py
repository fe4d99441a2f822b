"""BatchedExperts: the tokens of each local expert, packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate

from moebius.errors import ConfigError

from .halves import Halves

if TYPE_CHECKING:
    from torch import Tensor

    from moebius.results import Dispatched


class MoebiusBatchedPrepareAndFinalize(Halves):
    """Over expert_major: [L, R*M, H] and the number of rows of each expert; weighted and added up in combine."""

    @property
    def activation_format(self) -> Any:
        """Batched."""
        return mk.FusedMoEActivationFormat.BatchedExperts

    def max_num_tokens_per_rank(self) -> int | None:
        """M: experts have room for R times as many rows."""
        return self._max_num_tokens

    def _received(self, recv: Dispatched, quant_config: Any, defer_input_quant: bool) -> Any:
        x, scales = self._quantised(recv.x, recv.scales, quant_config, defer_input_quant)
        counts = mk.ExpertTokensMetadata(expert_num_tokens=recv.expert_num_tokens, expert_num_tokens_cpu=None)
        return x, scales, counts, None, None

    def _rows(
        self,
        fused_expert_output: Tensor,
        recv: Dispatched,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: Any,
    ) -> Tensor:
        if not isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            raise ConfigError(
                "batched experts must leave weighting and adding up to combine "
                f"(these do it by {type(weight_and_reduce_impl).__name__})"
            )
        return fused_expert_output
