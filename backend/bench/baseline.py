"""The same exchange over `torch.distributed`, written the way one would write it well: what we are measured against.

One row per (token, rank), not per (token, expert), with its expert ids and weights in the same message; counts first,
then one `all_to_all_single` of bytes each way; rows summed on the expert's rank before they come home. Buffers are
kept between calls, rows are gathered straight into the message. Every torch call here is the fastest of those that
were tried for its step at 64 x 2048 bf16 (notes at the calls).
"""

from __future__ import annotations

import dataclasses
from time import perf_counter_ns

import torch
import torch.distributed as dist
import torch.nn.functional as F  # torch's own abbreviation
from torch import Tensor

from moebius.config import SCALE_GROUP, Config

from .workload import DTYPES, input_dtype, payload_row_bytes

FP8_MAX = 448.0
Marks = list[tuple[str, int]]


def quantise_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 e4m3 with an fp32 scale per 128 channels.

    Args:
        x: [T, H] bf16, fp16 or fp32.

    Returns:
        [T, H] float8_e4m3fn and [T, H/128] fp32, what multiplies back.
    """
    groups = x.float().view(len(x), x.shape[1] // SCALE_GROUP, SCALE_GROUP)
    amax = groups.abs().amax(-1, keepdim=True).clamp_min(1e-4)
    # `448.0 / amax` would be `amax.reciprocal() * 448.0`: rounded twice, and another FP8 value at a tie.
    quantised = (groups * (torch.full_like(amax, FP8_MAX) / amax)).to(torch.float8_e4m3fn)
    return quantised.flatten(-2), (amax / FP8_MAX).flatten().view(groups.shape[:2])


def dequantise_fp8(x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantise_fp8`, up to its rounding."""
    groups = x.float().view(*scales.shape, SCALE_GROUP)
    return (groups * scales.unsqueeze(-1)).view(x.shape).to(dtype)


