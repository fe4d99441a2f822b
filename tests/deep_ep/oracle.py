"""Inputs that every rank can compute for all ranks, and what must come of them, in plain torch."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import torch

from tests.deep_ep.seat import HIDDEN, MAX_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

    from tests.deep_ep.seat import Seat

Routing = Literal["uniform", "holes", "hot", "local", "duplicates", "one", "unrouted"]
GROUP = 128


@dataclasses.dataclass
class Load:
    """Tokens and routing of all ranks, by rank, on the device of this one."""

    x: list[Tensor]
    topk_ids: list[Tensor]
    topk_weights: list[Tensor]


def make_load(
    seat: Seat,
    routing: Routing = "uniform",
    seed: int = 0,
    *,
    num_tokens: list[int] | None = None,
    num_topk: int = 4,
    hidden: int = HIDDEN,
) -> Load:
    """Random tokens that differ in size by rank and channel group, routed as named."""
    load = Load([], [], [])
    for rank in range(seat.num_ranks):
        random = torch.Generator().manual_seed(1000 * seed + rank)
        count = MAX_TOKENS - rank % 5 if num_tokens is None else num_tokens[rank]
        x = torch.randn((count, hidden), generator=random)
        x *= torch.rand((count, (hidden + GROUP - 1) // GROUP), generator=random).repeat_interleave(GROUP, 1)[
            :, :hidden
        ]
        load.x.append(x.to(torch.bfloat16).to(seat.device))
        load.topk_ids.append(_route(seat, rank, routing, count, num_topk, random).to(seat.device))
        load.topk_weights.append(_weights(routing, count, num_topk, random).to(seat.device))
    return load


def _route(seat: Seat, rank: int, routing: Routing, count: int, num_topk: int, random: torch.Generator) -> Tensor:
    scores = torch.rand((count, seat.num_experts), generator=random)
    if routing == "hot":
        scores[:, :2] += 1.0
    if routing == "local":
        scores[:, rank * seat.num_local_experts : (rank + 1) * seat.num_local_experts] += 1.0
    ids = scores.topk(num_topk).indices
    if routing == "holes":
        ids[torch.rand(ids.shape, generator=random) < 0.4] = -1
    if routing == "duplicates":
        ids[:, -1] = ids[:, 0]
    if routing == "unrouted":
        ids[:] = -1
    return ids


def _weights(routing: Routing, count: int, num_topk: int, random: torch.Generator) -> Tensor:
    if routing == "one":
        return torch.ones((count, num_topk))
    return torch.rand((count, num_topk), generator=random) + 0.1


def run_expert(rows: Tensor, expert: int) -> Tensor:
    """What `expert` makes of rows; exact to recompute anywhere, and different for every expert."""
    return (rows.float() * (0.5 + 0.25 * expert)).to(torch.bfloat16)


def dequantise(received: Any) -> Tensor:
    """Rows [L, N, H] fp32 of a dispatch result, whatever its format."""
    if isinstance(received, torch.Tensor):
        return received.float()
    rows: Tensor = received[0]
    scales: Tensor = received[1]
    if scales.dtype == torch.int32:
        exponents = torch.stack([(scales >> shift) & 0xFF for shift in (0, 8, 16, 24)], dim=-1).flatten(-2)
        scales = torch.exp2((exponents - 127).float())
    return rows.float() * scales.repeat_interleave(GROUP, -1)


def check_dispatch(seat: Seat, load: Load, result: Any, *, max_tokens: int = MAX_TOKENS) -> None:
    """Counts, handle and rows of a dispatch, free of the order in which ranks and tokens stand within an expert."""
    received, count, handle = result[:3]
    src_info, layout_range = handle[:2]
    is_fp8 = not isinstance(received, torch.Tensor)
    rows = received[0] if is_fp8 else received
    values = dequantise(received)
    for local_expert in range(seat.num_local_experts):
        expert = seat.rank * seat.num_local_experts + local_expert
        spans = []
        for source in range(seat.num_ranks):
            packed = int(layout_range[local_expert, source])
            begin, size = packed >> 32, packed & 0xFFFFFFFF
            tokens = src_info[local_expert, begin : begin + size].long()
            expected = (load.topk_ids[source] == expert).any(1).nonzero().flatten()
            assert torch.equal(tokens.unique(), expected), (expert, source, tokens, expected)
            if seat.is_ours:
                assert torch.equal(tokens, expected), "rows must follow the order of the tokens"
            sent = load.x[source][tokens]
            if is_fp8:
                check_quantised(values[local_expert, begin : begin + size], sent)
            else:
                assert torch.equal(rows[local_expert, begin : begin + size], sent), (expert, source)
            spans.append((begin, size))
        at = 0
        for begin, size in sorted(span for span in spans if span[1]):
            assert begin == at, spans
            at += size
        assert int(count[local_expert]) == at
        assert at <= seat.num_ranks * max_tokens


def check_quantised(values: Tensor, sent: Tensor) -> None:
    """Whether fp32 `values` are what e4m3 with a scale per 128 channels, power of two or not, can keep of `sent`."""
    exact = sent.float()
    size = (
        exact.view(len(exact), exact.shape[1] // GROUP, GROUP).abs().amax(2).repeat_interleave(GROUP, 1).clamp(min=1e-4)
    )
    # 3 bits of mantissa leave 1/16 of the value; below the smallest normal a step of 2^-9 of a scale <= 2 amax / 448.
    bound = exact.abs() / 16 + size * (2.0 / 448) * 2**-10 + 1e-12
    assert bool(((values - exact).abs() <= bound).all()), float(((values - exact).abs() - bound).max())


def expert_outputs(seat: Seat, result: Any, out: Tensor | None = None) -> Tensor:
    """The experts' outputs for a dispatch result; NaN where no row is valid, which nobody may read."""
    values = dequantise(result[0])
    outputs = torch.empty(values.shape, dtype=torch.bfloat16, device=seat.device) if out is None else out
    outputs.fill_(float("nan"))
    for local_expert in range(seat.num_local_experts):
        size = int(result[1][local_expert])
        expert = seat.rank * seat.num_local_experts + local_expert
        outputs[local_expert, :size] = run_expert(values[local_expert, :size], expert)
    return outputs


def check_combine(seat: Seat, load: Load, combined: Tensor, *, is_fp8: bool = False) -> None:
    """The weighted sum of the experts' outputs, in fp32."""
    x, ids, weights = load.x[seat.rank], load.topk_ids[seat.rank], load.topk_weights[seat.rank]
    assert combined.dtype == torch.bfloat16
    assert combined.shape == x.shape
    expected, size = torch.zeros(x.shape, device=x.device), torch.zeros(x.shape, device=x.device)
    for choice in range(ids.shape[1]):
        for token in (ids[:, choice] >= 0).nonzero().flatten().tolist():
            term = weights[token, choice] * run_expert(x[token], int(ids[token, choice])).float()
            expected[token] += term
            size[token] += term.abs()
    # bf16 rounds the result by 2^-9; fp8 has lost 1/16 of each value, and a little of the smallest beside large ones.
    bound = size * (0.07 if is_fp8 else 2**-8) + (0.02 * size.amax() if is_fp8 and size.numel() else 0.0) + 1e-6
    assert bool(((combined.float() - expected).abs() <= bound).all())
