"""Identifiable rows: the first values of a token say which rank and which token it is, whatever the dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# The label is exact in every payload: 448 is the largest e4m3 value, so the first FP8 group's scale is 1, and the
# integers up to 16 are exact in four significant bits.
LABEL_SCALE = 448.0
LABEL_VALUES = 5
BASE = 16


def labelled(rank: int, num_tokens: int, hidden: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[T, H] rows: the label, then values of both signs over several magnitudes, zeros of both signs among them."""
    values = torch.randn(num_tokens, hidden, generator=generator)
    values *= 2.0 ** torch.randint(-6, 6, (num_tokens, hidden), generator=generator)
    values[torch.rand(num_tokens, hidden, generator=generator) < 0.02] = 0.0
    values[torch.rand(num_tokens, hidden, generator=generator) < 0.02] = -0.0
    token = torch.arange(num_tokens)
    if hidden >= LABEL_VALUES:
        label = (torch.full_like(token, int(LABEL_SCALE)), torch.full_like(token, rank), *digits(token))
        values[:, :LABEL_VALUES] = torch.stack(label, dim=1).to(values.dtype)
    return values.to(dtype)


def digits(token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three digits of the token's index, least first."""
    return token % BASE, token // BASE % BASE, token // BASE**2


def labelled_bytes(rank: int, num_tokens: int, width: int, generator: torch.Generator) -> Tensor:
    """[T, width] uint8 rows: rank, then the token's index in two bytes, then any bytes."""
    rows = torch.randint(256, (num_tokens, width), generator=generator, dtype=torch.uint8)
    token = torch.arange(num_tokens)
    for place, value in enumerate((torch.full_like(token, rank), token % 256, token // 256)[:width]):
        rows[:, place] = value.to(torch.uint8)
    return rows


def label_of(row: Tensor) -> str:
    """Who a row says it is; for messages, so that a row without a label is reported and not an error."""
    if row.dtype == torch.uint8:
        rank, low, high = (int(value) for value in row[:3])
        return f"rank {rank}, token {low + 256 * high}"
    head = row[:LABEL_VALUES].to(torch.float32)
    if head.numel() < LABEL_VALUES or head[0] != LABEL_SCALE:
        return "no label"
    _, rank, *places = (int(value) for value in head)
    return f"rank {rank}, token {sum(place * BASE**power for power, place in enumerate(places))}"
