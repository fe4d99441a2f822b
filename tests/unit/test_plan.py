"""The planner: exact expectations, bytes by link, constants that follow from what is published."""

import itertools
from typing import Any, cast

import pytest
import torch

from moebius import Config, ConfigError, plan
from moebius.bench import published
from moebius.bench.plan import Machine, plan_report, print_plan
from moebius.bench.routing_trace import RoutingTrace
from moebius.bench.topology import Topology, Visits, half_load, hit_chance, traced_visits, uniform_visits
from moebius.bench.workload import count_rows

DECODE = Config(num_experts=256, num_topk=8, hidden=7168, max_num_tokens=128, payload="fp8_e4m3")


def topology(num_ranks: int, per_node: int = 8) -> Topology:
    return Topology.of(num_ranks, per_node, 400.0, 450.0)


def report(config: Config, only: list[int] | None = None, machine: Machine | None = None) -> dict[str, Any]:
    return cast("dict[str, Any]", plan_report(config, only, machine))


def test_a_token_meets_as_many_ranks_and_nodes_as_counting_all_sets_says() -> None:
    experts, topk, place = 12, 3, topology(6, 2)
    sets = list(itertools.combinations(range(experts), topk))
    visits = uniform_visits(experts, topk, place)
    assert visits.ranks_a_token == pytest.approx(sum(len({e // 2 for e in one}) for one in sets) / len(sets))
    assert visits.nodes_a_token == pytest.approx(sum(len({e // 4 for e in one}) for one in sets) / len(sets))
    assert float(visits.choices.sum()) == pytest.approx(topk)
    # Every set once is uniform routing.
    counted = traced_visits([torch.tensor(sets, dtype=torch.int32)], experts, place)
    for exact, found in zip(visits, counted, strict=True):
        torch.testing.assert_close(torch.as_tensor(exact), torch.as_tensor(found), check_dtype=False)


def test_the_share_of_one_holder_is_exact() -> None:
    assert hit_chance(256, 256, 8) == 1
    assert hit_chance(4, 1, 1) == pytest.approx(1 / 4)
    assert 8 * float(hit_chance(256, 32, 8)) == pytest.approx(5.2947, abs=1e-4)


def test_memory_of_ep256_stays_below_its_limit() -> None:
    assert plan(DECODE, 256, 8).heap_bytes <= 550_000_000
    assert plan(DECODE, 8, 8) == plan(DECODE, 8)
    names = [name for name, _ in plan(DECODE, 16, 8).regions]
    assert names[-1] == "outbox"


def test_ep8_to_ep2048() -> None:
    wide = Config(num_experts=2048, num_topk=8, hidden=7168, max_num_tokens=128, payload="fp8_e4m3")
    rows = report(wide)["plan"]
    assert [row["ranks"] for row in rows] == [2**i for i in range(12)]
    for row in rows:
        for load in row["halves"].values():
            assert load["nic_requests"] == max(0, row["ranks"] - 8)
            assert (load["nic_bytes"] > 0) == (row["ranks"] > 8)
            assert load["bound_us"] <= load["estimate_us"] or row["ranks"] == 1


def test_bytes_of_uniform_routing_match_counted_rounds() -> None:
    place, tokens, topk, experts = topology(8, 2), 256, 4, 32
    ids = [torch.rand(tokens, experts).topk(topk).indices.int() for _ in range(place.num_ranks)]
    away = sum(row.sent_away for row in count_rows(ids, experts)) / place.num_ranks
    load = half_load(uniform_visits(experts, topk, place).ranks, tokens, place, (1, 1), puts=False)
    signals = 8 * (place.num_ranks - 1)
    assert load.nvlink.mean + load.nic.mean - signals == pytest.approx(away, rel=0.05)
    assert load.nic.busiest == pytest.approx(load.nic.mean)


def test_the_busiest_rank_decides_the_bound() -> None:
    # All tokens go to rank 3, on the second of two nodes.
    shares = torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    load = half_load(shares, 10, topology(4, 2), (100, 1000), puts=False)
    assert load.nvlink.busiest == 10 * 1 * 100 + 8  # from its one neighbour
    assert load.nic.busiest == 10 * 2 * 1000 + 16  # from both ranks of the other node
    assert load.nic.mean == pytest.approx(10 * 2 * 1000 / 4 + 16)


def test_a_recorded_trace_takes_the_place_of_uniform_routing() -> None:
    skewed = torch.tensor([[0, 1], [0, 1], [0, 2], [0, -1]], dtype=torch.int32)
    config = Config(num_experts=8, num_topk=2, hidden=128, max_num_tokens=4)
    trace = RoutingTrace(8, 2, (skewed,))
    (row,) = report(config, [4], Machine(per_node=2, trace=trace))["plan"]
    assert row["ranks_a_token"] == pytest.approx((1 + 1 + 2 + 1) / 4)
    assert row["nodes_a_token"] == pytest.approx(1)
    uniform = report(config, [4], Machine(per_node=2))["plan"][0]["halves"]["dispatch"]
    assert row["halves"]["dispatch"]["nic_bytes_busiest"] > uniform["nic_bytes_busiest"]


def test_weights_at_combine_cost_a_request_a_row() -> None:
    config = Config(num_experts=32, num_topk=4, hidden=128, max_num_tokens=16, weights_at="combine")
    (row,) = report(config, [16])["plan"]
    assert row["halves"]["dispatch"]["nic_requests"] == 8
    assert row["halves"]["combine"]["nic_requests"] == pytest.approx(8 + 16 * 4 / 2)


def test_constants_follow_from_what_is_published() -> None:
    # By hand: 24.8 us + 0.400 us a token of 7 x 14336 bytes, 251 of 450 GB/s.
    assert published.nvlink().fixed_us == pytest.approx(24.8, rel=0.05)
    assert published.nvlink().efficiency == pytest.approx(251 / 450, rel=0.05)
    for link in (published.nvlink(), published.nic()):
        assert link.worst < 0.1
        assert 0 < link.efficiency < 1
        assert link.us(0, 50.0) == 0
    assert "DeepEP" in published.nic().origin


def test_figures_of_peers_are_shown_for_their_shape_only(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(DECODE, [16])
    assert {one["source"] for one in found["published"]} >= {"DeepEP V1, docs/legacy.md", "MoRI, README"}
    print_plan(found)
    assert "118 / 195" in capsys.readouterr().out
    other = Config(num_experts=256, num_topk=8, hidden=4096, max_num_tokens=128, payload="fp8_e4m3")
    assert report(other, [16])["published"] == []
    print_plan(report(other, [16]))
    assert "No figure of a peer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("per_node", "nic", "nvlink"), [(0, 400.0, 450.0), (8, 0.0, 450.0), (8, 400.0, float("nan")), (3, 400.0, 450.0)]
)
def test_impossible_clusters_are_refused(per_node: int, nic: float, nvlink: float) -> None:
    with pytest.raises(ConfigError):
        Topology.of(16, per_node, nic, nvlink)


def test_visits_are_means_over_tokens() -> None:
    layers = [torch.tensor([[0], [0]], dtype=torch.int32), torch.tensor([[1], [3]], dtype=torch.int32)]
    visits: Visits = traced_visits(layers, 4, topology(4, 2))
    assert visits.ranks.tolist() == [[1, 0, 0, 0], [0, 0.5, 0, 0.5]]
    assert visits.nodes_a_token == 1
