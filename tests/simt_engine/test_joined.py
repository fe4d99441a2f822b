"""Both halves by one kernel on the emulated engine: when it is one, and that nobody can tell from what comes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.helpers.cases import MODES, Case
from tests.helpers.rounds import dispatch_arguments
from tests.helpers.simt import extension
from tests.simt_engine.seats import Seats

if TYPE_CHECKING:
    from collections.abc import Callable

modes = pytest.mark.parametrize("mode", MODES)


def small(mode: str = "expert", num_ranks: int = 3, padded: bool = False, payload: str = "bf16") -> Case:
    return Case(
        num_ranks=num_ranks,
        num_experts=2 * num_ranks,
        num_topk=2,
        hidden=512 if payload == "fp8" else 16,
        max_num_tokens=4,
        mode=mode,
        padded=padded,
        payload=payload,
        routing="ragged",
    )


def launches(call: Callable[[], object]) -> int:
    before: int = extension().num_launches()
    call()
    return int(extension().num_launches()) - before


@modes
@pytest.mark.parametrize("payload", ["bf16", "fp8"])
@pytest.mark.parametrize("padded", [False, True], ids=["extension", "python"])
def test_ranks_may_differ_in_it(mode: str, payload: str, padded: bool) -> None:
    """Half by half on some ranks, in one call on others; the extension makes calls without options, Python the rest."""
    seats = Seats(small(mode, padded=padded, payload=payload))
    for number in range(6):
        halves = [(rank + number) % 3 == 0 for rank in range(3)]
        sent = {rank: seats.send(rank, number) for rank in range(3) if halves[rank]}
        received = [sent[rank].receive() if halves[rank] else seats.dispatch(rank, number) for rank in range(3)]
        replies = {rank: seats.reply(rank, number, received[rank]) for rank in range(3) if halves[rank]}
        combined = [
            replies[rank].receive() if halves[rank] else seats.combine(rank, number, received[rank])
            for rank in range(3)
        ]
        seats.wait()
        seats.check(number, received, combined, f"round {number}")
    seats.close()


@modes
@pytest.mark.parametrize("padded", [False, True], ids=["extension", "python"])
def test_eager_calls_are_one_kernel_each(mode: str, padded: bool) -> None:
    seats = Seats(small(mode, 1, padded))
    for number in range(4):
        received = []
        assert launches(lambda: received.append(seats.dispatch(0, number))) == 1  # noqa: B023  # called at once
        assert launches(lambda: seats.combine(0, number, received[0])) == 1  # noqa: B023
        seats.wait()
    seats.close()


def test_captured_calls_are_two() -> None:
    seats = Seats(small(num_ranks=1))
    (a2a,) = seats.ranks
    a2a.begin_capture()
    received = seats.dispatch(0, 0)
    combined = seats.combine(0, 0, received)
    graph = a2a.end_capture()
    assert launches(lambda: graph.replay(a2a.stream)) == 4
    seats.wait()
    seats.check(0, [received], [combined])
    seats.close()


@pytest.mark.parametrize(("num_tokens", "num_kernels"), [(512, 1), (513, 2)])
def test_calls_with_many_tokens_are_two(num_tokens: int, num_kernels: int) -> None:
    case = Case(num_ranks=1, num_experts=2, num_topk=1, hidden=16, max_num_tokens=num_tokens, routing="full")
    seats = Seats(case, 1)
    received = []
    assert len(seats.expected[0].inputs[0].x) == num_tokens
    assert launches(lambda: received.append(seats.dispatch(0, 0))) == num_kernels
    combined = []
    assert launches(lambda: combined.append(seats.combine(0, 0, received[0]))) == num_kernels
    seats.wait()
    seats.check(0, received, combined)
    seats.close()


def test_a_result_may_be_sent_again_where_it_is_received_into() -> None:
    """`x` is the result of D rounds ago: what is received goes to its memory."""
    seats = Seats(small(num_ranks=1))
    (a2a,) = seats.ranks
    first = seats.dispatch(0, 0)
    seats.combine(0, 0, first)
    seats.combine(0, 1, seats.dispatch(0, 1))
    seats.wait()
    arguments = dispatch_arguments(seats.case.config(), seats.expected[2].inputs[0])
    given = first.x[1][: len(seats.expected[2].inputs[0].x)]
    given.copy_(seats.expected[2].inputs[0].x)
    extension().host_wrote(given.data_ptr(), given.numel() * given.element_size())
    received = []
    assert launches(lambda: received.append(a2a.dispatch(**{**arguments, "x": given}))) == 2
    assert received[0].x.data_ptr() == first._buffers.x.data_ptr()
    combined = seats.combine(0, 2, received[0])
    seats.wait()
    seats.check(2, received, [combined])
    seats.close()


@modes
def test_a_result_may_be_combined_into_what_the_experts_wrote(mode: str) -> None:
    seats = Seats(small(mode, 1))
    (a2a,) = seats.ranks
    received = seats.dispatch(0, 0)
    round_ = seats.expected[0]
    expert_out = round_.expert_out[0].clone()
    out = expert_out.view(-1, expert_out.shape[-1])[: len(round_.inputs[0].x)]
    late = round_.inputs[0].topk_weights if mode == "expert-late" else None
    assert launches(lambda: a2a.combine(expert_out, received, late, out=out)) == 1
    seats.wait()
    assert torch.equal(out.nan_to_num(), round_.combined[0].nan_to_num())
    seats.close()
