"""A decode step of some layers of experts, and the same step by the reference: equal to the bit.

Everything between the rounds works on each element alone, so that neither padding nor the split of a batch can change
a bit, and the processor and the device agree.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moebius import Config, reference
from moebius.graphs import interleave, moe_layer, split

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moebius import AllToAll, Dispatched
    from moebius.graphs import Batch

EXPERTS, TOPK, HIDDEN, MOST = 12, 3, 64, 16
LAYERS = 3  # odd: a step ends in the other slot than it began in
PADDING = (0.0, -1, 0.0)  # of x, topk_ids, topk_weights


@dataclasses.dataclass(frozen=True)
class RankBatch:
    """What one rank decodes in one step."""

    x: Tensor  # [T, H]
    topk_ids: Tensor  # [T, K] int64
    topk_weights: Tensor  # [T, K] fp32

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, self.topk_ids, self.topk_weights

    def to(self, device: torch.device | str) -> RankBatch:
        return RankBatch(*(tensor.to(device) for tensor in self.tensors))


def config(**options: object) -> Config:
    fields: dict[str, object] = {"payload": "bf16", "timeout_s": 20.0, "max_num_tokens": MOST, **options}
    return Config(num_experts=EXPERTS, num_topk=TOPK, hidden=HIDDEN, **fields)  # type: ignore[arg-type]


def batch_of(num_tokens: int, *seed: int) -> RankBatch:
    """Random tokens and experts, some of them unrouted or named twice."""
    generator = torch.Generator().manual_seed(hash(seed) % (1 << 31))
    return RankBatch(
        x=torch.randn(num_tokens, HIDDEN, generator=generator).to(torch.bfloat16),
        topk_ids=torch.randint(-1, EXPERTS, (num_tokens, TOPK), generator=generator),
        topk_weights=torch.rand(num_tokens, TOPK, generator=generator),
    )


def shifted(topk_ids: Tensor, layer: int) -> Tensor:
    """Every layer routes otherwise."""
    return torch.where(topk_ids >= 0, (topk_ids + 3 * layer) % EXPERTS, topk_ids)


def expert_out(rank: int, x: Tensor) -> Tensor:
    """[L, R*M, H]: what the experts of a rank make of each row."""
    first = rank * x.shape[0]
    # Factors are exact: a device may divide by multiplying with a reciprocal.
    factor = torch.arange(first + 1, first + 1 + x.shape[0], device=x.device)[:, None, None] * 0.125
    return (x.float() * factor).to(x.dtype) + x.abs() / 4


def mixed(h: Tensor, y: Tensor) -> Tensor:
    return h / 2 + y


def reference_step(batches: Sequence[RankBatch], num_layers: int = LAYERS) -> list[Tensor]:
    """[T, H] of each rank: the layers over all ranks, without padding."""
    hidden = [batch.x for batch in batches]
    for layer in range(num_layers):
        inputs = [
            reference.RankInput(x=h, topk_ids=shifted(batch.topk_ids, layer), topk_weights=batch.topk_weights)
            for h, batch in zip(hidden, batches, strict=True)
        ]
        dispatched = reference.dispatch(config(), inputs)
        outputs = [expert_out(rank, received.x) for rank, received in enumerate(dispatched)]
        combined = reference.combine(config(), inputs, dispatched, outputs)
        hidden = [mixed(h, y) for h, y in zip(hidden, combined, strict=True)]
    return hidden


class Step:
    """The layers of one rank, as a user writes them.

    Attributes:
        num_tokens: rows of each call, in order.
    """

    def __init__(self, a2a: AllToAll, num_layers: int = LAYERS) -> None:
        self.a2a = a2a
        self.num_layers = num_layers
        self.num_tokens: list[int] = []

    def __call__(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, num_valid_tokens: Tensor | None = None
    ) -> Tensor:
        self.num_tokens.append(x.shape[0])
        for layer in range(self.num_layers):
            ids = shifted(topk_ids, layer)
            recv = self.a2a.dispatch(x, ids, topk_weights, num_valid_tokens=num_valid_tokens)
            x = mixed(x, self.a2a.combine(expert_out(self.a2a.rank, recv.x), recv))
        return x


class InterleavedStep(Step):
    """The same layers over micro-batches.

    Attributes:
        comm_stream: for the halves; None for one stream.
        settle: called before the host computes on what a half gives, where streams do not see to it.
    """

    def __init__(
        self,
        a2a: AllToAll,
        num_layers: int = LAYERS,
        num_parts: int = 2,
        comm_stream: torch.cuda.Stream | None = None,
    ) -> None:
        super().__init__(a2a, num_layers)
        self.num_parts = num_parts
        self.comm_stream = comm_stream
        self.settle: Callable[[], None] = lambda: None

    def __call__(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, num_valid_tokens: Tensor | None = None
    ) -> Tensor:
        assert num_valid_tokens is not None
        self.num_tokens.append(x.shape[0])
        parts = split(x.shape[0], num_valid_tokens, self.num_parts)
        batches = [
            self.layers(x[part.rows], topk_ids[part.rows], topk_weights[part.rows], part.num_valid_tokens)
            for part in parts
        ]
        return torch.cat(interleave(batches, comm_stream=self.comm_stream))

    def layers(self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, num_valid_tokens: Tensor) -> Batch[Tensor]:
        for layer in range(self.num_layers):
            ids = shifted(topk_ids, layer)
            y = yield from moe_layer(self.a2a, self.experts, x, ids, topk_weights, num_valid_tokens=num_valid_tokens)
            self.settle()
            x = mixed(x, y)
        return x

    def experts(self, recv: Dispatched) -> Tensor:
        self.settle()
        return expert_out(self.a2a.rank, recv.x)


class RanksStep:
    """The steps of all ranks as one, by one thread and on one stream: every rank sends before the first receives.

    Its inputs hold the ranks side by side, see `side_by_side`; each rank has its own T, and micro-batches.
    """

    def __init__(self, steps: Sequence[InterleavedStep]) -> None:
        self.steps = steps

    def __call__(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, counts: Tensor, *, num_valid_tokens: Tensor
    ) -> Tensor:
        assert num_valid_tokens.numel() == 1
        num_ranks, num_parts = len(self.steps), self.steps[0].num_parts
        batches = []
        for number in range(num_parts):
            for rank, step in enumerate(self.steps):
                part = split(len(x), counts[0, rank : rank + 1], num_parts)[number]
                mine = RankBatch(
                    *(each.view(len(x), num_ranks, -1)[part.rows, rank] for each in (x, topk_ids, topk_weights))
                )
                batches.append(step.layers(*mine.tensors, part.num_valid_tokens))
        outputs = interleave(batches)
        return torch.cat([torch.cat(outputs[rank::num_ranks]) for rank in range(num_ranks)], 1)


def side_by_side(batches: Sequence[RankBatch]) -> tuple[Tensor, ...]:
    """[T, R H], [T, R K], [T, R K], and [T, R] int32: the batches of all ranks, and in each row how long they are.

    T is that of the rank with most tokens.
    """
    sizes = [batch.x.shape[0] for batch in batches]
    columns = []
    for each, value in zip(zip(*(batch.tensors for batch in batches), strict=True), PADDING, strict=True):
        parts = [tensor.new_full((max(sizes), tensor.shape[1]), value) for tensor in each]
        for part, tensor in zip(parts, each, strict=True):
            part[: tensor.shape[0]] = tensor
        columns.append(torch.cat(parts, 1))
    counts = torch.tensor(sizes, dtype=torch.int32, device=columns[0].device).expand(max(sizes), -1)
    return (*columns, counts.contiguous())
