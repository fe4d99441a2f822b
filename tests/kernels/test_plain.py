"""Plain calls on a GPU: made by the extension, on torch's stream, into torch's memory."""

from __future__ import annotations

import pytest
import torch

import moebius
from moebius import AllToAll
from tests.helpers import gpu
from tests.helpers.cases import MODES
from tests.helpers.compare import assert_same
from tests.helpers.rounds import Halves, check_rank, dispatch_arguments, expect, of_rank
from tests.simt_engine.plain_calls import HALVES, Counted, small

pytestmark = gpu.marks()

SLEEP = 200_000_000  # clock cycles, about 0.1 s


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
            assert counted.taken() == [half for half in HALVES if half != "dispatch_recv" or number >= case.depth]
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
        assert counted.taken() == list(HALVES)
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
