"""Which prepare/finalize a layer gets, and the shape of its exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.model_executor.layers.fused_moe import all2all_utils
from vllm.platforms import current_platform

from moebius.config import SCALE_GROUP
from moebius.errors import ConfigError

from .batched import MoebiusBatchedPrepareAndFinalize
from .local import MoebiusLocalPrepareAndFinalize
from .standard import MoebiusStandardPrepareAndFinalize

if TYPE_CHECKING:
    from collections.abc import Callable

    from moebius.all_to_all import AllToAll

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def make_prepare_finalize(moe: Any, quant_config: Any, options: dict[str, Any]) -> Any:
    """Ours for a layer, or None where vLLM's own is right.

    Args:
        moe: vLLM's `FusedMoEConfig`.
        quant_config: its `FusedMoEQuantConfig`, or None.
        options: the other keywords of `maybe_make_prepare_finalize`.

    Raises:
        ConfigError: the layer is one that we cannot serve.
    """
    parallel = moe.moe_parallel_config
    if not parallel.use_all2all_kernels:
        # Tokens are replicated and each rank computes its own experts; vLLM's experts for the CPU do not know that.
        is_local = current_platform.is_cpu() and parallel.use_ep and not options.get("use_monolithic")
        return MoebiusLocalPrepareAndFinalize() if is_local and parallel.ep_size > 1 else None
    if options.get("use_monolithic"):
        raise ConfigError(
            "vLLM chose monolithic experts, which route and compute in one, for this layer: there is no place between "
            "for --all2all-backend moebius. Choose other experts with --moe-backend"
        )
    manager = options.get("all2all_manager")
    if manager is None:
        manager = all2all_utils.get_ep_all2all_manager()
    is_batched = parallel.use_batched_activation_format
    made = MoebiusBatchedPrepareAndFinalize if is_batched else MoebiusStandardPrepareAndFinalize
    return made(
        exchange_of(moe, quant_config, manager, is_batched),
        moe.max_num_tokens,
        manager.world_size,
        sends_fp8=sends_fp8(moe, quant_config),
    )


def sends_fp8(moe: Any, quant_config: Any) -> bool:
    """Whether the experts want what we can quantise on the way: e4m3 with a scale per 128 channels."""
    if quant_config is None or moe.hidden_dim % SCALE_GROUP:
        return False
    is_e4m3 = quant_config.quant_dtype == torch.float8_e4m3fn
    return bool(is_e4m3 and quant_config.block_shape == [SCALE_GROUP, SCALE_GROUP])


def exchange_of(moe: Any, quant_config: Any, manager: Any, is_batched: bool) -> Callable[..., AllToAll]:
    """What makes the layer's exchange, once it is known how its experts want their scales.

    The router's weights travel with the tokens: an expert's rank then weights and adds the rows of a token before
    they travel back, and sends one instead of one for each of its experts. vLLM's protocol allows it, as experts leave
    weighting to us (`TopKWeightAndReduceDelegate`, batched) or do it themselves where the weights must be anyway.

    Raises:
        ConfigError: the layer's dtype is none that travels.
    """
    if moe.in_dtype not in DTYPES:
        names = ", ".join(DTYPES.values())
        raise ConfigError(f"--all2all-backend moebius carries {names} activations (got {moe.in_dtype})")
    dtype = DTYPES[moe.in_dtype]
    fields = {
        "num_experts": moe.num_experts,
        "num_topk": moe.experts_per_token,
        "hidden": moe.hidden_dim,
        "max_num_tokens": moe.max_num_tokens,
        "layout": "expert_major" if is_batched else "token_major",
        "weights_at": "dispatch",
        "output": dtype,
        # As long as vLLM itself waits for a step: a rank that compiles or loads holds up the others for minutes.
        "timeout_s": float(envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS),
    }

    def make(*, is_fp8: bool, scale_format: str) -> AllToAll:
        wire = {"payload": "fp8_e4m3", "scale_format": scale_format} if is_fp8 else {"payload": dtype}
        handle: AllToAll = manager.get_handle({**fields, **wire})
        return handle

    return make
