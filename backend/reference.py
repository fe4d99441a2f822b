"""The oracle: dispatch and combine of all ranks at once, in plain torch, to the bit.

Nothing here is fast or distributed. Every engine is held against it, so each sum is an explicit ascending loop with
a separately rounded multiply and add, and nothing depends on how torch orders a reduction.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import SCALE_GROUP, Config, ScaleFormat
from .results import ResultTensors

if TYPE_CHECKING:
    from collections.abc import Sequence

FP8_MAX = 448.0  # largest finite float8_e4m3fn
AMAX_FLOOR = 1e-4  # keeps the scale of an all-zero group finite; the value DeepEP chose
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class RankInput:
    """What one rank passes to dispatch.

    Attributes:
        x: [T, H] tokens (opaque: [T, *] of `payload_bytes` bytes a row).
        topk_ids: [T, K] integers, -1 leaves a choice unrouted.
        topk_weights: [T, K] fp32, for dispatch or for combine as the config says.
        scales: of FP8 and opaque tokens that come quantised.
        num_valid_tokens: rows from here on are padding; None for no padding.
    """

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    scales: Tensor | None = None
    num_valid_tokens: int | None = None

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.topk_ids.shape[0]

    @property
    def num_valid(self) -> int:
        """Tokens that are sent."""
        return self.num_tokens if self.num_valid_tokens is None else min(self.num_valid_tokens, self.num_tokens)


@dataclasses.dataclass
class RankDispatched(ResultTensors):
    """What dispatch gives one rank: the tensors of `Dispatched`, zero in rows that are undefined there.

    Attributes:
        sent: [R][n] int64, per source rank the tokens it sent here, ascending.
        row_of: [L, R, M] int64, the row of a token in a local expert's block, or -1.
    """

    sent: list[Tensor]
    row_of: Tensor


def fp8_scale(amax: Tensor, scale_format: ScaleFormat) -> Tensor:
    """The fp32 scale that multiplies quantised values back; rounded up to a power of two unless format "fp32"."""
    scale = amax / FP8_MAX
    if scale_format == "fp32":
        return scale
    # Adding a full mantissa carries into the exponent unless the mantissa is zero: 2^ceil(log2(scale)), exactly.
    bits = (scale.contiguous().view(torch.int32) + 0x007FFFFF) & 0x7F800000
    return bits.view(torch.float32)


def quantize_fp8(x: Tensor, scale_format: ScaleFormat = "fp32") -> tuple[Tensor, Tensor]:
    """Quantise rows to FP8 e4m3 with one scale per 128 channels.

    A NaN stays a NaN and has no part in its group's maximum; what exceeds the range saturates.

    Args:
        x: [T, H] bf16, fp16 or fp32; H is a multiple of 128 (512 for "ue8m0").
        scale_format: as `Config.scale_format`.

    Returns:
        [T, H] float8_e4m3fn and the scales: [T, H/128] fp32, or [T, H/512] int32 of four exponent bytes each, the
        first group's in the low byte.

    Source: DESIGN.md, "The two halves".
    """
    num_tokens, hidden = x.shape
    groups = x.to(torch.float32).reshape(num_tokens, hidden // SCALE_GROUP, SCALE_GROUP)
    magnitude = groups.abs()
    magnitude = torch.where(magnitude.isnan(), torch.zeros_like(magnitude), magnitude)
    amax = magnitude.amax(dim=-1).clamp_min(AMAX_FLOOR)
    scale = fp8_scale(amax, scale_format)
    # Tensor by tensor: torch takes a number divided by a tensor as its reciprocal times the number, rounded twice.
    inverse = torch.full_like(amax, FP8_MAX) / amax if scale_format == "fp32" else 1.0 / scale
    scaled = (groups * inverse[..., None]).clamp(-FP8_MAX, FP8_MAX)
    quantized = scaled.reshape(num_tokens, hidden).to(torch.float8_e4m3fn)
    return quantized, pack_ue8m0(scale) if scale_format == "ue8m0" else scale


def pack_ue8m0(scale: Tensor) -> Tensor:
    """[T, G] fp32 powers of two to [T, G/4] int32: four exponent bytes, little-endian."""
    exponents = (scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)
    return exponents.contiguous().view(torch.int32)


def unpack_ue8m0(packed: Tensor) -> Tensor:
    """The inverse of `pack_ue8m0`."""
    exponents = packed.contiguous().view(torch.uint8).to(torch.int32)
    return (exponents << 23).view(torch.float32)


def dequantize_fp8(quantized: Tensor, scales: Tensor) -> Tensor:
    """fp32 values of FP8 rows and their scales (fp32 or packed)."""
    if scales.dtype == torch.int32:
        scales = unpack_ue8m0(scales)
    groups = quantized.to(torch.float32).reshape(*scales.shape, SCALE_GROUP)
    return (groups * scales[..., None]).reshape(quantized.shape)


def wire_rows(config: Config, inputs: RankInput) -> tuple[Tensor, Tensor | None]:
    """The rows as they travel, and their scales."""
    if config.payload == "fp8_e4m3":
        if inputs.x.dtype == torch.float8_e4m3fn:
            return inputs.x, inputs.scales
        return quantize_fp8(inputs.x, config.scale_format)
    if config.payload == "opaque":
        return as_bytes(inputs.x, config.payload_bytes), as_bytes(inputs.scales, config.scale_bytes)
    return inputs.x, None


def as_bytes(rows: Tensor | None, width: int) -> Tensor:
    """Rows of any dtype as [T, width] uint8."""
    if rows is None or rows.numel() == 0:
        return torch.empty(0 if rows is None else rows.shape[0], width, dtype=torch.uint8)
    return rows.contiguous().view(torch.uint8).reshape(rows.shape[0], width)


def local_experts(config: Config, inputs: RankInput, rank: int, num_ranks: int) -> Tensor:
    """[num_valid, K] int64: the choices that are experts of `rank`, counted from its first, else -1."""
    num_local = config.num_local_experts(num_ranks)
    local = inputs.topk_ids[: inputs.num_valid].to(torch.int64) - rank * num_local
    return torch.where((local >= 0) & (local < num_local), local, -1)


def dispatch(config: Config, inputs: Sequence[RankInput]) -> list[RankDispatched]:
    """What every rank receives when rank r dispatches `inputs[r]`."""
    return [_dispatch_to(config, inputs, rank) for rank in range(len(inputs))]


def _dispatch_to(config: Config, inputs: Sequence[RankInput], rank: int) -> RankDispatched:
    num_ranks, capacity = len(inputs), config.max_num_tokens
    num_local, num_rows = config.num_local_experts(num_ranks), num_ranks * capacity
    wires = [wire_rows(config, source) for source in inputs]
    local = [local_experts(config, source, rank, num_ranks) for source in inputs]
    sent = [(choices >= 0).any(dim=1).nonzero()[:, 0] for choices in local]

    row_of = torch.full((num_local, num_ranks, capacity), -1, dtype=torch.int64)
    src_info = torch.zeros(num_local, num_rows, dtype=torch.int32)
    layout_range = torch.zeros(num_local, num_ranks, dtype=torch.int64)
    origin: list[list[tuple[int, Tensor]]] = [[] for _ in range(num_local)]
    for expert in range(num_local):
        begin = 0
        for source in range(num_ranks):
            tokens = (local[source] == expert).any(dim=1).nonzero()[:, 0]
            count = tokens.numel()
            row_of[expert, source, tokens] = torch.arange(begin, begin + count)
            src_info[expert, begin : begin + count] = tokens.to(torch.int32)
            layout_range[expert, source] = begin << 32 | count
            origin[expert].append((source, tokens))
            begin += count
    expert_num_tokens = (row_of >= 0).sum(dim=(1, 2)).to(torch.int32)
    src_num_tokens = torch.tensor([tokens.numel() for tokens in sent], dtype=torch.int32)

    def place(part: int) -> Tensor | None:
        """Rows (part 0) or scales (part 1) in the layout asked for."""
        rows = [each for wire in wires if (each := wire[part]) is not None and each.shape[1] > 0]
        if len(rows) < num_ranks:
            return None
        if config.layout == "token_major":
            placed = rows[0].new_zeros(num_rows, rows[0].shape[1])
            for source, tokens in enumerate(sent):
                placed[source * capacity : source * capacity + tokens.numel()] = rows[source][tokens]
            return placed
        placed = rows[0].new_zeros(num_local, num_rows, rows[0].shape[1])
        for expert in range(num_local):
            for source, tokens in origin[expert]:
                placed[expert, row_of[expert, source, tokens]] = rows[source][tokens]
        return placed

    x = place(0)
    assert x is not None
    token_major = config.layout == "token_major"
    ids, weights = _cells(config, inputs, local, sent) if token_major else (None, None)
    return RankDispatched(
        x=x,
        scales=place(1),
        expert_num_tokens=expert_num_tokens,
        src_num_tokens=src_num_tokens,
        topk_ids=ids,
        topk_weights=weights,
        src_info=None if token_major else src_info,
        layout_range=None if token_major else layout_range,
        sent=sent,
        row_of=row_of,
    )


def _cells(
    config: Config, inputs: Sequence[RankInput], local: list[Tensor], sent: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Local experts and weights of the received cells; a choice stays in its column."""
    num_rows = len(inputs) * config.max_num_tokens
    ids = torch.full((num_rows, config.num_topk), -1, dtype=torch.int32)
    weights = torch.zeros(num_rows, config.num_topk)
    for source, tokens in enumerate(sent):
        begin = source * config.max_num_tokens
        ids[begin : begin + tokens.numel()] = local[source][tokens].to(torch.int32)
        weights[begin : begin + tokens.numel()] = inputs[source].topk_weights[tokens]
    return ids, weights


