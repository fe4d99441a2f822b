"""The batched experts for the CPU, alone: both ways to compute, every activation, biases."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.vllm.marks import needs_vllm
from tests.vllm.test_kernel import INTERMEDIATE, E, H, K, M, R, moe_config

pytestmark = needs_vllm
L = E // R
COUNTS = [3, 0, R * M, 1]


@pytest.mark.parametrize("is_one_by_one", [False, True])
@pytest.mark.parametrize("activation", ["SILU", "GELU", "GELU_TANH"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_rows_with_tokens_are_computed(
    is_one_by_one: bool, activation: str, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

    from moebius.vllm import cpu_experts

    monkeypatch.setattr(cpu_experts, "BATCH_WEIGHT_BYTES", 0 if is_one_by_one else 1 << 30)
    torch.manual_seed(1)
    w1, w2 = torch.randn(L, 2 * INTERMEDIATE, H) * 0.05, torch.randn(L, H, INTERMEDIATE) * 0.1
    bias1, bias2 = (torch.randn(L, 2 * INTERMEDIATE), torch.randn(L, H)) if has_bias else (None, None)
    quant = FusedMoEQuantConfig.make(w1_bias=bias1, w2_bias=bias2)
    config = moe_config(0, torch.float32, K)
    made: Any = cpu_experts.MoebiusBatchedCPUExperts(config, quant, max_num_tokens=M, num_dispatchers=R)
    x = torch.randn(L, R * M, H)
    for e, count in enumerate(COUNTS):
        x[e, count:] = torch.nan  # rows without a token hold anything
    output = torch.full((L, R * M, H), -7.0)
    counts = mk.ExpertTokensMetadata(
        expert_num_tokens=torch.tensor(COUNTS, dtype=torch.int32), expert_num_tokens_cpu=None
    )
    empty = torch.empty(0)
    chosen = MoEActivation[activation]
    made.apply(output, x, w1, w2, empty, empty, chosen, E, None, None, None, empty, empty, counts, False)
    act: Any = {
        "SILU": functional.silu,
        "GELU": functional.gelu,
        "GELU_TANH": lambda gate: functional.gelu(gate, approximate="tanh"),
    }[activation]
    for e, count in enumerate(COUNTS):
        rows = x[e, :count] @ w1[e].t() + (bias1[e] if bias1 is not None else 0)
        gate, up = rows.chunk(2, dim=-1)
        wanted = (act(gate) * up) @ w2[e].t() + (bias2[e] if bias2 is not None else 0)
        assert torch.allclose(output[e, :count], wanted, atol=1e-5, rtol=1e-5)


def test_what_it_takes() -> None:
    import dataclasses

    import vllm.model_executor.layers.fused_moe.modular_kernel as mk

    from moebius.vllm.cpu_experts import MoebiusBatchedCPUExperts as Experts

    config = moe_config(0, torch.bfloat16, K)
    batched, standard = mk.FusedMoEActivationFormat.BatchedExperts, mk.FusedMoEActivationFormat.Standard
    assert Experts.is_supported_config(Experts, config, None, None, batched) == (True, None)
    assert not Experts.is_supported_config(Experts, config, None, None, standard)[0]
    clamped = dataclasses.replace(config, swiglu_limit=7.0)
    assert not Experts.is_supported_config(Experts, clamped, None, None, batched)[0]
