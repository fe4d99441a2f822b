"""`Buffer`, with the signatures of DeepEP V1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from moebius.deep_ep.event import EventHandle, EventOverlap
from moebius.deep_ep.exchanges import CallShape
from moebius.deep_ep.keywords import strict_keywords
from moebius.deep_ep.low_latency import CombineResult, DispatchResult, LowLatency
from moebius.deep_ep.mask import Mask
from moebius.deep_ep.normal import NormalMode
from moebius.deep_ep.runtime import Runtime
from moebius.engines import resolve
from moebius.errors import ConfigError, ShapeError, StateError, UnsupportedError
from moebius.group import VirtualRank
from moebius.plan import plan

if TYPE_CHECKING:
    from torch import Tensor

    from moebius.deep_ep.handles import Handle

topk_idx_t = torch.int64  # what upstream wants; int32 is taken too

_HINT_TOPK = 8  # the size hint is not told top-k; that of DeepSeek-V3, Qwen3 and most others


class Buffer(Mask, NormalMode):
    """DeepEP's communication buffer, its low-latency half.

    Calls are collective: every rank makes the same ones, in the same order. The first with new shapes, top-k or
    wire format also builds what it needs, and then waits for all ranks even with `return_recv_hook`; `prepare`
    does that ahead. Two dispatches may be unreceived at a time.

    Attributes:
        num_sms: as last set; without effect.
        timeout_s: deadline of every wait in seconds, read at construction. Not of upstream, where it is fixed at 100.
        group: the process group, or virtual rank.
        rank: this rank.
        group_size: number of ranks.
        low_latency_mode: whether the low-latency calls may be used.
        runtime: what upstream's native object tells.
    """

    timeout_s: float = 100.0
    _last_asked: tuple[int, int, int] | None = None

    @strict_keywords
    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        """Take the group; nothing is allocated or exchanged yet.

        Args:
            group: a `torch.distributed` process group, or one of `moebius.virtual_ranks`.
            num_nvl_bytes: kept, without effect: bytes follow from the shapes of the calls.
            num_rdma_bytes: as `num_nvl_bytes`.
            low_latency_mode: must be set for the low-latency calls, the only ones covered.
            num_qps_per_rank: without effect.
            allow_nvlink_for_low_latency_mode: without effect.
            allow_mnnvl: without effect.
            explicitly_destroy: without effect: `destroy` is always legal, never needed and never collective.
            enable_shrink: allow the calls of the mask buffer.
            comm: an mpi4py communicator in place of `group`: not covered.

        Raises:
            UnsupportedError: `comm` is given.
            ConfigError: `group` is neither a process group nor a virtual rank.
        """
        if comm is not None:
            raise UnsupportedError("`comm` (mpi4py) is not covered: give a torch.distributed process group as `group`")
        if isinstance(group, VirtualRank):
            self.rank, self.group_size = group.rank, group.size
        elif distributed.is_available() and isinstance(group, distributed.ProcessGroup):
            self.rank, self.group_size = group.rank(), group.size()
        else:
            raise ConfigError(
                "`group` must be a torch.distributed process group or a rank of moebius.virtual_ranks "
                f"(got {type(group).__name__})"
            )
        self.group = group
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self.runtime = Runtime(self.group_size, self.rank)
        self._low_latency = LowLatency(group, self.group_size, self.timeout_s)
        self._scratch: dict[bool, Tensor] = {}

    @strict_keywords
    def destroy(self) -> None:
        """Free everything; further calls raise StateError. Not collective, and legal more than once."""
        self.runtime.is_destroyed = True
        self._low_latency.close()
        self._scratch.clear()

    @staticmethod
    @strict_keywords
    def is_sm90_compiled() -> bool:
        """True, as every feature that upstream ties to sm_90 (the low-latency calls, FP8) is here."""
        return True

    @staticmethod
    @strict_keywords
    def capture() -> EventOverlap:
        """An event of the work until now."""
        return EventOverlap(EventHandle())

    @staticmethod
    @strict_keywords
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes to pass as `num_rdma_bytes`: those of a BF16 exchange with top-8, a fraction of upstream's.

        The shapes asked for last are what `prepare` builds.

        Raises:
            ConfigError: the shapes are impossible.
        """
        call_shape = CallShape(
            num_experts=num_experts,
            num_topk=min(_HINT_TOPK, num_experts),
            hidden=hidden,
            max_num_tokens=num_max_dispatch_tokens_per_rank,
            use_fp8=False,
            round_scale=False,
            use_ue8m0=False,
        )
        num_bytes: int = plan(call_shape.config(Buffer.timeout_s), num_ranks).heap_bytes
        Buffer._last_asked = (num_max_dispatch_tokens_per_rank, hidden, num_experts)
        return num_bytes

    @strict_keywords
    def prepare(self, num_topk: int, use_fp8: bool = True, round_scale: bool = False, use_ue8m0: bool = False) -> None:
        """Build now what the first dispatch would: for the shapes the size hint was last asked for, and this format.

        Collective. Not of upstream. For a program whose ranks do other collective work between the send half of
        their first dispatch and its hook.

        Raises:
            StateError: the size hint was never asked, or the buffer is destroyed.
            ConfigError: the shapes or flags are impossible.
        """
        self._check_usable()
        if Buffer._last_asked is None:
            raise StateError("prepare() takes its shapes from get_low_latency_rdma_size_hint: call that first")
        max_num_tokens, hidden, num_experts = Buffer._last_asked
        call_shape = CallShape(num_experts, num_topk, hidden, max_num_tokens, use_fp8, round_scale, use_ue8m0)
        # DeepEP's users set the current device, and not torch's default one.
        is_nccl = not isinstance(self.group, VirtualRank) and "nccl" in distributed.get_backend(self.group)
        self._low_latency.exchanges.get(call_shape.canonical(), resolve("cuda" if is_nccl else None))

    @strict_keywords
    def get_comm_stream(self) -> Any:
        """The stream that asynchronous calls run on; on the CPU the only one there is."""
        if not torch.cuda.is_available():
            return torch.cpu.current_stream()
        return self._low_latency.streams.of(torch.device("cuda", torch.cuda.current_device()))

    @strict_keywords
    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """Scratch memory of `num_rdma_bytes` or `num_nvl_bytes`; unlike upstream's, nothing is received in it.

        Raises:
            ShapeError: `offset` and `size` reach past its end.
        """
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        if use_rdma_buffer not in self._scratch:
            self._scratch[use_rdma_buffer] = torch.zeros(num_bytes, dtype=torch.uint8)
        end = num_bytes - (num_bytes - offset) % dtype.itemsize
        whole = self._scratch[use_rdma_buffer][offset:end].view(dtype)
        if size is None:
            return whole
        if torch.Size(size).numel() > whole.numel():
            raise ShapeError(f"`size` must hold at most {whole.numel()} elements of {dtype} (got {list(size)})")
        return whole[: torch.Size(size).numel()].view(size)

    @strict_keywords
    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing to do: signals carry their round and are never cleaned."""
        self._check_usable()

    @strict_keywords
    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> DispatchResult:
        """Send each token to its experts.

        Collective. The results are fresh tensors, valid at once, or after the hook where one is asked for.

        Args:
            x: [T, H] bf16, T <= M (0 allowed).
            topk_idx: [T, K] int64 or int32; -1 leaves that choice unrouted. An expert named twice gets the token once.
            num_max_dispatch_tokens_per_rank: M, equal on all ranks.
            num_experts: E.
            cumulative_local_expert_recv_stats: [L] int32, `recv_count` is added to it.
            dispatch_wait_recv_cost_stats: [R] int64, nanoseconds waited for each rank are added to it.
            use_fp8: quantise on the way out, a scale for each 128 channels.
            round_scale: with FP8, round the scales up to powers of two.
            use_ue8m0: with FP8 and `round_scale`, give the scales as packed exponents.
            async_finish: on CUDA, run on the communication stream, after what is on the current one; return an event.
            return_recv_hook: return after the send half; calling the hook receives, on the stream of this call.

        Returns:
            recv_x: bf16 [L, M*R, H], or with FP8 (e4m3 [L, M*R, H], scales fp32 [L, M*R, H/128] or int32
                [L, M*R, H/512], stored by column). Rows of an expert are ordered by rank and token.
            recv_count: [L] int32, rows of each expert; those past it are undefined.
            handle: (src_info [L, M*R] int32, layout_range [L, R] int64 = begin << 32 | count, M, H, E).
            event: to wait on, with `async_finish`.
            hook: receives, with `return_recv_hook`; else None. May be called again, without effect.

        Raises:
            ShapeError, RoutingError, ConfigError, StateError: the call is rejected, nothing was sent.
            PeerTimeoutError: a rank did not deliver in time.
        """
        self._check_usable()
        if x.dim() != 2 or topk_idx.dim() != 2:
            raise ShapeError(f"`x` and `topk_idx` must have 2 dimensions (got {x.dim()} and {topk_idx.dim()})")
        call_shape = CallShape(
            num_experts=num_experts,
            num_topk=topk_idx.shape[1],
            hidden=x.shape[1],
            max_num_tokens=num_max_dispatch_tokens_per_rank,
            use_fp8=use_fp8,
            round_scale=round_scale,
            use_ue8m0=use_ue8m0,
        )
        return self._low_latency.dispatch(
            x,
            topk_idx,
            call_shape.canonical(),
            expert_stats=cumulative_local_expert_recv_stats,
            wait_stats=dispatch_wait_recv_cost_stats,
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
        )

    @strict_keywords
    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Handle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> CombineResult:
        """Bring the experts' outputs home and sum them, weighted, in fp32, in top-k order.

        Collective. A handle may be combined more than once and late; past its first combine, or two dispatches
        later, its routing is sent again for that, and the call waits for the other ranks even with a hook.

        Args:
            x: [L, M*R, H] bf16, the experts' outputs in the rows of dispatch.
            topk_idx: [T, K] as at dispatch; -1 instead drops that choice.
            topk_weights: [T, K] fp32.
            handle: of the dispatch, received.
            use_logfmt: allowed to travel in 10 bits; without effect, BF16 travels.
            zero_copy: take the outputs from `get_next_low_latency_combine_buffer(handle)` instead of `x`.
            async_finish: return an event.
            return_recv_hook: return after the send half; calling the hook receives, on the stream of this call.
            out: [T, H] bf16 for the result.
            combine_wait_recv_cost_stats: [R] int64, nanoseconds waited for each rank are added to it.

        Returns:
            combined_x [T, H] bf16, event, hook: as in `low_latency_dispatch`.

        Raises:
            ShapeError, RoutingError, ConfigError, StateError: the call is rejected, nothing was sent.
            PeerTimeoutError: a rank did not deliver in time.
        """
        self._check_usable()
        if use_logfmt and zero_copy:
            raise ConfigError("`use_logfmt` and `zero_copy` exclude each other (got both)")
        return self._low_latency.combine(
            x,
            topk_idx,
            topk_weights,
            handle,
            zero_copy=zero_copy,
            async_finish=async_finish,
            return_recv_hook=return_recv_hook,
            out=out,
            wait_stats=combine_wait_recv_cost_stats,
        )

    @strict_keywords
    def get_next_low_latency_combine_buffer(self, handle: Handle) -> Tensor:
        """Memory [L, M*R, H] bf16 for the experts' outputs, which the handle's next combine with `zero_copy` reads."""
        self._check_usable()
        return self._low_latency.staging(handle)

    def _check_usable(self) -> None:
        if self.runtime.is_destroyed:
            raise StateError("the buffer is destroyed")
        if not self.low_latency_mode:
            raise StateError("the low-latency calls need a Buffer made with `low_latency_mode=True`")
