"""Programs that engines run on a rank; see `engines`. Processes import them by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moebius.reference import RankInput, dequantize_fp8
from tests.helpers.rounds import Halves, RankRound, Result, copied, dispatch_arguments, on

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from moebius import AllToAll, Dispatched
    from tests.helpers.schedules import Half


def whole_rounds(a2a: AllToAll, rounds: Sequence[RankRound], blocking: bool = False) -> Generator[None, None, Result]:
    """One round after another, all four halves of each, or in the two blocking calls."""
    halves = Halves(a2a, rounds)
    for number in range(len(rounds)):
        if blocking:
            halves.dispatch(number)
            yield
            halves.combine(number)
            continue
        halves.dispatch_send(number)
        yield
        halves.dispatch_receive(number)
        halves.combine_send(number)
        yield
        halves.combine_receive(number)
    return Result.of(halves)


def repeated(a2a: AllToAll, rounds: Sequence[RankRound], times: int) -> Generator[None, None, list[Result]]:
    """The same rounds over and over."""
    results = []
    for _ in range(times):
        results.append((yield from whole_rounds(a2a, rounds)))
    return results


def ordered(a2a: AllToAll, rounds: Sequence[RankRound], order: Sequence[Half]) -> Generator[None, None, Result]:
    """The halves in the order given; see `schedules`."""
    halves = Halves(a2a, rounds)
    for half, number in order:
        getattr(halves, half)(number)
        yield
    return Result.of(halves)


def computed(a2a: AllToAll, batches: Sequence[RankInput]) -> Generator[None, None, list[Tensor]]:
    """Rounds whose experts compute from the token alone: what comes back depends on the token and its experts."""
    combined = []
    for inputs in batches:
        pending = a2a.dispatch_send(**dispatch_arguments(a2a.config, inputs, a2a.device))
        yield
        recv = pending.receive()
        a2a.synchronize()
        weights = on(a2a.device, inputs.topk_weights) if a2a.config.weights_at == "combine" else None
        replies = a2a.combine_send(experts(a2a, recv), recv, weights)
        yield
        home = replies.receive()
        a2a.synchronize()
        combined.append(home.cpu().clone())
    return combined


def experts(a2a: AllToAll, recv: Dispatched) -> Tensor:
    """Scale and bend every row, by its expert where rows have one; element by element, so that rows stay apart."""
    rows = recv.x.float() if recv.scales is None else dequantize_fp8(recv.x, recv.scales)
    output = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[a2a.config.output_dtype]
    if recv.topk_ids is not None:
        assert recv.topk_weights is not None
        chosen = torch.where(recv.topk_ids >= 0, recv.topk_weights, 0.0)
        factor = torch.zeros(rows.shape[0], 1, device=rows.device)
        for k in range(chosen.shape[1]):
            factor = factor + chosen[:, k, None] * (recv.topk_ids[:, k, None] + 1)
        return (rows * factor).to(output)
    first = a2a.rank * rows.shape[0]
    factor = torch.arange(first + 1, first + 1 + rows.shape[0], device=rows.device)[:, None, None] / 7
    return (rows * factor + rows.abs()).to(output)


def with_option(a2a: AllToAll, rounds: Sequence[RankRound], option: str) -> Generator[None, None, Result]:
    """Rounds that use an option of the calls: "strided" or "into"."""
    halves = OPTIONS[option](a2a, rounds)
    for number in range(len(rounds)):
        halves.dispatch_send(number)
        yield
        halves.dispatch_receive(number)
        halves.combine_send(number)
        yield
        halves.combine_receive(number)
    return Result.of(halves)


class Strided(Halves):
    """Tensors whose rows stand apart, or in another order than they are numbered."""

    def inputs(self, number: int) -> RankInput:
        plain = super().inputs(number)
        return RankInput(
            x=spread(plain.x),
            topk_ids=spread(plain.topk_ids),
            topk_weights=spread(plain.topk_weights),
            scales=None if plain.scales is None else spread(plain.scales),
            num_valid_tokens=plain.num_valid_tokens,
        )

    def expert_out(self, number: int) -> Tensor:
        return spread(super().expert_out(number))


def spread(rows: Tensor) -> Tensor:
    """The same values with a gap after every row."""
    wide = rows.new_zeros(*rows.shape[:-1], rows.shape[-1] + 16)
    wide.view(torch.uint8).fill_(0xA5)
    wide[..., : rows.shape[-1]] = rows
    return wide[..., : rows.shape[-1]]


class Into(Halves):
    """Results go into tensors of the caller, which had better be returned."""

    def dispatch_send(self, number: int) -> None:
        self._dispatches[number] = self._send(number, **self.outputs())

    def outputs(self) -> dict[str, Tensor]:
        """Filled with a byte that no row is made of."""
        config = self._a2a.config
        rows = (config.num_local_experts(self._a2a.num_ranks), self._a2a.num_ranks * config.max_num_tokens)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "opaque": torch.uint8}
        width = config.payload_bytes if config.payload == "opaque" else config.hidden
        device = self._a2a.device
        self.out = torch.empty(*rows, width, dtype=dtype.get(config.payload, torch.float8_e4m3fn), device=device)
        self.out.view(torch.uint8).fill_(0xA5)
        if config.payload == "fp8_e4m3":
            packed = config.scale_format == "ue8m0"
            groups = config.hidden // (512 if packed else 128)
            of = torch.int32 if packed else torch.float32
            self.out_scales = torch.empty(rows[0], groups, rows[1], dtype=of, device=device)
            return {"out": self.out, "out_scales": self.out_scales.transpose(1, 2)}
        if config.payload == "opaque" and config.scale_bytes:
            self.out_scales = torch.empty(*rows, config.scale_bytes, dtype=torch.uint8, device=device)
            return {"out": self.out, "out_scales": self.out_scales}
        return {"out": self.out}

    def dispatch_receive(self, number: int) -> None:
        super().dispatch_receive(number)
        assert self.live[number].x.data_ptr() == self.out.data_ptr(), "out= was not used"
        scales = self.live[number].scales
        assert scales is None or scales.data_ptr() == self.out_scales.data_ptr(), "out_scales= was not used"

    def combine_send(self, number: int) -> None:
        round_ = self._rounds[number]
        shape, device = (round_.inputs.num_tokens, self._a2a.config.hidden), self._a2a.device
        self.home = torch.full(shape, 7.0, dtype=round_.expert_out.dtype, device=device)
        self._combines[number] = self._a2a.combine_send(
            self.expert_out(number), self.live[number], self.late_weights(number), out=self.home
        )

    def combine_receive(self, number: int) -> None:
        super().combine_receive(number)
        assert self._combines[number].receive().data_ptr() == self.home.data_ptr(), "out= was not used"


OPTIONS = {"strided": Strided, "into": Into}


def measured(
    a2a: AllToAll, rounds: Sequence[RankRound], dtype: torch.dtype
) -> Generator[None, None, tuple[Result, Tensor, Tensor, Tensor]]:
    """Rounds that add up statistics: tokens of each expert, and what dispatch and combine waited for each rank."""
    halves = Halves(a2a, rounds)
    stats = torch.ones(a2a.config.num_local_experts(a2a.num_ranks), dtype=dtype, device=a2a.device)
    waits = [torch.zeros(a2a.num_ranks, dtype=torch.int64, device=a2a.device) for _ in range(2)]
    for number, round_ in enumerate(rounds):
        arguments = dispatch_arguments(a2a.config, round_.inputs, a2a.device)
        pending = a2a.dispatch_send(**arguments, expert_stats=stats, wait_stats=waits[0])
        yield
        halves.live[number] = pending.receive()
        pending.receive()  # again: the same result, counted once
        a2a.synchronize()
        halves.received[number] = copied(halves.live[number])
        replies = a2a.combine_send(
            halves.expert_out(number), halves.live[number], halves.late_weights(number), wait_stats=waits[1]
        )
        yield
        home = replies.receive()
        a2a.synchronize()
        halves.combined[number] = home.cpu().clone()
    return Result.of(halves), stats.cpu(), waits[0].cpu(), waits[1].cpu()
