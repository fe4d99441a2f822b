"""Plain calls on a GPU: made by the extension, on torch's stream, into torch's memory."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch

import moebius
from moebius import AllToAll
from tests.helpers import gpu
from tests.helpers.cases import MODES
from tests.helpers.compare import assert_same
from tests.helpers.rounds import Halves, check_rank, dispatch_arguments, expect, of_rank
from tests.simt_engine.plain_calls import Counted, small

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = gpu.marks()

SLEEP = 200_000_000  # clock cycles, about 0.1 s
AHEAD = 24  # rounds


@pytest.mark.parametrize("payload", ["bf16", "fp8"])
@pytest.mark.parametrize("mode", MODES)
def test_plain_rounds_are_the_extensions(mode: str, payload: str) -> None:
    case = small(mode, payload)
    expected = [expect(case, number) for number in range(2 * case.depth)]
    with AllToAll(moebius.virtual_ranks(1)[0], case.config(), "cuda") as a2a:
        halves = Halves(a2a, of_rank(expected, 0))
        for number in range(2 * case.depth):
            counted = Counted(a2a)
            halves.dispatch(number)
            halves.combine(number)
            a2a.plain = counted._plain
            # The first round of each slot makes what its results are shown in.
            assert counted.taken() == (["dispatch"] if number >= case.depth else []) + ["combine"]
        check_rank(case.config(), 0, halves, expected)


def test_they_go_to_the_current_stream_and_its_memory() -> None:
    case = small()
    config, round_ = case.config(), expect(case, 0)
    with AllToAll(moebius.virtual_ranks(1)[0], config, "cuda") as a2a:
        arguments = dispatch_arguments(config, round_.inputs[0], a2a.device)
        expert_out = round_.expert_out[0].to(a2a.device)
        for _ in range(case.depth):
            a2a.combine(expert_out, a2a.dispatch(**arguments))
        a2a.synchronize()
        torch.cuda.synchronize()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        before = torch.cuda.memory_allocated()
        counted = Counted(a2a)
        with torch.cuda.stream(side):
            torch.cuda._sleep(SLEEP)  # type: ignore[no-untyped-call]
            home = a2a.combine(expert_out, a2a.dispatch(**arguments))
        assert counted.taken() == ["dispatch", "combine"]
        assert not side.query()
        assert torch.cuda.current_stream().query()
        assert torch.cuda.memory_allocated() > before
        home.record_stream(torch.cuda.current_stream())
        side.synchronize()
        assert_same(home.cpu(), round_.combined[0], "combined", any_nan=True)
        del home
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        a2a.plain = counted._plain
        a2a.synchronize()


@pytest.mark.parametrize("payload", ["bf16", "fp8"])
def test_rounds_ahead_of_the_device(payload: str) -> None:
    """What is enqueued keeps its own arguments, whatever is enqueued after it while the device has yet to begin."""
    config = small(payload=payload).config()
    dtypes = (torch.bfloat16, torch.float32, torch.float16) if payload == "fp8" else (torch.bfloat16,)
    with AllToAll(moebius.virtual_ranks(1)[0], config, "cuda") as a2a:
        draw = functools.partial(torch.randn, device=a2a.device)
        given = []
        for number in range(AHEAD):
            num_tokens = number % (config.max_num_tokens + 1)
            x = draw(num_tokens, config.hidden).to(dtypes[number % len(dtypes)])
            ids = draw(num_tokens, config.num_experts).topk(config.num_topk).indices
            given.append((x, ids, draw(num_tokens, config.num_topk)))
        experts = draw(AHEAD, config.num_experts, config.max_num_tokens, config.hidden).to(a2a.wire.output_dtype)

        def rounds(after_each: Callable[[], object]) -> list[torch.Tensor]:
            homes = []
            for arguments, expert_out in zip(given, experts, strict=True):
                homes.append(a2a.combine(expert_out, a2a.dispatch(*arguments)))
                after_each()
            return homes

        one_by_one = rounds(a2a.synchronize)
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP)  # type: ignore[no-untyped-call]
        ahead = rounds(lambda: None)
        assert not torch.cuda.current_stream().query()
        a2a.synchronize()
        for number, (home, wanted) in enumerate(zip(ahead, one_by_one, strict=True)):
            assert_same(home.cpu(), wanted.cpu(), f"combined of round {number}")
            assert number % (config.max_num_tokens + 1) == 0 or home.any()
