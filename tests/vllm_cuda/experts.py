"""Experts for GPUs that nothing in which waits for the device: vLLM's Triton ones, and plain torch ones for e4m3.

vLLM's Triton experts need one operator of its compiled library, which is not there where only its Python files are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tests.vllm.experts import QuantisedBatchedExperts, dequantised

_libraries: list[Any] = []


def _has(name: str) -> bool:
    return hasattr(torch.ops._C, name)


def gated(out: Tensor, x: Tensor) -> None:
    gate, up = x.chunk(2, dim=-1)
    out.copy_(functional.silu(gate.float()).to(x.dtype) * up)


def provide_operators() -> list[str]:
    """Register the operators that are missing, in torch; returns their names."""
    import vllm._custom_ops  # noqa: F401  # loads the compiled ones, where they are

    library: Any = torch.library.Library("_C", "FRAGMENT")  # type: ignore[no-untyped-call]
    made = []
    if not _has("silu_and_mul"):
        library.define("silu_and_mul(Tensor! out, Tensor x) -> ()")
        library.impl("silu_and_mul", gated, "CompositeExplicitAutograd")
        made.append("silu_and_mul")
    if not _has("masked_moe_activation"):
        floats = ", ".join(f"float {name}" for name in ("clamp", "alpha", "beta", "bias", "limit"))
        library.define(f"masked_moe_activation(Tensor! out, Tensor x, Tensor counts, str act, {floats}) -> ()")
        library.impl(
            "masked_moe_activation", lambda out, x, counts, act, *rest: gated(out, x), "CompositeExplicitAutograd"
        )
        made.append("masked_moe_activation")
    _libraries.append(library)  # they go with it
    return made


def triton_experts() -> Any:
    """vLLM's class."""
    provide_operators()
    from vllm.model_executor.layers.fused_moe.experts import fused_batched_moe

    if not hasattr(torch.Stream, "is_capturing"):
        # vLLM asks a stream, which only the torch that it pins can answer; an older one is asked in its own way.
        fused_batched_moe._is_capturing_or_compiling = _is_capturing_or_compiling
    return fused_batched_moe.BatchedTritonExperts


def _is_capturing_or_compiling() -> bool:
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


class DequantisingExperts(QuantisedBatchedExperts):
    """Takes e4m3 with fp32 scales and computes all rows, those without a token too: the counts stay on the device.

    vLLM's own quantised Triton experts read the counts on the host unless they are captured.
    """

    def apply(self, **call: Any) -> None:
        x, w1, w2, output = (call[name] for name in ("hidden_states", "w1", "w2", "output"))
        for e in range(w1.shape[0]):
            gate, up = _product(dequantised(x[e], call["a1q_scale"][e]), w1[e]).chunk(2, dim=-1)
            output[e].copy_(_product(functional.silu(gate) * up, w2[e]))


def _product(x: Tensor, weights: Tensor) -> Tensor:
    """[T, N] of [T, K] and [N, K]. No library, whose first use in a thread would wait for the device."""
    return (x.unsqueeze(1) * weights.float().unsqueeze(0)).sum(-1)
