"""Dispatch and combine: the calls a user makes, their order checked, their halves run by an engine."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from torch.compiler import is_compiling, is_dynamo_compiling

from . import engines, heap, ops
from .arguments import Arguments
from .errors import ConfigError
from .halves import Halves
from .results import Dispatched, PendingCombine, PendingDispatch
from .wire import Wire

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from torch import Tensor

    from .config import Config

_ids = itertools.count()


class AllToAll(Halves):
    """One-sided all-to-all between the ranks of an expert-parallel group.

    A round is `dispatch` and `combine`; each is a send half, which never waits for the round's own messages, and a
    receive half. The blocking form runs both; in the hook form (`dispatch_send`, `combine_send`) the caller computes in
    between. Every rank makes the same calls in the same order; up to `depth` rounds may be open, and a round need not
    be combined. All memory is fixed at construction. Not for several threads at once.

    On CUDA every half enqueues one kernel on the current stream and returns; nothing waits for the device. What a
    kernel finds wrong is raised by a later call, which has then done nothing itself, or by `check` or `synchronize`; a
    round that failed gives zero counts and zero rows. Halves on several streams have to be ordered by events, and their
    tensors kept (`record_stream`), as with any work on CUDA; on one stream there is nothing to do. Halves can be
    captured into graphs, and replays mixed with calls; all halves of a round belong to the same capture.

    Ranks of one host share memory; between hosts, on the CPU only, messages travel over gloo (docs/hosts.md).

    Letters in the shapes: T tokens of this call (0 to M), M `max_num_tokens`, K top-k, H hidden, E experts, L local
    experts, R ranks.
    """

    def __init__(
        self,
        group: heap.Group,
        config: Config,
        device: torch.device | str | int | None = None,
        *,
        num_sms: int | None = None,
        transport: str = "auto",
    ) -> None:
        """Allocate this rank's memory and map that of the others.

        Collective: every rank of the group constructs, with equal configs.

        Args:
            group: a torch.distributed process group (its backend is used here only), or one of `virtual_ranks`.
            config: the shape of everything.
            device: where the tensors of the calls are, the CPU or a CUDA device; None is torch's default device.
            num_sms: on CUDA, the SMs that a half may occupy; None is all of them.
            transport: on CUDA, "direct" maps the others' memory, "nvshmem" goes by NVSHMEM; "auto" by it where it must.

        Raises:
            ConfigError: the config does not fit the group, or differs between ranks.
            PeerAccessError: the memory of a rank cannot be mapped, or its host not be reached.
            NativeNotBuiltError: the extension is missing.
            CudaError: there is no such device, or no driver; says which.
        """
        self.rank, self.num_ranks = heap.rank_and_size(group)
        self._engine: engines.Engine | None = self._make_engine(group, config, device, num_sms, transport)
        self.config = config
        self.wire = Wire.of(config)
        self.engine = self._engine.name
        self.device = self._engine.device
        self.heap_bytes = self._engine.heap_bytes
        self._arguments = Arguments(config, self.wire, self.num_ranks, self._engine.place)
        self._reply_bytes = self.wire.reply_bytes
        self.plain = self._engine.plain()
        self.traced = ops.Traced(self, next(_ids))

    @staticmethod
    def _make_engine(
        group: heap.Group, config: Config, device: Any, num_sms: int | None, transport: str
    ) -> engines.Engine:
        return engines.make(group, config, engines.resolve(device), num_sms, transport)

    def __enter__(self) -> AllToAll:
        """Return itself; leaving the block closes it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Let go of the memory. Not collective, may be repeated; results already handed out stay readable."""
        engine, self._engine, self.plain = self._engine, None, None
        if engine is not None:
            engine.close()

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._engine is None

    @property
    def epoch(self) -> int:
        """Rounds begun so far; the number of the next one. Inside a capture, those of the capture."""
        return self._open().epoch

    @property
    def dead_ranks(self) -> tuple[int, ...]:
        """The ranks that this one has given up; they are neither sent to nor waited for."""
        return self._open().dead_ranks()

    @property
    def remote_bytes(self) -> int:
        """Bytes that this rank has written to other ranks' memory so far, headers included."""
        return self._open().remote_bytes()

    def check(self) -> None:
        """Raise what a half on CUDA has recorded, without waiting for those that still run.

        Raises:
            PeerTimeoutError: a rank did not deliver within the deadline; the round is lost.
            RoutingError: a value in `topk_ids` was no expert, and was taken for -1.
            StateError: the halves of a round were enqueued so that others came in between, as by a replayed graph.
            ProtocolError: a rank broke the protocol.
        """
        self._open().check()

    def synchronize(self) -> None:
        """Wait for the work of the current stream, then `check`."""
        self._open().synchronize()

    def mask_rank(self, rank: int, *, dead: bool = True) -> None:
        """Give a rank up, or take it back, by hand. Only between rounds, and on every rank alike.

        Raises:
            ConfigError: `rank` is not another rank of the group.
        """
        if not isinstance(rank, int) or not 0 <= rank < self.num_ranks or rank == self.rank:
            raise ConfigError(f"`rank` must be another rank in [0, {self.num_ranks}) (got {rank!r})")
        self._open().mask(rank, dead)

    def dispatch(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor | None = None,
        *,
        scales: Tensor | None = None,
        num_valid_tokens: Tensor | None = None,
        out: Tensor | None = None,
        out_scales: Tensor | None = None,
        expert_stats: Tensor | None = None,
        wait_stats: Tensor | None = None,
    ) -> Dispatched:
        """Send each token to the ranks of its experts and wait for the tokens routed here.

        Collective: every rank calls it once per round. The result is overwritten `depth` dispatches later.

        Args:
            x: [T, H] in the payload's dtype, rows contiguous (on CUDA at multiples of 16 bytes). For "fp8_e4m3" bf16,
                fp16 or fp32, quantised on the way, or float8_e4m3fn with `scales`; for "opaque" any dtype whose rows
                are `payload_bytes` bytes.
            topk_ids: [T, K] int32 or int64: the experts of each token; -1 leaves a choice unrouted. An expert named
                twice by a token gets it once, and counts both weights.
            topk_weights: [T, K] fp32 with `weights_at` "dispatch", else None.
            scales: of an x that is already quantised: [T, H/128] fp32, or rows of `scale_bytes` bytes for "opaque".
            num_valid_tokens: int32 or int64 tensor of one element: the rows from there on are not sent, and combine
                gives zeros for them. On CUDA never read by the host, so that a graph follows it.
            out: expert_major: [L, R*M, H] in the payload's dtype to receive into, instead of the slot's own buffer.
            out_scales: likewise, [L, R*M, groups], row-major or column-major.
            expert_stats: [L] int32 or int64: each expert's token count is added.
            wait_stats: [R] int64: nanoseconds waited for each source are added.

        Returns:
            The tokens of this rank's experts, see `Dispatched`.

        Raises:
            ShapeError: a tensor is not as above; names it.
            RoutingError: a value in `topk_ids` is no expert. On CUDA raised by a later call, and taken for -1.
            StateError: a receive was left out, or the object is closed.
            PeerTimeoutError: a rank did not deliver within the deadline; the round is lost.

        Source: DESIGN.md, "The life of a round".
        """
        if not is_dynamo_compiling() and self.plain is not None:
            # One by one: to unpack a tuple costs more.
            received: Dispatched | None = self.plain.dispatch(
                self, x, topk_ids, topk_weights, scales, num_valid_tokens, out, out_scales, expert_stats, wait_stats
            )
            if received is not None:
                return received
        options = (scales, num_valid_tokens, out, out_scales, expert_stats, wait_stats)
        if is_compiling():
            return self.traced.dispatch_send(x, topk_ids, topk_weights, options).receive()  # type: ignore[return-value]
        return self._dispatch(x, topk_ids, topk_weights, options)

    def dispatch_send(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor | None = None,
        *,
        scales: Tensor | None = None,
        num_valid_tokens: Tensor | None = None,
        out: Tensor | None = None,
        out_scales: Tensor | None = None,
        expert_stats: Tensor | None = None,
        wait_stats: Tensor | None = None,
    ) -> PendingDispatch:
        """Run the send half of `dispatch`: same arguments and errors. The inputs may be changed once it returns.

        Returns:
            What to call `receive()` on, when the tokens are needed.
        """
        if not is_dynamo_compiling() and self.plain is not None:
            pending: PendingDispatch | None = self.plain.dispatch_send(
                self, x, topk_ids, topk_weights, scales, num_valid_tokens, out, out_scales, expert_stats, wait_stats
            )
            if pending is not None:
                return pending
        options = (scales, num_valid_tokens, out, out_scales, expert_stats, wait_stats)
        if is_compiling():
            return self.traced.dispatch_send(x, topk_ids, topk_weights, options)  # type: ignore[return-value]
        begun, rest = self._send_dispatch(x, topk_ids, topk_weights, options)
        return PendingDispatch(begun, self, rest)

    def combine(
        self,
        expert_out: Tensor,
        recv: Dispatched,
        topk_weights: Tensor | None = None,
        *,
        out: Tensor | None = None,
        wait_stats: Tensor | None = None,
    ) -> Tensor:
        """Bring the experts' outputs home and add them up, weighted, for each token.

        Collective: every rank calls it for the same round.

        Args:
            expert_out: in the output dtype, last dimension contiguous (on CUDA rows at multiples of 16 bytes).
                expert_major: [L, R*M, H], a row for each row of `recv.x`; token_major: [R*M, H], a row for each
                received token, already weighted and summed over this rank's experts. Rows without a token are not read.
            recv: the dispatch that it answers.
            topk_weights: [T, K] fp32 with `weights_at` "combine", else None.
            out: [T, H] in the output dtype to write to, instead of a new tensor.
            wait_stats: [R] int64: nanoseconds waited for each source are added.

        Returns:
            [T, H] in the output dtype: the fp32 sum, in ascending rank order (choice order with weights given here);
            zeros for a token without an expert.

        Raises:
            ShapeError: a tensor is not as above; names it.
            StateError: `recv` is stale, already combined, or of another object; or the object is closed.
            PeerTimeoutError: a rank did not deliver within the deadline; the round is lost.
        """
        if not is_dynamo_compiling() and self.plain is not None:
            home: Tensor | None = self.plain.combine(self, expert_out, recv, topk_weights, out, wait_stats)
            if home is not None:
                return home
        if is_compiling():
            return self.traced.combine_send(expert_out, recv, topk_weights, (out, wait_stats)).receive()
        return self._combine(expert_out, recv, topk_weights, out, wait_stats)

    def combine_send(
        self,
        expert_out: Tensor,
        recv: Dispatched,
        topk_weights: Tensor | None = None,
        *,
        out: Tensor | None = None,
        wait_stats: Tensor | None = None,
    ) -> PendingCombine:
        """Run the send half of `combine`: same arguments and errors. `expert_out` may be changed once it returns.

        Returns:
            What to call `receive()` on, when the result is needed.
        """
        if not is_dynamo_compiling() and self.plain is not None:
            pending: PendingCombine | None = self.plain.combine_send(
                self, expert_out, recv, topk_weights, out, wait_stats
            )
            if pending is not None:
                return pending
        if is_compiling():
            options = (out, wait_stats)
            return self.traced.combine_send(expert_out, recv, topk_weights, options)  # type: ignore[return-value]
        begun, rest = self._send_combine(expert_out, recv, topk_weights, out, wait_stats)
        return PendingCombine(begun, self, rest)
