"""Rounds as data: what a rank passes in, what it got, and the comparison with the reference."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebius import reference
from tests.helpers.compare import assert_same
from tests.helpers.payload import label_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moebius import AllToAll, Config, Dispatched, PendingCombine, PendingDispatch
    from moebius.reference import RankDispatched, RankInput
    from tests.helpers.cases import Case


@dataclasses.dataclass(frozen=True)
class RankRound:
    """One round of one rank: what goes in."""

    inputs: RankInput
    expert_out: Tensor


@dataclasses.dataclass(frozen=True)
class Expected:
    """One round of all ranks: what goes in, and what must come out."""

    inputs: list[RankInput]
    expert_out: list[Tensor]
    dispatched: list[RankDispatched]
    combined: list[Tensor]

    def of(self, rank: int) -> RankRound:
        return RankRound(self.inputs[rank], self.expert_out[rank])


def expect(case: Case, number: int, inputs: list[RankInput] | None = None) -> Expected:
    """Round `number` of a case, with its own inputs unless others are given."""
    inputs = case.inputs(number) if inputs is None else inputs
    dispatched = reference.dispatch(case.config(), inputs)
    expert_out = case.expert_out(number, dispatched)
    return Expected(inputs, expert_out, dispatched, reference.combine(case.config(), inputs, dispatched, expert_out))


def of_rank(expected: Sequence[Expected], rank: int) -> list[RankRound]:
    """What one rank needs of some rounds."""
    return [round_.of(rank) for round_ in expected]


@dataclasses.dataclass(frozen=True)
class Received:
    """A copy of a `Dispatched`: outlives the buffers and travels between processes."""

    x: Tensor
    scales: Tensor | None
    expert_num_tokens: Tensor
    src_num_tokens: Tensor
    topk_ids: Tensor | None
    topk_weights: Tensor | None
    src_info: Tensor | None
    layout_range: Tensor | None
    num_tokens: int
    epoch: int
    x_stride: tuple[int, ...]
    scales_stride: tuple[int, ...]


def copied(recv: Dispatched) -> Received:
    """Copy what a rank received."""

    def copy(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().cpu().clone(memory_format=torch.contiguous_format)

    return Received(
        x=recv.x.detach().cpu().clone(memory_format=torch.contiguous_format),
        scales=copy(recv.scales),
        expert_num_tokens=recv.expert_num_tokens.cpu().clone(),
        src_num_tokens=recv.src_num_tokens.cpu().clone(),
        topk_ids=copy(recv.topk_ids),
        topk_weights=copy(recv.topk_weights),
        src_info=copy(recv.src_info),
        layout_range=copy(recv.layout_range),
        num_tokens=recv.num_tokens,
        epoch=recv.epoch,
        x_stride=recv.x.stride(),
        scales_stride=() if recv.scales is None else recv.scales.stride(),
    )


def dispatch_arguments(config: Config, inputs: RankInput, device: torch.device | str = "cpu") -> dict[str, Any]:
    """How a rank's input is passed to dispatch, on the engine's device."""
    weights = inputs.topk_weights if config.weights_at == "dispatch" else None
    valid = inputs.num_valid_tokens
    tensors = {
        "x": inputs.x,
        "topk_ids": inputs.topk_ids,
        "topk_weights": weights,
        "scales": inputs.scales,
        "num_valid_tokens": None if valid is None else torch.tensor([valid], dtype=torch.int32),
    }
    return {name: on(device, tensor) for name, tensor in tensors.items()}


def on(device: torch.device | str, tensor: Tensor | None) -> Tensor | None:
    """The tensor there, its strides kept."""
    if tensor is None or tensor.device == torch.device(device):
        return tensor
    if tensor.is_contiguous():
        return tensor.to(device)
    wide = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    # Some dtypes have no copy with strides; their bytes have.
    if tensor.stride(-1) == 1:
        wide.view(torch.uint8).copy_(tensor.view(torch.uint8))
        return wide
    return wide.copy_(tensor)


class Halves:
    """The halves of some rounds of one rank, to be called in any legal order; checks nothing itself.

    Attributes:
        received: copies of what came, by round.
        combined: copies of what came back, by round.
        kept: copies of what came, made again as late as it must still be there.
    """

    def __init__(self, a2a: AllToAll, rounds: Sequence[RankRound]) -> None:
        self.received: dict[int, Received] = {}
        self.combined: dict[int, Tensor] = {}
        self.kept: dict[int, Received] = {}
        self.live: dict[int, Dispatched] = {}
        self._a2a = a2a
        self._rounds = rounds
        self._dispatches: dict[int, PendingDispatch] = {}
        self._combines: dict[int, PendingCombine] = {}
        self._lost_combines: set[int] = set()

    def inputs(self, number: int) -> RankInput:
        return self._rounds[number].inputs

    def expert_out(self, number: int) -> Tensor:
        expert_out = on(self._a2a.device, self._rounds[number].expert_out)
        assert expert_out is not None
        return expert_out

    def dispatch_send(self, number: int) -> None:
        overwritten = number - self._a2a.config.depth
        # In token_major the combine gives the cells back: other ranks may fill them before we come here.
        given_back = overwritten in self._combines or overwritten in self._lost_combines
        if self._a2a.config.layout == "expert_major" or not given_back:
            self._keep(overwritten)
        self._dispatches[number] = self._send(number)

    def _send(self, number: int, **more: Any) -> PendingDispatch:
        arguments = dispatch_arguments(self._a2a.config, self.inputs(number), self._a2a.device)
        return self._a2a.dispatch_send(**arguments, **more)

    def dispatch_receive(self, number: int) -> None:
        self.live[number] = self._dispatches[number].receive()
        self._a2a.synchronize()
        self.received[number] = copied(self.live[number])

    def dispatch(self, number: int) -> None:
        """Both halves in one call."""
        arguments = dispatch_arguments(self._a2a.config, self.inputs(number), self._a2a.device)
        self.live[number] = self._a2a.dispatch(**arguments)
        self._a2a.synchronize()
        self.received[number] = copied(self.live[number])

    def combine(self, number: int) -> None:
        """Both halves in one call."""
        combined = self._a2a.combine(self.expert_out(number), self.live[number], self.late_weights(number))
        self._a2a.synchronize()
        self.combined[number] = combined.cpu().clone()

    def combine_send(self, number: int) -> None:
        self._keep(number)
        weights = self.late_weights(number)
        self._lost_combines.add(number)
        self._combines[number] = self._a2a.combine_send(self.expert_out(number), self.live[number], weights)
        self._lost_combines.remove(number)

    def _keep(self, number: int) -> None:
        if number not in self.live:
            return
        if self._a2a.device.type == "cuda":
            # A copy to the host that waits behind a kernel of ours holds up those of other threads, for whose ranks
            # the kernel may wait.
            self._a2a.synchronize()
        self.kept[number] = copied(self.live[number])

    def late_weights(self, number: int) -> Tensor | None:
        weights = self._rounds[number].inputs.topk_weights
        return on(self._a2a.device, weights) if self._a2a.config.weights_at == "combine" else None

    def combine_receive(self, number: int) -> None:
        combined = self._combines[number].receive()
        self._a2a.synchronize()
        self.combined[number] = combined.cpu().clone()


def check_rank(config: Config, rank: int, got: Halves | Result, expected: Sequence[Expected]) -> None:
    """Compare all that one rank got with the reference."""
    for number, received in got.received.items():
        check_received(config, received, expected[number].dispatched[rank], f"round {number}, rank {rank}: ")
    for number, kept in got.kept.items():
        check_received(config, kept, expected[number].dispatched[rank], f"round {number}, rank {rank}, later: ")
    for number, combined in got.combined.items():
        want = expected[number].combined[rank]
        assert_same(combined, want, f"round {number}, rank {rank}: combined", any_nan=True)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a rank's program got: `Halves` without the object that cannot travel."""

    received: dict[int, Received]
    combined: dict[int, Tensor]
    kept: dict[int, Received]

    @classmethod
    def of(cls, halves: Halves) -> Result:
        return cls(halves.received, halves.combined, halves.kept)


