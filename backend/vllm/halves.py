"""What both formats share: vLLM's prepare and finalize as the four halves of a round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.utils import moe_kernel_quantize_input
from vllm.v1.worker.ubatching import dbo_current_ubatch_id, dbo_maybe_run_recv_hook

from moebius.errors import ConfigError

from . import trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moebius.all_to_all import AllToAll
    from moebius.results import Dispatched, PendingDispatch

MAX_MICRO_BATCHES = 2


class Halves(mk.FusedMoEPrepareAndFinalizeModular):  # type: ignore[misc]
    """Dispatch under prepare, combine under finalize; vLLM runs what it can between their halves.

    One object for each layer, one exchange for all layers of a shape. What a round needs until it is combined is kept
    for each micro-batch, for two of them are under way at a time under dual-batch overlap; an exchange has two slots.
    """

    def __init__(
        self, make_exchange: Callable[..., AllToAll], max_num_tokens: int, num_ranks: int, *, sends_fp8: bool = False
    ) -> None:
        """Wait for the experts: how they take scales decides what travels.

        Args:
            make_exchange: called once, on every rank, with `is_fp8` and `scale_format`.
            max_num_tokens: M.
            num_ranks: R.
            sends_fp8: whether the experts take e4m3 with a scale per 128 channels.
        """
        super().__init__()
        self._make_exchange = make_exchange
        self._max_num_tokens = max_num_tokens
        self._num_ranks = num_ranks
        self._sends_fp8 = sends_fp8
        self._pending: list[PendingDispatch | None] = [None] * MAX_MICRO_BATCHES
        self._recorder: trace.Recorder | None = None
        self.exchange: AllToAll

    def post_init_setup(self, fused_experts: Any) -> None:
        """Make the exchange that these experts need. Called by vLLM when both are there."""
        if fused_experts.expects_unquantized_inputs:
            self._sends_fp8 = False
        scale_format = "ue8m0" if self._sends_fp8 and fused_experts.supports_packed_ue8m0_act_scales() else "fp32"
        self.exchange = self._make_exchange(is_fp8=self._sends_fp8, scale_format=scale_format)
        config = self.exchange.config
        self._recorder = trace.recorder(config.num_experts, config.num_topk, self.exchange.rank)

    def topk_indices_dtype(self) -> torch.dtype | None:
        """Any of int32 and int64."""
        return None

    def num_dispatchers(self) -> int:
        """R."""
        return self._num_ranks

    def output_is_reduced(self) -> bool:
        """Finalize leaves nothing for a reduction over ranks."""
        return True

    def supports_async(self) -> bool:
        """The halves are there: shared experts run between those of combine."""
        return True

    def prepare_async(
        self,
        a1: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
        quant_config: Any,
        defer_input_quant: bool = False,
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Send the tokens; returns the wait for those that come here, and what makes the experts' input of them."""
        expected = self.exchange.config.num_experts
        if num_experts != expected:
            raise ConfigError(f"the exchange was made for {expected} experts (got {num_experts})")
        if self._recorder is not None:
            self._recorder.add(self, topk_ids)
        if apply_router_weight_on_input:
            a1, topk_weights = weighted_input(a1, topk_weights)
        sent = self.exchange.dispatch_send(a1, topk_ids, topk_weights.to(torch.float32))
        self._pending[dbo_current_ubatch_id()] = sent
        return sent.receive, lambda: self._received(sent.receive(), quant_config, defer_input_quant)

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        """`prepare_async` and both of what it returns."""
        hook, receiver = self.prepare_async(*args, **kwargs)
        hook()
        return receiver()

    def finalize_async(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: Any,
    ) -> tuple[Callable[[], Any], Callable[[], None]]:
        """Send the results home; returns the wait for those of this rank's tokens, which it adds up in `output`."""
        micro_batch = dbo_current_ubatch_id()
        sent = self._pending[micro_batch]
        assert sent is not None, "finalize without prepare"
        self._pending[micro_batch] = None
        recv = sent.receive()
        rows = self._rows(
            fused_expert_output, recv, topk_weights, topk_ids, apply_router_weight_on_input, weight_and_reduce_impl
        )
        # The other micro-batch's receive comes first, as every rank has these halves in the same order.
        dbo_maybe_run_recv_hook()
        returning = self.exchange.combine_send(rows, recv, out=output)
        return returning.receive, lambda: None

    def finalize(self, *args: Any, **kwargs: Any) -> None:
        """`finalize_async` and the wait that it returns."""
        hook, receiver = self.finalize_async(*args, **kwargs)
        hook()
        receiver()

    def _received(self, recv: Dispatched, quant_config: Any, defer_input_quant: bool) -> Any:
        """The 5-tuple that vLLM calls PrepareResultType."""
        raise NotImplementedError

    def _rows(
        self,
        fused_expert_output: Tensor,
        recv: Dispatched,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
        weight_and_reduce_impl: Any,
    ) -> Tensor:
        """What combine takes, made of what the experts returned."""
        raise NotImplementedError

    def _quantised(
        self, x: Tensor, scales: Tensor | None, quant_config: Any, defer_input_quant: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The received tokens as the experts want them: unless they travelled so, quantised after arrival."""
        if scales is not None or defer_input_quant or quant_config.quant_dtype is None:
            return x, scales
        *lead, hidden = x.shape
        quantised, made = moe_kernel_quantize_input(
            x.reshape(-1, hidden),
            quant_config.a1_scale,
            quant_config.quant_dtype,
            quant_config.per_act_token_quant,
            quant_config.block_shape,
        )
        if made is not None and made.dim() > 1 and made.shape[0] == quantised.shape[0]:
            made = made.view(*lead, made.shape[-1])
        return quantised.view(*lead, quantised.shape[-1]), made


def weighted_input(a1: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens multiplied by their router weight, and ones to go on with: for models that weight before the experts.

    Raises:
        ConfigError: there is more than one choice for each token, and so more than one weight.
    """
    if topk_weights.shape[1] != 1:
        raise ConfigError(f"weights on the input need top-1 routing (got top-{topk_weights.shape[1]})")
    return a1 * topk_weights.to(a1.dtype), torch.ones_like(topk_weights)
