"""Standard: the tokens as they arrived, with the choices that fell on this rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceContiguous,
    TopKWeightAndReduceDelegate,
)
from vllm.platforms import current_platform
from vllm.v1.worker.ubatching import dbo_current_ubatch_id

from .halves import MAX_MICRO_BATCHES, Halves
from .pairs import Pairs

if TYPE_CHECKING:
    from torch import Tensor

    from moebius.results import Dispatched


class MoebiusStandardPrepareAndFinalize(Halves):
    """Over token_major; experts weight and add up themselves, and combine carries one row for each token.

    Where experts take an expert map they see the inbox, [R*M, H] (on a GPU a copy), unused rows routed to no local
    expert. vLLM's experts for the CPU take none: they get `Pairs` of it, whose number the host has to know, so not on a
    GPU.
    """

    def __init__(self, *args: Any, takes_pairs: bool | None = None, **kwargs: Any) -> None:
        """As `Halves`; `takes_pairs` is whether the experts take no expert map (None: as on the platform)."""
        super().__init__(*args, **kwargs)
        self._takes_pairs = current_platform.is_cpu() if takes_pairs is None else takes_pairs
        self._pairs: list[Pairs | None] = [None] * MAX_MICRO_BATCHES

    @property
    def activation_format(self) -> Any:
        """Standard."""
        return mk.FusedMoEActivationFormat.Standard

    def max_num_tokens_per_rank(self) -> int | None:
        """No limit for the experts."""
        return None

    def _received(self, recv: Dispatched, quant_config: Any, defer_input_quant: bool) -> Any:
        assert recv.topk_ids is not None
        assert recv.topk_weights is not None
        if not self._takes_pairs:
            x, scales = self._quantised(recv.x, recv.scales, quant_config, defer_input_quant)
            return x, scales, None, self._global_ids(recv.topk_ids), recv.topk_weights.contiguous()
        pairs = Pairs.of(recv.topk_ids, recv.topk_weights)
        self._pairs[dbo_current_ubatch_id()] = pairs
        scales = None if recv.scales is None else recv.scales[pairs.rows]
        x, scales = self._quantised(recv.x[pairs.rows], scales, quant_config, defer_input_quant)
        counts = mk.ExpertTokensMetadata(expert_num_tokens=recv.expert_num_tokens, expert_num_tokens_cpu=None)
        return x, scales, counts, pairs.ids, pairs.ones()

    def _global_ids(self, local_ids: Tensor) -> Tensor:
        """Ids that an expert map takes back to the local ones; no choice becomes an expert of another rank."""
        num_local = self.exchange.config.num_local_experts(self._num_ranks)
        first = self.exchange.rank * num_local
        elsewhere = 0 if first > 0 else self.exchange.config.num_experts - 1
        return torch.where(local_ids >= 0, local_ids + first, elsewhere)

    def _rows(
        self,
        fused_expert_output: Tensor,
        recv: Dispatched,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: Any,
    ) -> Tensor:
        if isinstance(weight_and_reduce_impl, TopKWeightAndReduceDelegate):
            weight_and_reduce_impl = TopKWeightAndReduceContiguous()
        reduced: Tensor = fused_expert_output
        if fused_expert_output.numel():
            reduced = weight_and_reduce_impl.apply(
                output=None,
                fused_expert_output=fused_expert_output,
                topk_weights=topk_weights,
                topk_ids=topk_ids,
                apply_router_weight_on_input=apply_router_weight_on_input,
            )
        micro_batch = dbo_current_ubatch_id()
        pairs, self._pairs[micro_batch] = self._pairs[micro_batch], None
        return reduced if pairs is None else pairs.add_up(reduced, recv.x.shape[0])