def check_received(config: Config, got: Received, want: RankDispatched, what: str) -> None:
    """Compare a dispatch's result with the reference, where it is defined."""
    assert_same(got.expert_num_tokens, want.expert_num_tokens, f"{what}expert_num_tokens")
    assert_same(got.src_num_tokens, want.src_num_tokens, f"{what}src_num_tokens")
    num_ranks, capacity = len(want.sent), config.max_num_tokens
    assert got.x.shape == want.x.shape, f"{what}x: expected shape {tuple(want.x.shape)} (got {tuple(got.x.shape)})"
    assert got.x_stride[-1] == 1, f"{what}x: expected contiguous rows (got strides {got.x_stride})"
    if config.layout == "token_major":
        blocks = [slice(rank * capacity, rank * capacity + want.sent[rank].numel()) for rank in range(num_ranks)]
        check_blocks(got, want, blocks, what)
        assert got.src_info is None, f"{what}src_info: expected None in token_major"
        assert got.layout_range is None, f"{what}layout_range: expected None in token_major"
        assert got.topk_ids is not None
        assert got.topk_weights is not None
        assert want.topk_ids is not None
        assert want.topk_weights is not None
        assert_same(got.topk_ids, want.topk_ids, f"{what}topk_ids")
        local = want.topk_ids >= 0
        assert_same(got.topk_weights[local], want.topk_weights[local], f"{what}topk_weights of local experts")
        return
    for expert, count in enumerate(want.expert_num_tokens.tolist()):
        check_blocks(got, want, [(expert, slice(count))], what)
        assert got.src_info is not None
        assert want.src_info is not None
        assert_same(got.src_info[expert, :count], want.src_info[expert, :count], f"{what}src_info[{expert}]")
    assert got.layout_range is not None
    assert want.layout_range is not None
    assert_same(got.layout_range, want.layout_range, f"{what}layout_range")
    assert got.topk_ids is None, f"{what}topk_ids: expected None in expert_major"
    assert got.topk_weights is None, f"{what}topk_weights: expected None in expert_major"


def check_blocks(got: Received, want: RankDispatched, blocks: Sequence[slice | tuple[int, slice]], what: str) -> None:
    """Compare some rows of x and of the scales."""
    for block in blocks:
        assert_same(got.x[block], want.x[block], f"{what}x[{block}]", label=label_of)
    if want.scales is None:
        assert got.scales is None, f"{what}scales: expected None"
        return
    assert got.scales is not None, f"{what}scales: expected a tensor (got None)"
    assert got.scales.shape == want.scales.shape, (
        f"{what}scales: expected shape {tuple(want.scales.shape)} (got {tuple(got.scales.shape)})"
    )
    for block in blocks:
        assert_same(got.scales[block], want.scales[block], f"{what}scales[{block}]")
    column_major = want.scales.dim() == 3 and want.scales.dtype != torch.uint8
    expected, stride = (-2, got.scales_stride[-2]) if column_major else (-1, got.scales_stride[-1])
    assert stride == 1, f"{what}scales: expected stride({expected}) == 1 (got strides {got.scales_stride})"
