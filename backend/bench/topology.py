"""Which bytes of a round cross which link, when ranks share nodes and nodes are joined by NICs.

A token goes once to each rank that has one of its experts (DESIGN.md, "Protocol"); its row comes home from each of
them. With the share v[r] of the tokens that go to rank r, and T tokens a rank, rank s sends T v[r] cells to each r,
over NVLink to those of its node and over its NIC to the others, and gets T (R - 1) v[s]. Combine moves the same the
other way. The shares are exact for uniform routing (every set of K experts alike), or counted in a recorded trace.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import comb
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moebius.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROWS_AT_ONCE = 1 << 16  # of a trace: bounds the memory of counting
_WORD_BYTES = 8  # of a signal


@dataclasses.dataclass(frozen=True)
class Topology:
    """Ranks on nodes.

    Attributes:
        num_ranks: R.
        per_node: ranks that share a node, and so NVLink; R where there is one node only.
        nic_gb_per_s: of each rank's NIC, one direction.
        nvlink_gb_per_s: of each rank's NVLink, one direction.
    """

    num_ranks: int
    per_node: int
    nic_gb_per_s: float
    nvlink_gb_per_s: float

    @classmethod
    def of(cls, num_ranks: int, per_node: int, nic_gbps: float, nvlink_gbps: float) -> Topology:
        """Check what a user asks for.

        Args:
            num_ranks: R.
            per_node: ranks of a node; more than R is R.
            nic_gbps: Gbit/s, as NICs are sold.
            nvlink_gbps: GB/s in one direction, as NVLink is.

        Raises:
            ConfigError: nodes would differ, or a link has no bandwidth.
        """
        if per_node < 1 or not (nic_gbps > 0.0 and nvlink_gbps > 0.0):
            raise ConfigError(
                f"ranks of a node and both bandwidths must be above 0 (got {per_node}, {nic_gbps}, {nvlink_gbps})"
            )
        shared = min(per_node, num_ranks)
        if num_ranks % shared:
            raise ConfigError(f"ranks must fill their nodes of {shared} (got {num_ranks} ranks)")
        return cls(num_ranks, shared, nic_gbps / 8.0, nvlink_gbps)

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.num_ranks // self.per_node

    @property
    def num_remote(self) -> int:
        """Ranks on other nodes than a rank's own."""
        return self.num_ranks - self.per_node


class Visits(NamedTuple):
    """Where tokens go, layer by layer.

    Attributes:
        ranks: [layers, R] float64, share of the tokens that go to the rank.
        choices: [layers, R] float64, experts of a token that are on the rank, on average.
        nodes_a_token: nodes that a token goes to, on average, its own counted if it is one.
    """

    ranks: Tensor
    choices: Tensor
    nodes_a_token: float

    @property
    def ranks_a_token(self) -> float:
        """Ranks that a token goes to, on average, its own counted if it is one."""
        return float(self.ranks.sum(1).mean())


def hit_chance(num_experts: int, num_held: int, num_topk: int) -> Fraction:
    """Chance that a token has one of `num_held` experts among its K of E, all sets of K alike. Exact.

    The number of E / L holders that it goes to is E / L times this: the expectation of a sum.
    """
    return 1 - Fraction(comb(num_experts - num_held, num_topk), comb(num_experts, num_topk))


def uniform_visits(num_experts: int, num_topk: int, topology: Topology) -> Visits:
    """Of uniform routing."""
    num_local = num_experts // topology.num_ranks
    share = float(hit_chance(num_experts, num_local, num_topk))
    nodes = topology.num_nodes * hit_chance(num_experts, num_local * topology.per_node, num_topk)
    ranks = torch.full((1, topology.num_ranks), share, dtype=torch.float64)
    return Visits(ranks, torch.full_like(ranks, num_topk / topology.num_ranks), float(nodes))


def traced_visits(layers: Sequence[Tensor], num_experts: int, topology: Topology) -> Visits:
    """Of recorded tokens.

    Args:
        layers: [N, K] int32 each; -1 is unrouted.
        num_experts: E.
        topology: of the ranks that the experts are spread over, in order.
    """
    ranks, choices, nodes = [], [], []
    for ids in layers:
        hit_ranks = torch.zeros(topology.num_ranks, dtype=torch.float64)
        hit_choices, hit_nodes = torch.zeros_like(hit_ranks), 0
        for begin in range(0, len(ids), _ROWS_AT_ONCE):
            rows = ids[begin : begin + _ROWS_AT_ONCE]
            chosen = torch.zeros(len(rows), num_experts + 1, dtype=torch.bool)
            chosen.scatter_(1, torch.where(rows < 0, num_experts, rows).long(), value=True)
            held = chosen[:, :num_experts].view(len(rows), topology.num_ranks, -1)
            there = held.any(2)
            hit_ranks += there.sum(0)
            hit_choices += held.sum((0, 2))
            hit_nodes += int(there.view(len(rows), topology.num_nodes, -1).any(2).sum())
        ranks.append(hit_ranks / len(ids))
        choices.append(hit_choices / len(ids))
        nodes.append(hit_nodes / len(ids))
    return Visits(torch.stack(ranks), torch.stack(choices), sum(nodes) / len(nodes))


@dataclasses.dataclass(frozen=True)
class LinkLoad:
    """Bytes that one half puts on the links of one kind.

    Attributes:
        mean: of a rank, in one direction; both have the same mean.
        busiest: of the rank and direction that has most, mean over the layers.
    """

    mean: float
    busiest: float


@dataclasses.dataclass(frozen=True)
class HalfLoad:
    """What one half moves: `nvlink` inside the nodes, `nic` between them, in `requests` put_signals or puts a rank."""

    nvlink: LinkLoad
    nic: LinkLoad
    requests: float


def half_load(rows: Tensor, num_tokens: int, topology: Topology, row_bytes: tuple[int, int], puts: bool) -> HalfLoad:
    """Load of dispatch, or of combine, which moves as many rows the other way.

    Args:
        rows: [layers, R] rows that a token of any rank has with each rank: `Visits.ranks` or `Visits.choices`.
        num_tokens: T of each rank.
        topology: where the ranks are.
        row_bytes: of one row over NVLink, and over a NIC.
        puts: whether each row is a request of its own, besides the signals.
    """
    layers, num_ranks = rows.shape
    total = rows.sum(1, keepdim=True)
    node = rows.view(layers, topology.num_nodes, -1).sum(2).repeat_interleave(topology.per_node, 1)
    inside = (num_tokens * (node - rows), num_tokens * (topology.per_node - 1) * rows)
    outside = (num_tokens * (total - node), num_tokens * topology.num_remote * rows)
    requests = float(topology.num_remote)
    if puts:
        requests += float(outside[1].mean())
    return HalfLoad(
        _link_load(inside, row_bytes[0], topology.per_node - 1),
        _link_load(outside, row_bytes[1], num_ranks - topology.per_node),
        requests,
    )


def _link_load(directions: tuple[Tensor, Tensor], row_bytes: int, num_peers: int) -> LinkLoad:
    signals = _WORD_BYTES * num_peers
    busiest = torch.stack([way.amax(1) for way in directions]).amax(0).mean()
    return LinkLoad(float(directions[1].mean()) * row_bytes + signals, float(busiest) * row_bytes + signals)
