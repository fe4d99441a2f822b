"""The halves as `torch.library` operators, so that a step that calls them compiles with `fullgraph=True`.

Under `torch.compile` the methods of `AllToAll` go through here by themselves. Every operator is said to change the
object's `state` tensor, which keeps the compiler from reordering or dropping calls; their outputs are fresh tensors,
for a compiler may write into what an operator returned, and the heap is not its to write to.
"""

from __future__ import annotations

import dataclasses
import weakref
import zlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import StateError
from .results import RESULT_NAMES, ResultTensors

if TYPE_CHECKING:
    from .all_to_all import AllToAll

# The only global state of the package: an operator's arguments cannot be objects. Weak, so that it keeps nothing alive.
_live: weakref.WeakValueDictionary[int, AllToAll] = weakref.WeakValueDictionary()

COUNT_BITS = 24  # of an object's number: the objects that a process makes; above them, of its config

_library: Any = torch.library.Library("moebius", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "dispatch_send(Tensor(a!) state, int owner, Tensor x, Tensor topk_ids, Tensor? topk_weights, Tensor? scales, "
    "Tensor? num_valid_tokens) -> Tensor"
)
# One that a config has none of is an empty tensor in the operator's result and None to the caller.
_library.define(
    f"dispatch_recv(Tensor(a!) state, int owner, Tensor round) -> ({', '.join(['Tensor'] * len(RESULT_NAMES))})"
)
_library.define(
    "combine_send(Tensor(a!) state, int owner, Tensor round, Tensor expert_out, Tensor? topk_weights) -> Tensor"
)
_library.define("combine_recv(Tensor(a!) state, int owner, Tensor round, SymInt num_tokens) -> Tensor")

