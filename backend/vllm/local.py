"""Expert parallelism over replicated tokens (TP without DP) on the CPU: no exchange, but experts that skip the others'.

vLLM all-reduces the ranks' outputs. Its experts for the CPU ignore the expert map and would index past the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vllm.model_executor.layers.fused_moe.modular_kernel as mk

from moebius.errors import ConfigError

from .halves import weighted_input
from .pairs import Pairs

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class MoebiusLocalPrepareAndFinalize(mk.FusedMoEPrepareAndFinalizeModular):  # type: ignore[misc]
    """Hands this rank's experts one row for each choice that is theirs."""

    def __init__(self) -> None:
        """Nothing is kept between layers."""
        super().__init__()
        self._pairs: Pairs | None = None

    @property
    def activation_format(self) -> Any:
        """Standard."""
        return mk.FusedMoEActivationFormat.Standard

    def topk_indices_dtype(self) -> torch.dtype | None:
        """Any."""
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        """No limit."""
        return None

    def num_dispatchers(self) -> int:
        """Nobody but this rank."""
        return 1

    def output_is_reduced(self) -> bool:
        """Each rank has its own experts' share; vLLM adds them up."""
        return False

    def prepare(
        self,
        a1: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: Any,
        defer_input_quant: bool = False,
    ) -> Any:
        """Keep the choices that are this rank's."""
        if quant_config.quant_dtype is not None and not defer_input_quant:
            raise ConfigError(f"experts on the CPU that take {quant_config.quant_dtype} inputs are not supported")
        if apply_router_weight_on_input:
            a1, topk_weights = weighted_input(a1, topk_weights)
        local_ids = topk_ids if expert_map is None else expert_map[topk_ids.long()].where(topk_ids >= 0, -1)
        self._pairs = pairs = Pairs.of(local_ids, topk_weights)
        return a1[pairs.rows], None, None, pairs.ids, pairs.ones()

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: Any,
    ) -> None:
        """Add up what this rank has of each token."""
        assert self._pairs is not None
        self._pairs.add_up(fused_expert_output, output.shape[0], out=output)
        self._pairs = None
