"""Batched experts for the CPU, of which vLLM has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceDelegate
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from torch import Tensor

# Above either, a matrix product for each expert takes long enough for Python to be no matter, and one for all at once
# would read the weights of experts without tokens, or compute the padding of a busy one's neighbours.
BATCH_WEIGHT_BYTES = 1 << 20
BATCH_ROWS = 64


class MoebiusBatchedCPUExperts(mk.FusedMoEExpertsModular):  # type: ignore[misc]
    """Two matrix products and a gated activation over [L, R*M, H]; weighting and adding up are combine's."""

    @staticmethod
    def activation_format() -> Any:
        """Batched."""
        return mk.FusedMoEActivationFormat.BatchedExperts

    @staticmethod
    def is_supported_config(cls: Any, moe_config: Any, *keys_and_format: Any) -> tuple[bool, str | None]:
        """As the base class finds, but not where the activation is clamped."""
        if getattr(moe_config, "swiglu_limit", None) is not None:
            return False, "kernel does not support a clamped activation"
        found: tuple[bool, str | None] = mk.FusedMoEExperts.is_supported_config(cls, moe_config, *keys_and_format)
        return found

    @staticmethod
    def _supports_current_device() -> bool:
        return bool(current_platform.is_cpu())

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation in (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return True

    def finalize_weight_and_reduce_impl(self) -> Any:
        """Combine does both."""
        return TopKWeightAndReduceDelegate()

    def workspace_shapes(
        self,
        M: int,
        N: int,
        K: int,
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """No workspaces; the output's shape."""
        return (0,), (0,), (local_num_experts, self.max_num_tokens * self.num_dispatchers, K)

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Compute the rows that hold tokens; the others of `output` stay as they are."""
        counts = expert_tokens_meta.expert_num_tokens.tolist()
        most = max(counts)
        weight_bytes = (w1[0].numel() + w2[0].numel()) * w1.element_size()
        if most <= BATCH_ROWS and weight_bytes <= BATCH_WEIGHT_BYTES:
            groups = [(slice(None), most)]
        else:
            groups = [(slice(expert, expert + 1), count) for expert, count in enumerate(counts)]
        for experts, num_rows in groups:
            if num_rows:
                rows = torch.bmm(hidden_states[experts, :num_rows], w1[experts].transpose(1, 2))
                if self.w1_bias is not None:
                    rows += self.w1_bias[experts].unsqueeze(1)
                rows = torch.bmm(_gated(rows, activation), w2[experts].transpose(1, 2))
                if self.w2_bias is not None:
                    rows += self.w2_bias[experts].unsqueeze(1)
                output[experts, :num_rows] = rows


def _gated(rows: Tensor, activation: Any) -> Tensor:
    """The first half of the channels, activated, times the second."""
    gate, up = rows.chunk(2, dim=-1)
    if activation == MoEActivation.SILU:
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh" if activation == MoEActivation.GELU_TANH else "none") * up
