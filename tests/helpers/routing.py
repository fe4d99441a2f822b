"""Named routings: the shapes of traffic that break all-to-alls, for any number of ranks and experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

UNROUTED = -1


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a routing is made for."""

    num_ranks: int
    num_experts: int
    num_topk: int
    max_num_tokens: int

    @property
    def num_local(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def usual_tokens(self) -> int:
        """Less than the most, so that a wrong capacity shows."""
        return max(1, self.max_num_tokens * 3 // 4)


Make = Callable[[Shape, torch.Generator], list[Tensor]]


@dataclasses.dataclass(frozen=True)
class Routing:
    """A named routing.

    Attributes:
        name: part of the case's id.
        make: the ids of every rank, [T, K] int64 each, T differing by rank where the name says so.
        num_topk: K where the case is about it.
    """

    name: str
    make: Make
    num_topk: int | None = None


ROUTINGS: dict[str, Routing] = {}


def named(name: str, *, num_topk: int | None = None) -> Callable[[Make], Make]:
    """Register a routing."""

    def add(make: Make) -> Make:
        ROUTINGS[name] = Routing(name, make, num_topk)
        return make

    return add


def choose(num_tokens: int, experts: Tensor, num_topk: int, generator: torch.Generator) -> Tensor:
    """[T, K] distinct experts a token out of `experts`; -1 where there are fewer than K."""
    ids = torch.full((num_tokens, num_topk), UNROUTED, dtype=torch.int64)
    order = torch.rand(num_tokens, experts.numel(), generator=generator).argsort(dim=1)
    taken = min(num_topk, experts.numel())
    ids[:, :taken] = experts[order[:, :taken]]
    return ids


def everywhere(shape: Shape, generator: torch.Generator, tokens: list[int]) -> list[Tensor]:
    """Distinct experts of all ranks, `tokens[r]` tokens on rank r."""
    experts = torch.arange(shape.num_experts)
    return [choose(count, experts, shape.num_topk, generator) for count in tokens]


def usual(shape: Shape) -> list[int]:
    return [shape.usual_tokens] * shape.num_ranks


@named("uniform")
def uniform(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    return everywhere(shape, generator, usual(shape))


@named("hot")
def hot_expert(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    """Every token of every rank takes one same expert, in any of its K places."""
    hot = shape.num_experts // 2
    routed = everywhere(shape, generator, usual(shape))
    for ids in routed:
        ids[ids == hot] = UNROUTED
        place = torch.randint(shape.num_topk, (ids.shape[0], 1), generator=generator)
        ids.scatter_(1, place, hot)
    return routed


@named("one-rank")
def all_to_one_rank(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    last = torch.arange(shape.num_experts - shape.num_local, shape.num_experts)
    return [choose(count, last, shape.num_topk, generator) for count in usual(shape)]


@named("local")
def all_local(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    return [
        choose(count, torch.arange(shape.num_local) + rank * shape.num_local, shape.num_topk, generator)
        for rank, count in enumerate(usual(shape))
    ]


@named("empty-rank")
def empty_rank(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    """Nobody routes to rank 0, which sends all the same."""
    others = torch.arange(shape.num_local, shape.num_experts)
    return [choose(count, others, shape.num_topk, generator) for count in usual(shape)]


@named("idle-rank")
def idle_rank(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    """The last rank has no token, T=0, and receives all the same."""
    return everywhere(shape, generator, [*usual(shape)[:-1], 0])


@named("idle-all")
def idle_all(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    return everywhere(shape, generator, [0] * shape.num_ranks)


@named("holes")
def holes(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    routed = everywhere(shape, generator, usual(shape))
    for ids in routed:
        ids[torch.rand(ids.shape, generator=generator) < 0.5] = UNROUTED
    return routed


@named("unrouted")
def unrouted(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    return [torch.full_like(ids, UNROUTED) for ids in everywhere(shape, generator, usual(shape))]


@named("duplicates")
def duplicates(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    """A token names an expert more than once; few experts, so that it happens often."""
    few = max(1, min(3, shape.num_experts))
    pool = torch.randperm(shape.num_experts, generator=generator)[:few]
    size = (shape.usual_tokens, shape.num_topk)
    return [pool[torch.randint(few, size, generator=generator)] for _ in range(shape.num_ranks)]


@named("k1", num_topk=1)
def one_choice(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    return everywhere(shape, generator, usual(shape))


@named("full")
def full(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    """T = M on every rank and, K permitting, every token to every rank: each inbox is full."""
    routed = []
    for _ in range(shape.num_ranks):
        order = torch.rand(shape.max_num_tokens, shape.num_ranks, shape.num_local, generator=generator)
        order.scatter_(2, order.argmin(dim=2, keepdim=True), -order.amin(dim=2, keepdim=True))  # one a rank first
        routed.append(order.flatten(1).argsort(dim=1)[:, : shape.num_topk])
    return routed


@named("ragged")
def ragged(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    """As unequal as can be: M, 1, about half, 0, and again."""
    sizes = (shape.max_num_tokens, 1, shape.usual_tokens // 2, 0)
    return everywhere(shape, generator, [sizes[rank % len(sizes)] for rank in range(shape.num_ranks)])


@named("zipf")
def zipf(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    """Expert popularity falls as 1 / its place in a shuffled order: what routers of trained models look like."""
    popularity = 1.0 / torch.arange(1, shape.num_experts + 1)
    popularity = popularity[torch.randperm(shape.num_experts, generator=generator)]
    return [
        torch.multinomial(popularity.expand(count, -1), shape.num_topk, generator=generator) for count in usual(shape)
    ]


@named("any")
def any_routing(shape: Shape, generator: torch.Generator) -> list[Tensor]:
    """Everything at once: T from 0 to M on each rank, any ids, holes and duplicates among them."""
    tokens = torch.randint(shape.max_num_tokens + 1, (shape.num_ranks,), generator=generator)
    return [
        torch.randint(UNROUTED, shape.num_experts, (count, shape.num_topk), generator=generator)
        for count in tokens.tolist()
    ]
