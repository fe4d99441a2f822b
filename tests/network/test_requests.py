"""What a rank asks of its network: one request for each remote rank and half, and nothing for a rank of its host."""

from __future__ import annotations

import dataclasses

import pytest

import moebius
from moebius import AllToAll, ConfigError, StateError, VirtualNetwork, native
from moebius.wire import shape_of
from tests.conformance.engines import run_single
from tests.conformance.programs import whole_rounds
from tests.helpers.cases import Case
from tests.helpers.rounds import Expected, Halves, check_rank, expect, of_rank
from tests.helpers.schedules import HALVES

CASE = Case(num_ranks=4, num_experts=8, num_topk=3, hidden=128, max_num_tokens=8)
LIMIT_BYTES = 550_000_000  # of a rank at EP256


def count(case: Case, network: VirtualNetwork, rounds: int = 3, chunk_bytes: int = 0) -> list[list[tuple[int, int]]]:
    """For each half and rank the signals and the puts that one round asks for, checked to be the same in all rounds.

    Signals must not vary; puts depend on the routing, so those of the first round are returned.
    """
    config = dataclasses.replace(case.config(), chunk_bytes=chunk_bytes)
    ranks = [AllToAll(group, config) for group in moebius.virtual_ranks(case.num_ranks, network)]
    expected = [expect(case, number) for number in range(rounds)]
    halves = [Halves(a2a, of_rank(expected, rank)) for rank, a2a in enumerate(ranks)]
    found: list[list[list[tuple[int, int]]]] = []
    for number in range(rounds):
        found.append([])
        for half in HALVES:
            before = [network.requests(rank) for rank in range(case.num_ranks)]
            for one in halves:
                getattr(one, half)(number)
            after = [network.requests(rank) for rank in range(case.num_ranks)]
            found[-1].append(
                [(b.put_signals - a.put_signals, b.puts - a.puts) for a, b in zip(before, after, strict=True)]
            )
    for rank, got in enumerate(halves):
        check_rank(config, rank, got, expected)
        ranks[rank].close()
    signals = [[[one[0] for one in half] for half in of_round] for of_round in found]
    assert all(of_round == signals[0] for of_round in signals), "the number of requests depends on the round"
    return found[0]


@pytest.mark.parametrize("mode", ["expert", "token"])
@pytest.mark.parametrize("routing", ["uniform", "idle-all"])
@pytest.mark.parametrize("ranks_per_host", [1, 2, 3])
def test_one_request_for_each_remote_rank_and_half(mode: str, routing: str, ranks_per_host: int) -> None:
    """Also where nothing is sent: the count travels all the same."""
    case = dataclasses.replace(CASE, mode=mode, routing=routing)
    hosts = VirtualNetwork(ranks_per_host).hosts(4)
    remote = [(sum(host != mine for host in hosts), 0) for mine in hosts]
    nothing = [(0, 0)] * 4
    assert count(case, VirtualNetwork(ranks_per_host)) == [remote, nothing, remote, nothing]


def test_a_put_for_each_row_with_weights_at_combine() -> None:
    """The rows of one peer do not lie together at home."""
    case = dataclasses.replace(CASE, mode="expert-late")
    owed = [0] * 4
    for source, inputs in enumerate(case.inputs(0)):
        for ids in inputs.topk_ids.tolist():
            for expert in ids:
                if expert >= 0 and expert // 2 != source:
                    owed[expert // 2] += 1
    sent = count(case, VirtualNetwork(1))
    assert sent[0] == [(3, 0)] * 4
    assert sent[2] == [(3, owed[rank]) for rank in range(4)]


def test_chunks() -> None:
    """A cell a chunk: the last one carries the signal."""
    case = dataclasses.replace(CASE, routing="full")
    whole = count(case, VirtualNetwork(1, max_delay_us=50))
    chunked = count(case, VirtualNetwork(1, max_delay_us=50), chunk_bytes=1)
    assert [signals for signals, _ in chunked[0]] == [signals for signals, _ in whole[0]] == [3] * 4
    assert all(puts > 0 for _, puts in chunked[0])
    assert all(puts == 0 for _, puts in whole[0])


def test_ranks_of_one_host_have_no_network() -> None:
    network = VirtualNetwork(4)
    ranks = [AllToAll(group, CASE.config()) for group in moebius.virtual_ranks(4, network)]
    plain = AllToAll(moebius.virtual_ranks(1)[0], dataclasses.replace(CASE.config(), num_experts=4))
    assert ranks[0].heap_bytes == moebius.plan(CASE.config(), 4).heap_bytes, "an outbox that nobody needs"
    with pytest.raises(StateError, match="no object uses"):
        network.requests(0)
    plain.close()


@pytest.mark.parametrize(
    "wrong", [{"ranks_per_host": 0}, {"ranks_per_host": 1, "latency_us": -1.0}, {"ranks_per_host": 1, "seed": "a"}]
)
def test_numbers_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        VirtualNetwork(**wrong)  # type: ignore[arg-type]


def test_the_outbox_is_in_the_plan() -> None:
    """EP256 as DeepSeek-V3 runs it, eight ranks to a host."""
    config = moebius.Config(num_experts=256, num_topk=8, hidden=7168, max_num_tokens=128, payload="fp8_e4m3")
    core = native.core()
    alone = core.HeapLayout(shape_of(config, 256))
    layout = core.HeapLayout(shape_of(config, 256, has_outbox=True))
    outbox = dict(layout.regions())["outbox"]
    assert "outbox" not in dict(alone.regions())
    assert outbox >= 1024 * (layout.cell_bytes + layout.reply_stride)
    assert sum(dict(layout.regions()).values()) == layout.total <= LIMIT_BYTES


def test_links_have_a_speed() -> None:
    """The same bits over slow links."""
    case = dataclasses.replace(CASE, num_ranks=2)
    expected: list[Expected] = [expect(case, number) for number in range(2)]
    arguments = [(of_rank(expected, rank),) for rank in range(2)]
    network = VirtualNetwork(1, latency_us=500.0, gbps=0.1)
    for rank, result in enumerate(run_single(case.config(), 2, whole_rounds, arguments, network=network)):
        check_rank(case.config(), rank, result, expected)
