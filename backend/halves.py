"""The halves of a round as Python makes them: every argument checked, the order of calls kept, the engine called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .errors import StateError
from .results import Dispatched
from .rounds import COMBINED, RECEIVED, REPLIED, SENT, Round

if TYPE_CHECKING:
    from torch import Tensor

    from . import engines
    from .arguments import Arguments, Receiving
    from .wire import Wire

# What combine receive takes: where to, bytes from row to row, the weights, statistics and what these are kept alive by.
Returning = tuple["Tensor | None", int, "Tensor | None", int, "Tensor | None"]


class Halves:
    """What `AllToAll` does where the engine has no calls of its own, or they decline.

    Attributes:
        wire: what travels.
        device: where the tensors are.
        plain: the engine's own calls (`_cuda.Plain`); None without such.
    """

    wire: Wire
    device: torch.device
    plain: Any
    _engine: engines.Engine | None
    _arguments: Arguments
    _reply_bytes: int

    def _send_dispatch(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor | None, options: tuple[Tensor | None, ...]
    ) -> tuple[Round, Receiving]:
        """Check and send; the round, and what the receive half takes beside it."""
        engine = self._engine or self._open()
        scales, num_valid_tokens, *receiving = options
        sent, num_tokens, _kept = self._arguments.dispatch(x, topk_ids, topk_weights, scales, num_valid_tokens)
        rest = self._arguments.receiving(*receiving)
        return engine.send_dispatch(sent, num_tokens), rest

    def _dispatch(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor | None, options: tuple[Tensor | None, ...]
    ) -> Dispatched:
        """Both halves; nothing has happened where an argument is refused."""
        engine = self._engine or self._open()
        scales, num_valid_tokens, *receiving = options
        sent, num_tokens, _kept = self._arguments.dispatch(x, topk_ids, topk_weights, scales, num_valid_tokens)
        given, stats, _given = self._arguments.receiving(*receiving)
        begun, buffers = engine.dispatch(sent, num_tokens, given, stats)
        begun.stage = RECEIVED
        return Dispatched(begun, buffers)

    def _receive_dispatch(
        self, begun: Round, given: engines.Given | None, stats: tuple[int, bool, int], _kept: object
    ) -> Dispatched:
        engine = self._engine or self._open()
        if begun.stage is not SENT:
            raise begun.refusal(SENT, "dispatch receive")
        buffers = engine.receive_dispatch(begun, given, stats)
        begun.stage = RECEIVED
        return Dispatched(begun, buffers)

    def _send_combine(
        self, expert_out: Tensor, recv: Dispatched, topk_weights: Any, out: Any, wait_stats: Any
    ) -> tuple[Round, Returning]:
        """Check and send; the round, and what the receive half takes beside it."""
        begun, sent, rest = self._check_combine(expert_out, recv, topk_weights, out, wait_stats)
        (self._engine or self._open()).send_combine(begun, sent)
        begun.stage = REPLIED
        return begun, rest

    def _combine(self, expert_out: Tensor, recv: Dispatched, topk_weights: Any, out: Any, wait_stats: Any) -> Tensor:
        """Both halves; nothing has happened where an argument is refused."""
        begun, sent, rest = self._check_combine(expert_out, recv, topk_weights, out, wait_stats)
        home, received = self._home(begun, *rest)
        (self._engine or self._open()).combine(begun, sent, received)
        begun.stage = COMBINED
        return home

    def _check_combine(
        self, expert_out: Tensor, recv: Dispatched, topk_weights: Any, out: Any, wait_stats: Any
    ) -> tuple[Round, tuple[int, int, int], Returning]:
        """The round, what the send half takes, and what the receive half takes beside them."""
        engine = self._engine or self._open()
        if not isinstance(recv, Dispatched):
            raise StateError(f"`recv` must be what dispatch returned (got {type(recv).__name__})")
        begun = recv._round
        if begun.stage is not RECEIVED:
            raise begun.refusal(RECEIVED, "combine")
        if not engine.is_own(begun):
            raise StateError("combine: `recv` is the result of another AllToAll")
        check = self._arguments
        sent = check.expert_out(expert_out)
        weights = check.combine_weights(topk_weights, begun.num_tokens)
        out_stride = check.combined(out, begun.num_tokens) if out is not None else self._reply_bytes
        wait_ptr = check.wait_stats(wait_stats) if wait_stats is not None else 0
        return begun, sent, (out, out_stride, weights, wait_ptr, wait_stats)

    def _receive_combine(self, begun: Round, *rest: Any) -> Tensor:
        """`rest` as in `Returning`."""
        engine = self._engine or self._open()
        if begun.stage is not REPLIED:
            raise begun.refusal(REPLIED, "combine receive")
        home, received = self._home(begun, *rest)
        engine.receive_combine(begun, *received)
        begun.stage = COMBINED
        return home

    def _home(
        self, begun: Round, out: Tensor | None, out_stride: int, weights: Any, wait_ptr: int, _wait_stats: object
    ) -> tuple[Tensor, tuple[int, int, int, int]]:
        """Where a combine's result goes, and that as the engine takes it."""
        if out is None:
            # Torch reads sizes that come one by one faster than a tuple of them.
            out = torch.empty(begun.num_tokens, self.wire.hidden, dtype=self.wire.output_dtype, device=self.device)
        weights_ptr = weights.data_ptr() if weights is not None else 0
        return out, (out.data_ptr(), out_stride, weights_ptr, wait_ptr)

    def _open(self) -> engines.Engine:
        """The engine; a `StateError` once the object is closed. The halves call it for the error alone."""
        if self._engine is None:
            raise StateError("this AllToAll is closed")
        return self._engine
