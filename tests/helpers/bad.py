"""Values that no call may accept, for every argument; each is certain to be wrong, whatever else is passed."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moebius import AllToAll, Dispatched
from tests.helpers.rounds import dispatch_arguments

if TYPE_CHECKING:
    from moebius.reference import RankInput
    from tests.helpers.cases import Case

Arguments = dict[str, Any]
Bad = tuple[str, Callable[[], Any]]  # in words; makes the value

NOT_TENSORS: list[Bad] = [
    ("an int", lambda: 3),
    ("a float", lambda: 2.5),
    ("NaN", lambda: math.nan),
    ("a string", lambda: "x"),
    ("bytes", lambda: b"\0" * 64),
    ("a list", lambda: [[0.0] * 4] * 4),
    ("an object", object),
    ("a class", lambda: Tensor),
    ("an array", lambda: torch.zeros(4, 4).numpy()),
    ("a function", lambda: len),
]
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
)
ALLOWED: dict[str, tuple[torch.dtype, ...]] = {
    "topk_ids": (torch.int32, torch.int64),
    "topk_weights": (torch.float32,),
    "num_valid_tokens": (torch.int32, torch.int64),
    "expert_stats": (torch.int32, torch.int64),
    "wait_stats": (torch.int64,),
}


@dataclasses.dataclass(frozen=True)
class Call:
    """A legal call: what is passed by name, and which arguments must not be None."""

    arguments: Arguments
    required: frozenset[str]


def legal_dispatch(a2a: AllToAll, inputs: RankInput) -> Call:
    """Every option of a dispatch in use."""
    config = a2a.config
    num_local = config.num_local_experts(a2a.num_ranks)
    arguments = dispatch_arguments(config, inputs)
    arguments["num_valid_tokens"] = torch.tensor([inputs.num_tokens])
    arguments["expert_stats"] = torch.zeros(num_local, dtype=torch.int64)
    arguments["wait_stats"] = torch.zeros(a2a.num_ranks, dtype=torch.int64)
    arguments["out"] = arguments["out_scales"] = None
    required = {"x", "topk_ids"} | {name for name in ("topk_weights", "scales") if arguments[name] is not None}
    return Call(arguments, frozenset(required))


def legal_combine(a2a: AllToAll, inputs: RankInput, recv: Dispatched, expert_out: Tensor) -> Call:
    """Every option of a combine in use."""
    late = a2a.config.weights_at == "combine"
    arguments = {
        "expert_out": expert_out,
        "recv": recv,
        "topk_weights": inputs.topk_weights if late else None,
        "out": torch.zeros(inputs.num_tokens, a2a.config.hidden, dtype=expert_out.dtype),
        "wait_stats": torch.zeros(a2a.num_ranks, dtype=torch.int64),
    }
    required = {"expert_out", "recv"} | ({"topk_weights"} if late else set())
    return Call(arguments, frozenset(required))


def without_memory(call: Call, name: str) -> list[Bad]:
    """Tensors of the right shape with nothing behind them: a missing check does not fail but crashes the process."""
    good = call.arguments[name]
    if not isinstance(good, Tensor):
        return []
    return [("freed", lambda: freed(good)), ("fake", lambda: fake(good))]


def bad_values(case: Case, call: Call, name: str) -> list[Bad]:
    """What `name` must not be in a call."""
    good = call.arguments[name]
    bad = list(NOT_TENSORS)
    if name in call.required:
        bad.append(("None", lambda: None))
    if name == "recv":
        return [*bad, ("a tensor", lambda: torch.zeros(3)), ("a class of results", lambda: Dispatched)]
    if good is None:
        # Weights at the wrong half, scales that the payload has none of; out= of a shape that cannot be.
        return [*bad, ("a tensor that has no place", lambda: torch.zeros(1, 2, 3, 4))]
    return bad + bad_tensors(name, good, is_opaque=case.payload.startswith("opaque"))


def bad_tensors(name: str, good: Tensor, *, is_opaque: bool) -> list[Bad]:
    """Tensors unlike a good one in a single respect."""
    is_bytes = is_opaque and name in ("x", "scales")  # of any dtype
    allowed = ALLOWED.get(name, (good.dtype,))
    if name == "x" and good.dtype in (torch.bfloat16, torch.float16, torch.float32):
        allowed = (torch.bfloat16, torch.float16, torch.float32)  # FP8 quantises them all
    bad: list[Bad] = [
        (f"of {dtype}", lambda dtype=dtype: torch.zeros(good.shape, dtype=dtype))  # type: ignore[misc]
        for dtype in DTYPES
        if dtype not in allowed and not (is_bytes and dtype.itemsize == good.element_size())
    ]
    if is_bytes:
        width = good.shape[1] * good.element_size()
        bad += [
            (f"of {dtype}, which does not divide the row", lambda dtype=dtype: narrower(len(good), width, dtype))  # type: ignore[misc]
            for dtype in DTYPES
            if width % dtype.itemsize
        ]
    bad += [
        ("on meta", lambda: good.to("meta")),
        ("without an element", lambda: good.new_empty(0)),
        ("of a longer last dimension", lambda: torch.cat([good, good[..., :1]], dim=-1)),
        ("of a shorter last dimension", lambda: good[..., :-1]),
    ]
    if name != "num_valid_tokens":
        bad += [
            ("of one dimension more", lambda: good.unsqueeze(0)),
            ("of one row", lambda: good[0]),
            ("with a dimension of one inside", lambda: good.unsqueeze(-1)),
        ]
    if good.dim() > 1:
        bad += [
            ("of a row more", lambda: torch.cat([good, good[:1]])),
            ("of a row less", lambda: good[:-1]),
            ("sparse", lambda: torch.zeros(good.shape).to_sparse()),
        ]
    if good.shape[-1] > 1:
        bad.append(("of every other element", lambda: torch.stack([good, good], dim=-1)[..., 0]))
    if name == "topk_ids":
        bad += [(f"with the id {value}", lambda value=value: with_id(good, value)) for value in BAD_IDS]  # type: ignore[misc]
        bad.append(("of NaN", lambda: torch.full(good.shape, torch.nan)))
    return bad


def narrower(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of as many elements as fit in `width` bytes."""
    return torch.zeros(num_rows, width // dtype.itemsize, dtype=dtype)


BAD_IDS = (
    -2,
    -(1 << 31),
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    1 << 40,
    (1 << 62) + 1,
    -(1 << 40),
    -(1 << 63),
    (1 << 63) - 1,
)


def with_id(ids: Tensor, value: int) -> Tensor:
    """One id replaced; in int64 where it does not fit."""
    changed = ids.clone() if abs(value) < 1 << 31 else ids.to(torch.int64, copy=True)
    changed[random.Random(value).randrange(len(ids)), -1] = value
    return changed


def freed(tensor: Tensor) -> Tensor:
    """A tensor whose storage is gone, as sharded parameters are between uses."""
    gone = tensor.clone()
    gone.untyped_storage().resize_(0)
    return gone


def fake(tensor: Tensor) -> Tensor:
    """A tensor of a tracing compiler: shape and dtype only."""
    with FakeTensorMode():
        return torch.empty(tensor.shape, dtype=tensor.dtype)


INTS: list[Any] = [
    None,
    True,
    False,
    1.5,
    math.nan,
    math.inf,
    "8",
    b"8",
    [],
    (),
    {},
    object(),
    -1,
    1 << 40,
    -(1 << 70),
    int,
]
WORDS: list[Any] = [None, 0, 1.5, True, "", "BF16", "bf16 ", b"bf16", ["bf16"], ("bf16",), {}, {"bf16"}, object(), str]
BAD_FIELDS: dict[str, list[Any]] = {
    "num_experts": [*INTS, 0],
    "num_topk": [*INTS, 0, 33],
    "hidden": [*INTS, 0, 7],
    "max_num_tokens": [*INTS, 0, (1 << 20) + 1],
    "depth": [*INTS, 0, 1, 9],
    "chunk_bytes": [*INTS, (1 << 30) + 1],
    "payload_bytes": [*INTS, 32, 17],  # the payload is not opaque
    "scale_bytes": [*INTS, 32, 3],
    "payload": WORDS,
    "scale_format": [*WORDS, "pow2", "ue8m0"],  # likewise
    "layout": WORDS,
    "weights_at": WORDS,
    "output": [value for value in WORDS if value is not None] + ["fp8_e4m3", "opaque"],
    "timeout_s": [None, True, 0, 0.0, -1, math.nan, math.inf, -math.inf, 1e7, 1e-9, "1", [], object(), float],
}
GOOD_FIELDS: dict[str, Any] = {"num_experts": 8, "num_topk": 2, "hidden": 64, "max_num_tokens": 4}