_pending: weakref.WeakKeyDictionary[AllToAll, dict[int, Any]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass
class TracedDispatched(ResultTensors):
    """`Dispatched`, as compiled code sees it: the same names, in tensors of its own."""

    num_tokens: int
    round: Tensor


@dataclasses.dataclass
class TracedPendingDispatch:
    """`PendingDispatch`, as compiled code sees it."""

    owner: Traced
    round: Tensor
    num_tokens: int

    def receive(self) -> TracedDispatched:
        """Run the receive half; once."""
        return self.owner.dispatch_recv(self.round, self.num_tokens)


@dataclasses.dataclass
class TracedPendingCombine:
    """`PendingCombine`, as compiled code sees it."""

    owner: Traced
    round: Tensor
    num_tokens: int

    def receive(self) -> Tensor:
        """Run the receive half; once."""
        combined: Tensor = torch.ops.moebius.combine_recv(
            self.owner.state, self.owner.number, self.round, self.num_tokens
        )
        return combined


class Traced:
    """The calls of one `AllToAll` as operators."""

    def __init__(self, owner: AllToAll, number: int) -> None:
        """Register the object under a number of its own, made of `number`.

        What compilers keep on disk is found again by the calls alone, in which only the number stands for the shape of
        the results: so it has to differ between configs.
        """
        shape = f"{owner.config!r} {owner.num_ranks} {owner.device}"
        number |= zlib.crc32(shape.encode()) << COUNT_BITS
        self.number = number
        self.state = torch.zeros(1, dtype=torch.int64, device="cpu")
        is_token_major = owner.config.layout == "token_major"
        missing = {"src_info", "layout_range"} if is_token_major else {"topk_ids", "topk_weights"}
        if owner.wire.scale_dtype is None:
            missing.add("scales")
        self.missing = frozenset(missing)
        _live[number] = owner

    def dispatch_send(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor | None, options: tuple[Tensor | None, ...]
    ) -> TracedPendingDispatch:
        """The operator of `AllToAll.dispatch_send`; `options` are its keywords in order."""
        scales, num_valid_tokens, *rest = options
        if any(option is not None for option in rest):
            raise StateError("out, out_scales, expert_stats and wait_stats are not available under torch.compile")
        begun = torch.ops.moebius.dispatch_send(
            self.state, self.number, x, topk_ids, topk_weights, scales, num_valid_tokens
        )
        return TracedPendingDispatch(self, begun, x.shape[0])

    def dispatch_recv(self, begun: Tensor, num_tokens: int) -> TracedDispatched:
        """The operator of `PendingDispatch.receive`."""
        tensors = torch.ops.moebius.dispatch_recv(self.state, self.number, begun)
        found: dict[str, Any] = {n: None if n in self.missing else tensors[i] for i, n in enumerate(RESULT_NAMES)}
        return TracedDispatched(num_tokens=num_tokens, round=begun, **found)

    def combine_send(
        self, expert_out: Tensor, recv: Any, topk_weights: Tensor | None, options: tuple[Tensor | None, ...]
    ) -> TracedPendingCombine:
        """The operator of `AllToAll.combine_send`."""
        if any(option is not None for option in options):
            raise StateError("out and wait_stats are not available under torch.compile")
        begun = torch.ops.moebius.combine_send(self.state, self.number, recv.round, expert_out, topk_weights)
        return TracedPendingCombine(self, begun, recv.num_tokens)


def _owner(number: int) -> AllToAll:
    found = _live.get(number)
    if found is None:
        raise StateError("the AllToAll that this step was compiled with is gone")
    return found


def _dispatch_send(
    state: Tensor,
    owner: int,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    scales: Tensor | None,
    num_valid_tokens: Tensor | None,
) -> Tensor:
    a2a = _owner(owner)
    pending = a2a.dispatch_send(x, topk_ids, topk_weights, scales=scales, num_valid_tokens=num_valid_tokens)
    _pending.setdefault(a2a, {})[pending.epoch % a2a.config.depth] = pending
    return torch.tensor([pending.epoch], device="cpu")


def _dispatch_recv(state: Tensor, owner: int, begun: Tensor) -> tuple[Tensor, ...]:
    a2a = _owner(owner)
    slot = int(begun) % a2a.config.depth
    recv = _take(a2a, slot, int(begun)).receive()
    _pending[a2a][slot] = recv
    found = (getattr(recv, name) for name in RESULT_NAMES)
    return tuple(state.new_empty(0) if tensor is None else tensor.clone() for tensor in found)


def _combine_send(state: Tensor, owner: int, begun: Tensor, expert_out: Tensor, topk_weights: Tensor | None) -> Tensor:
    a2a = _owner(owner)
    slot = int(begun) % a2a.config.depth
    _pending[a2a][slot] = a2a.combine_send(expert_out, _take(a2a, slot, int(begun)), topk_weights)
    return begun.clone()


def _combine_recv(state: Tensor, owner: int, begun: Tensor, num_tokens: int) -> Tensor:
    a2a = _owner(owner)
    combined: Tensor = _take(a2a, int(begun) % a2a.config.depth, int(begun)).receive()
    return combined


def _take(a2a: AllToAll, slot: int, epoch: int) -> Any:
    """What the last half of round `epoch` left for the next one."""
    found = _pending.get(a2a, {}).get(slot)
    if found is None or found.epoch != epoch:
        raise StateError(f"round {epoch} is stale: a later dispatch reuses its memory")
    return found


def _fake_dispatch_recv(state: Tensor, owner: int, begun: Tensor) -> tuple[Tensor, ...]:
    a2a = _owner(owner)
    config = a2a.config
    wire = a2a.wire
    num_local = config.num_local_experts(a2a.num_ranks)
    num_rows = a2a.num_ranks * config.max_num_tokens
    is_token_major = config.layout == "token_major"
    rows = (num_rows,) if is_token_major else (num_local, num_rows)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "x": ((*rows, wire.payload_len), wire.dtype),
        "scales": ((*rows, wire.scale_len), wire.scale_dtype),
        "expert_num_tokens": ((num_local,), torch.int32),
        "src_num_tokens": ((a2a.num_ranks,), torch.int32),
        "topk_ids": ((num_rows, config.num_topk), torch.int32),
        "topk_weights": ((num_rows, config.num_topk), torch.float32),
        "src_info": ((num_local, num_rows), torch.int32),
        "layout_range": ((num_local, a2a.num_ranks), torch.int64),
    }
    made = {}
    device = a2a.device
    for name, (shape, dtype) in shapes.items():
        is_missing = name in a2a.traced.missing
        made[name] = state.new_empty(0) if is_missing else state.new_empty(shape, dtype=dtype, device=device)
    if "scales" not in a2a.traced.missing and not is_token_major and config.payload == "fp8_e4m3":
        columns = (num_local, wire.scale_len, num_rows)
        made["scales"] = state.new_empty(columns, dtype=wire.scale_dtype, device=device).transpose(1, 2)
    return tuple(made[name] for name in RESULT_NAMES)


def _fake_combine_recv(state: Tensor, owner: int, begun: Tensor, num_tokens: int) -> Tensor:
    a2a = _owner(owner)
    return state.new_empty((num_tokens, a2a.config.hidden), dtype=a2a.wire.output_dtype, device=a2a.device)


def _register(name: str, implementation: Any, fake: Any) -> None:
    # `state` and `round` are on the host wherever the tokens are: a round's number is the host's to know.
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"moebius::{name}", fake, lib=_library)


_register("dispatch_send", _dispatch_send, lambda state, *_: state.new_empty(1))
_register("dispatch_recv", _dispatch_recv, _fake_dispatch_recv)
_register("combine_send", _combine_send, lambda state, *_: state.new_empty(1))
_register("combine_recv", _combine_recv, _fake_combine_recv)
