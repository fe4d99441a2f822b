"""Experts in plain torch, in the roles that vLLM's experts for GPUs have: for the kernel's tests on the CPU."""

from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import (
    TopKWeightAndReduceDelegate,
    TopKWeightAndReduceNoOP,
)


def expert(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """One expert in fp32."""
    gate, up = (x.float() @ w1.float().t()).chunk(2, dim=-1)
    return (functional.silu(gate) * up) @ w2.float().t()


def dequantised(x: Tensor, scales: Tensor) -> Tensor:
    """fp32 of e4m3 rows and their scales for groups of 128: fp32, or packed exponents."""
    if scales.dtype == torch.int32:
        exponents = torch.stack([(scales >> shift) & 255 for shift in (0, 8, 16, 24)], dim=-1).flatten(-2)
        scales = torch.exp2(exponents.float() - 127)
    return x.float() * scales.repeat_interleave(128, dim=-1)


class _Roles(mk.FusedMoEExpertsModular):  # type: ignore[misc]
    takes_ue8m0 = False

    @staticmethod
    def _supports_current_device() -> bool:
        return True

    _supports_no_act_and_mul = _supports_current_device

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        return True

    _supports_activation = staticmethod(lambda activation: True)
    _supports_parallel_config = staticmethod(lambda config: True)

    def supports_packed_ue8m0_act_scales(self) -> bool:
        return self.takes_ue8m0


class MappedExperts(_Roles):
    """Standard format with an expert map; weights and adds up by itself, as vLLM's Triton experts do."""

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.Standard

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceNoOP()

    def workspace_shapes(self, M: int, N: int, K: int, topk: int, *_: Any) -> Any:
        return (0,), (0,), (M, K)

    def apply(self, **call: Any) -> None:
        x, output = call["hidden_states"], call["output"]
        assert x.shape[0] == call["topk_ids"].shape[0]
        assert call["topk_ids"].min() >= 0, "kernels for GPUs index by id"
        x = x if call["a1q_scale"] is None else dequantised(x, call["a1q_scale"])
        local = call["expert_map"][call["topk_ids"].long()]
        output.zero_()
        for e in range(call["w1"].shape[0]):
            rows, choices = torch.nonzero(local == e, as_tuple=True)
            made = expert(x[rows], call["w1"][e], call["w2"][e]) * call["topk_weights"][rows, choices].unsqueeze(1)
            output.index_add_(0, rows, made.to(output.dtype))


class QuantisedBatchedExperts(_Roles):
    """Batched format that takes e4m3 and scales."""

    @staticmethod
    def activation_format() -> Any:
        return mk.FusedMoEActivationFormat.BatchedExperts

    def finalize_weight_and_reduce_impl(self) -> Any:
        return TopKWeightAndReduceDelegate()

    def workspace_shapes(self, M: int, N: int, K: int, topk: int, E: int, local: int, *_: Any) -> Any:
        return (0,), (0,), (local, self.max_num_tokens * self.num_dispatchers, K)

    def apply(self, **call: Any) -> None:
        x, scales = call["hidden_states"], call["a1q_scale"]
        assert x.dtype == torch.float8_e4m3fn
        assert scales.dtype == (torch.int32 if self.takes_ue8m0 else torch.float32)
        for e, count in enumerate(call["expert_tokens_meta"].expert_num_tokens.tolist()):
            rows = dequantised(x[e, :count], scales[e, :count])
            call["output"][e, :count] = expert(rows, call["w1"][e], call["w2"][e]).to(call["output"].dtype)


class PackedScaleExperts(QuantisedBatchedExperts):
    takes_ue8m0 = True
