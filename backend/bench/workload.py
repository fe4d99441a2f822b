"""What a benchmark runs: its shape, and a seeded routing of every token to experts."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from moebius.config import SCALE_GROUP, Config, Layout, Payload
from moebius.errors import ConfigError

from .routing_trace import read_routing_trace

Routing = Literal["uniform", "zipf", "hot"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)
BENCH_PAYLOADS = ("bf16", "fp16", "fp32", "fp8_e4m3")  # opaque has no dtype of its own to compute with
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One configuration of a benchmark.

    Attributes:
        ranks: R, processes.
        experts: E, over all ranks.
        topk: K.
        hidden: H.
        tokens: T, that every rank sends in every round.
        max_num_tokens: M; 0 takes `tokens`.
        payload: dtype that travels in dispatch.
        layout: of the received tokens.
        routing: "uniform" (every expert alike), "zipf" (popularity 1/i over a seeded order of the experts) or "hot"
            (one expert is among the choices of every token).
        seed: of everything random.
        routing_trace: file of recorded routings that take the place of `routing`; its E and K must be these.
    """

    ranks: int
    experts: int = 64
    topk: int = 8
    hidden: int = 2048
    tokens: int = 64
    max_num_tokens: int = 0
    payload: str = "bf16"
    layout: str = "expert_major"
    routing: str = "uniform"
    seed: int = 0
    routing_trace: str = ""

    def config(self, timeout_s: float = 30.0) -> Config:
        """The `Config` of this shape.

        Raises:
            ConfigError: the shape is impossible.
        """
        config = Config(
            num_experts=self.experts,
            num_topk=self.topk,
            hidden=self.hidden,
            max_num_tokens=self.max_num_tokens or self.tokens,
            payload=cast("Payload", self.payload),
            layout=cast("Layout", self.layout),
            timeout_s=timeout_s,
        )
        config.num_local_experts(self.ranks)
        if self.routing_trace:
            trace = read_routing_trace(self.routing_trace)
            if (trace.num_experts, trace.num_topk) != (self.experts, self.topk):
                raise ConfigError(
                    f"the routing trace has top-{trace.num_topk} of {trace.num_experts} experts "
                    f"(got top-{self.topk} of {self.experts})"
                )
        return config


def input_dtype(config: Config) -> torch.dtype:
    """Dtype of the tokens given to dispatch: the payload's, or the output's where we quantise."""
    return DTYPES[config.output_dtype if config.payload == "fp8_e4m3" else config.payload]


def payload_row_bytes(config: Config) -> int:
    """Bytes of one token as it travels in dispatch: payload and scales, no header."""
    if config.payload == "fp8_e4m3":
        return config.hidden + 4 * config.hidden // SCALE_GROUP
    return config.hidden * DTYPES[config.payload].itemsize


def output_row_bytes(config: Config) -> int:
    """Bytes of one row as it travels in combine."""
    return config.hidden * DTYPES[config.output_dtype].itemsize


def generator(*key: int) -> torch.Generator:
    """A generator that depends on every number of `key` and on nothing else."""
    state = 0x9E3779B97F4A7C15
    for number in key:
        state = ((state ^ (number & (2**64 - 1))) * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019) % 2**64
    return torch.Generator().manual_seed(state >> 1)


def popularity(routing: str, num_experts: int, seed: int) -> Tensor:
    """[E] float64: the logarithm of how often each expert is liked; 0 for all of them when uniform."""
    if routing == "uniform":
        return torch.zeros(num_experts, dtype=torch.float64)
    order = torch.randperm(num_experts, generator=generator(seed, 1))
    if routing == "zipf":
        return -torch.log(1.0 + order.double())
    return torch.where(order == 0, math.inf, 0.0).double()


def route(workload: Workload, rank: int, step: int) -> tuple[Tensor, Tensor]:
    """Draw `topk` distinct experts a token, without replacement, by popularity (Gumbel top-k), and their weights.

    With a routing trace, take tokens from it instead (its first layer).

    Returns:
        topk_ids [T, K] int32 and topk_weights [T, K] fp32, each row of which sums to 1.
    """
    random = generator(workload.seed, 2, rank, step)
    if workload.routing_trace:
        return read_routing_trace(workload.routing_trace).sample(0, workload.tokens, random)
    uniform = torch.rand(workload.tokens, workload.experts, generator=random, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1.0 - 1e-16)))
    ids = (popularity(workload.routing, workload.experts, workload.seed) + gumbel).topk(workload.topk).indices
    weights = torch.rand(workload.tokens, workload.topk, generator=random) + 0.1
    return ids.int(), weights / weights.sum(1, keepdim=True)


@dataclasses.dataclass(frozen=True)
class RowCounts:
    """Rows that one rank handles in a round.

    Attributes:
        tokens: it sends.
        sent: (token, rank) pairs among them: messages, those to itself included.
        sent_away: messages to other ranks.
        received: messages it gets, its own included.
        received_away: messages from other ranks.
        pairs: (token, expert) pairs among the received ones.
        pairs_away: those from other ranks.
    """

    tokens: float
    sent: float
    sent_away: float
    received: float
    received_away: float
    pairs: float
    pairs_away: float = 0.0


def count_rows(topk_ids: list[Tensor], num_experts: int) -> list[RowCounts]:
    """Count the rows of a round from the `topk_ids` of every rank."""
    num_ranks = len(topk_ids)
    num_local = num_experts // num_ranks
    messages = torch.zeros(num_ranks, num_ranks, dtype=torch.int64)
    pairs = torch.zeros(num_ranks, num_ranks, dtype=torch.int64)
    for source, ids in enumerate(topk_ids):
        chosen = torch.zeros(len(ids), num_experts + 1, dtype=torch.bool)
        chosen.scatter_(1, torch.where(ids < 0, num_experts, ids).long(), value=True)
        by_rank = chosen[:, :num_experts].view(len(ids), num_ranks, num_local)
        messages[source] = by_rank.any(2).sum(0)
        pairs[source] = by_rank.sum((0, 2))
    sent, received = messages.sum(1).tolist(), messages.sum(0).tolist()
    own = messages.diagonal().tolist()
    worked, own_work = pairs.sum(0).tolist(), pairs.diagonal().tolist()
    return [
        RowCounts(
            tokens=len(topk_ids[r]),
            sent=sent[r],
            sent_away=sent[r] - own[r],
            received=received[r],
            received_away=received[r] - own[r],
            pairs=worked[r],
            pairs_away=worked[r] - own_work[r],
        )
        for r in range(num_ranks)
    ]


def mean_rows(rounds: list[list[RowCounts]]) -> list[RowCounts]:
    """Average the counts of several rounds, rank by rank."""
    fields = [field.name for field in dataclasses.fields(RowCounts)]
    return [
        RowCounts(*(sum(getattr(counts[rank], name) for counts in rounds) / len(rounds) for name in fields))
        for rank in range(len(rounds[0]))
    ]