def combine(
    config: Config, inputs: Sequence[RankInput], dispatched: Sequence[RankDispatched], expert_out: Sequence[Tensor]
) -> list[Tensor]:
    """[T, H] per rank: what combine returns when rank r gives `expert_out[r]` for what it received."""
    output = DTYPES[config.output_dtype]
    combined = []
    for source, mine in enumerate(inputs):
        total = torch.zeros(mine.num_tokens, config.hidden)
        if config.weights_at == "combine":
            _add_choices(config, source, mine, dispatched, expert_out, total)
        else:
            for rank, received in enumerate(dispatched):
                tokens = received.sent[source]
                partial = _partial(config, source, rank, inputs, received, expert_out[rank]).to(output)
                total[tokens] = total[tokens] + partial.to(torch.float32)
        combined.append(total.to(output))
    return combined


def _partial(
    config: Config,
    source: int,
    rank: int,
    inputs: Sequence[RankInput],
    received: RankDispatched,
    expert_out: Tensor,
) -> Tensor:
    """[n, H] fp32: what `rank` owes for the tokens of `source`, summed over its experts with k ascending."""
    tokens = received.sent[source]
    if config.layout == "token_major":
        begin = source * config.max_num_tokens
        return expert_out[begin : begin + tokens.numel()].to(torch.float32)
    local = local_experts(config, inputs[source], rank, len(inputs))[tokens]
    partial = torch.zeros(tokens.numel(), config.hidden)
    for k in range(config.num_topk):
        hit = local[:, k] >= 0
        rows = received.row_of[local[hit, k], source, tokens[hit]]
        product = inputs[source].topk_weights[tokens[hit], k, None] * expert_out[local[hit, k], rows].to(torch.float32)
        partial[hit] = partial[hit] + product
    return partial


def _add_choices(
    config: Config,
    source: int,
    mine: RankInput,
    dispatched: Sequence[RankDispatched],
    expert_out: Sequence[Tensor],
    total: Tensor,
) -> None:
    """Add every choice's weighted row to `total`, k ascending, whatever rank it comes from."""
    for k in range(config.num_topk):
        for rank, received in enumerate(dispatched):
            local = local_experts(config, mine, rank, len(dispatched))[:, k]
            tokens = (local >= 0).nonzero()[:, 0]
            rows = received.row_of[local[tokens], source, tokens]
            product = mine.topk_weights[tokens, k, None] * expert_out[rank][local[tokens], rows].to(torch.float32)
            total[tokens] = total[tokens] + product
