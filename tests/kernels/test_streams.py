"""Virtual ranks on streams of one GPU: faults, statistics of the host, events; what conformance does not ask."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch

import moebius
from moebius import AllToAll, ConfigError, PeerTimeoutError, RoutingError, ShapeError, StateError
from tests.helpers import gpu
from tests.helpers.cases import MODES, Case
from tests.helpers.rounds import Halves, check_rank, dispatch_arguments, expect, of_rank

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = gpu.marks()


class Ranks:
    """An `AllToAll` and a stream for each rank of a case, and the halves of its rounds."""

    def __init__(self, case: Case, count: int = 3) -> None:
        self.case = case
        self.expected = [expect(case, number) for number in range(count)]
        self.ranks = [AllToAll(group, case.config(), "cuda") for group in moebius.virtual_ranks(case.num_ranks)]
        self.streams = [torch.cuda.Stream() for _ in self.ranks]  # type: ignore[no-untyped-call]
        self.halves = [Halves(a2a, of_rank(self.expected, rank)) for rank, a2a in enumerate(self.ranks)]

    def call(self, half: str, number: int, *only: int) -> None:
        for rank in only or range(len(self.ranks)):
            with torch.cuda.stream(self.streams[rank]):
                getattr(self.halves[rank], half)(number)

    def round(self, number: int) -> None:
        for half in ("dispatch_send", "dispatch_receive", "combine_send", "combine_receive"):
            self.call(half, number)

    def check(self) -> None:
        for rank, halves in enumerate(self.halves):
            check_rank(self.case.config(), rank, halves, self.expected)


@pytest.fixture
def small() -> Iterator[Ranks]:
    made = Ranks(Case(num_ranks=3, num_experts=6, timeout_s=0.5))
    yield made
    for a2a in made.ranks:
        a2a.close()


@pytest.mark.parametrize("mode", MODES)
def test_rounds(mode: str) -> None:
    ranks = Ranks(Case(num_ranks=4, num_experts=16, hidden=7168, max_num_tokens=128, payload="fp8", mode=mode))
    for number in range(3):
        ranks.round(number)
    ranks.check()
    for a2a in ranks.ranks:
        assert a2a.engine == "cuda"
        assert a2a.epoch == 3
        assert a2a.remote_bytes > 0
        a2a.close()


def test_a_rank_that_never_comes_is_named(small: Ranks) -> None:
    small.round(0)
    small.call("dispatch_send", 1, 0, 1)
    for rank in (0, 1):
        with pytest.raises(PeerTimeoutError) as caught:
            small.call("dispatch_receive", 1, rank)
        assert (caught.value.rank, caught.value.op, caught.value.half) == (2, "dispatch", "recv")
        assert caught.value.reason in ("deadline", "reported")
        assert small.ranks[rank].dead_ranks == (2,)
    # The survivors are in step: another round among the two of them.
    small.call("dispatch_send", 2, 0, 1)
    small.call("dispatch_receive", 2, 0, 1)
    assert all(small.halves[rank].received[2].src_num_tokens[2] == 0 for rank in (0, 1))


def test_an_id_that_is_no_expert_is_told_later(small: Ranks) -> None:
    case, a2a = small.case, small.ranks[0]
    good = small.expected[0].inputs[0]
    bad = good.topk_ids.clone()
    bad[1, 2] = 77
    with torch.cuda.stream(small.streams[0]):
        a2a.dispatch_send(**dispatch_arguments(case.config(), dataclasses.replace(good, topk_ids=bad), "cuda"))
        with pytest.raises(RoutingError, match=r"topk_ids\[1, 2\].*got 77"):
            a2a.synchronize()


def test_tensors_of_another_device_are_refused(small: Ranks) -> None:
    arguments = dispatch_arguments(small.case.config(), small.expected[0].inputs[0], "cuda")
    for name in ("x", "topk_ids", "topk_weights"):
        with pytest.raises(ShapeError, match=f"`{name}`.*on cuda:"):
            small.ranks[0].dispatch_send(**{**arguments, name: arguments[name].cpu()})
    odd = torch.empty(arguments["x"].numel() + 1, dtype=arguments["x"].dtype, device="cuda")[1:]
    with pytest.raises(ShapeError, match="multiples of 16 bytes"):
        small.ranks[0].dispatch_send(**{**arguments, "x": odd.view_as(arguments["x"])})


def test_num_sms_is_checked() -> None:
    (group,) = moebius.virtual_ranks(1)
    for wrong in (0, 100000, "4"):
        with pytest.raises(ConfigError, match="num_sms"):
            AllToAll(group, Case(num_ranks=1).config(), "cuda", num_sms=wrong)  # type: ignore[arg-type]
    with AllToAll(group, Case(num_ranks=1).config(), "cuda", num_sms=1) as a2a:
        assert a2a.device.type == "cuda"


def test_no_such_device() -> None:
    with pytest.raises(ConfigError, match="CUDA devices here"):
        AllToAll(moebius.virtual_ranks(1)[0], Case(num_ranks=1).config(), "cuda:99")


def test_halves_of_a_round_stay_in_its_capture() -> None:
    case = Case(num_ranks=1, num_experts=4)
    ranks = Ranks(case)
    (a2a,) = ranks.ranks
    arguments = dispatch_arguments(case.config(), ranks.expected[0].inputs[0], "cuda")
    ranks.round(0)
    torch.cuda.synchronize()
    eager = a2a.dispatch_send(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(StateError, match="began eagerly"):
            eager.receive()
        inside = a2a.dispatch_send(**arguments)
        received = inside.receive()
    with pytest.raises(StateError, match="capture"):
        a2a.combine_send(torch.zeros_like(received.x), received)
    eager.receive()
    a2a.synchronize()
    graph.replay()
    a2a.synchronize()
    a2a.close()


def test_the_default_device_is_followed() -> None:
    with torch.device("cuda"):
        a2a = AllToAll(moebius.virtual_ranks(1)[0], Case(num_ranks=1).config())
    assert a2a.engine == "cuda"
    a2a.close()