def padded_row_bytes(config: Config) -> int:
    """Bytes of a row in the message: rows, ids and weights are gathered as int64."""
    return -(-payload_row_bytes(config) // 8) * 8


def message_bytes(config: Config) -> int:
    """Bytes of one message in dispatch: the row, K ids, K weights."""
    return padded_row_bytes(config) + 8 * config.num_topk


@dataclasses.dataclass
class Arrived:
    """What the baseline's dispatch returns; the first five as in `moebius.Dispatched`, rows without gaps.

    Attributes:
        x: expert_major [L, R*M, H]; token_major [N, H], a view of the message.
        scales: of FP8, [.., H/128] fp32.
        expert_num_tokens: [L] int32; expert_major only.
        topk_ids: [N, K] int32 local expert or -1.
        topk_weights: [N, K] fp32.
        sent_token: [S] which token each sent row was.
        sent_counts: rows sent to each rank.
        received_counts: rows received from each rank.
        slots: [P] row of `x.flatten(0, 1)` of each (received row, k), in that order; expert_major only.
        pair_weights: [P] fp32.
        pair_offsets: [N] first pair of each received row.
        num_tokens: T of this rank.
    """

    x: Tensor
    scales: Tensor | None
    expert_num_tokens: Tensor | None
    topk_ids: Tensor
    topk_weights: Tensor
    sent_token: Tensor
    sent_counts: list[int]
    received_counts: list[int]
    num_tokens: int
    slots: Tensor | None = None
    pair_weights: Tensor | None = None
    pair_offsets: Tensor | None = None


class GlooAllToAll:
    """Dispatch and combine over a `torch.distributed` group."""

    def __init__(self, group: dist.ProcessGroup, config: Config) -> None:
        """Allocate the messages of the worst case."""
        self.group, self.config = group, config
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.num_local = config.num_local_experts(self.num_ranks)
        self._dtype = DTYPES[config.output_dtype]
        self._row = payload_row_bytes(config)
        self._padded = padded_row_bytes(config)
        most = config.max_num_tokens * self.num_ranks
        self._send = torch.zeros(most, message_bytes(config), dtype=torch.uint8)
        self._receive = torch.zeros_like(self._send)
        self._reply = torch.zeros(most, config.hidden, dtype=self._dtype)
        self._returned = torch.zeros_like(self._reply)
        self._sum = torch.zeros(config.max_num_tokens, config.hidden)
        self._counts = torch.zeros(self.num_ranks, dtype=torch.int64)
        self._batched = torch.zeros(0)
        self._batched_scales = torch.zeros(0)
        if config.layout == "expert_major":
            dtype = torch.float8_e4m3fn if config.payload == "fp8_e4m3" else input_dtype(config)
            self._batched = torch.zeros(self.num_local, most, config.hidden, dtype=dtype)
            if config.payload == "fp8_e4m3":
                self._batched_scales = torch.zeros(self.num_local, most, config.hidden // SCALE_GROUP)

    def dispatch(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, marks: Marks | None = None) -> Arrived:
        """Send each token to the ranks of its experts. Collective."""
        num_tokens = len(x)
        mask = torch.zeros(num_tokens, self.num_ranks + 1, dtype=torch.bool)
        target = torch.where(topk_ids < 0, self.num_ranks, topk_ids // self.num_local)
        mask.scatter_(1, target.long(), value=True)
        mask = mask[:, : self.num_ranks]
        _, sent_token = mask.t().nonzero(as_tuple=True)  # by rank, then token
        counts = mask.sum(0)
        self._pack(x, topk_ids, topk_weights, sent_token)
        _mark(marks, "pack")
        dist.all_to_all_single(self._counts, counts, group=self.group)
        sent_counts, received_counts = counts.tolist(), self._counts.tolist()
        _mark(marks, "counts")
        sent, received = len(sent_token), sum(received_counts)
        dist.all_to_all_single(
            self._receive[:received], self._send[:sent], received_counts, sent_counts, group=self.group
        )
        _mark(marks, "all_to_all")
        arrived = self._unpack(received, sent_token, sent_counts, received_counts, num_tokens)
        if self.config.layout == "expert_major":
            self._batch_by_expert(arrived)
        _mark(marks, "unpack")
        return arrived

    def _pack(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, sent_token: Tensor) -> None:
        message = self._send[: len(sent_token)].view(torch.int64)
        if self.config.payload == "fp8_e4m3":
            quantised, scales = quantise_fp8(x)
            row = torch.cat([quantised.view(torch.uint8), scales.view(torch.uint8)], dim=1)
            if self._padded != self._row:
                row = F.pad(row, (0, self._padded - self._row))
            row = row.view(torch.int64)
        else:
            row = x.view(torch.int64)
        routing = torch.cat([topk_ids.int(), topk_weights.view(torch.int32)], dim=1).view(torch.int64)
        # With `out=`, 7.6 us for 128 rows of 4 KiB; gather, then copy: 19.8 us.
        torch.index_select(row, 0, sent_token, out=message[:, : self._padded // 8])
        torch.index_select(routing, 0, sent_token, out=message[:, self._padded // 8 :])

    def _unpack(
        self, received: int, sent_token: Tensor, sent_counts: list[int], received_counts: list[int], num_tokens: int
    ) -> Arrived:
        message, hidden, k = self._receive[:received], self.config.hidden, self.config.num_topk
        scales = None
        if self.config.payload == "fp8_e4m3":
            x = message[:, :hidden].view(torch.float8_e4m3fn)
            scales = message[:, hidden : self._row].view(torch.float32)
        else:
            x = message[:, : self._row].view(input_dtype(self.config))
        routing = message[:, self._padded :].view(torch.int32)
        local = routing[:, :k] - self.rank * self.num_local
        local = torch.where((local >= 0) & (local < self.num_local), local, -1)
        weights = routing[:, k:].view(torch.float32)
        return Arrived(x, scales, None, local, weights, sent_token, sent_counts, received_counts, num_tokens)

    def _batch_by_expert(self, arrived: Arrived) -> None:
        local, num_local, most = arrived.topk_ids, self.num_local, self._batched.shape[1]
        chosen = torch.zeros(len(local), num_local + 1, dtype=torch.bool)
        chosen.scatter_(1, torch.where(local < 0, num_local, local).long(), value=True)
        chosen = chosen[:, :num_local]
        expert, row = chosen.t().nonzero(as_tuple=True)  # by expert, then (source rank, token)
        counts = chosen.sum(0)
        begin = counts.cumsum(0) - counts
        # A gather per expert: 171 us for 530 rows; one `index_copy_` of int64: 213 us; of bf16: 355 us.
        first = 0
        for index, count in enumerate(counts.tolist()):
            rows = row[first : first + count]
            torch.index_select(arrived.x, 0, rows, out=self._batched[index, :count])
            if arrived.scales is not None:
                torch.index_select(arrived.scales, 0, rows, out=self._batched_scales[index, :count])
            first += count
        slot = torch.zeros(len(local), num_local + 1, dtype=torch.int64)
        slot[row, expert] = torch.arange(len(row)) - begin[expert] + expert * most
        valid = local >= 0
        source, choice = valid.nonzero(as_tuple=True)
        per_row = valid.sum(1)
        arrived.slots = slot[source, local[source, choice].long()]
        arrived.pair_weights = arrived.topk_weights[source, choice]
        arrived.pair_offsets = per_row.cumsum(0) - per_row
        arrived.x, arrived.expert_num_tokens = self._batched, counts.int()
        arrived.scales = self._batched_scales if arrived.scales is not None else None

    def combine(self, expert_out: Tensor, arrived: Arrived, marks: Marks | None = None) -> Tensor:
        """Bring the experts' rows home and sum them, token by token. Collective.

        Args:
            expert_out: expert_major [L, R*M, H]; token_major [N, H], weighted and summed.
            arrived: what `dispatch` returned.
            marks: filled with (name, nanoseconds) of each step.

        Returns:
            [T, H] output dtype.
        """
        received, sent = sum(arrived.received_counts), len(arrived.sent_token)
        reply = expert_out if arrived.slots is None else self._reduce(expert_out, arrived)
        _mark(marks, "reduce")
        dist.all_to_all_single(
            self._returned[:sent], reply[:received], arrived.sent_counts, arrived.received_counts, group=self.group
        )
        _mark(marks, "all_to_all")
        # fp32 `index_add_`: 58 us; `embedding_bag` 78 us; gather and sum 150 us.
        total = self._sum[: arrived.num_tokens].zero_()
        total.index_add_(0, arrived.sent_token, self._returned[:sent].float())
        out = total.to(self._dtype)
        _mark(marks, "sum")
        return out

    def _reduce(self, expert_out: Tensor, arrived: Arrived) -> Tensor:
        # `embedding_bag` sums in fp32 and rounds once, but wants weights of the rows' dtype: two halves keep 16 bits of
        # them. 90 us at 530 rows; rows as fp32 first: 320 us; `addcmul_` choice by choice: 490 us.
        slots, weights, offsets = arrived.slots, arrived.pair_weights, arrived.pair_offsets
        assert slots is not None  # narrowed by the caller: expert_major
        assert weights is not None
        assert offsets is not None
        rows = expert_out.view(-1, self.config.hidden)
        high = weights.to(self._dtype)
        if self._dtype != torch.float32:
            low = (weights - high.float()).to(self._dtype)
            slots, high, offsets = slots.repeat_interleave(2), torch.stack([high, low], 1).flatten(), 2 * offsets
        return F.embedding_bag(slots, rows, offsets, mode="sum", per_sample_weights=high)


def _mark(marks: Marks | None, name: str) -> None:
    if marks is not None:
        marks.append((name, perf_counter_ns()))
