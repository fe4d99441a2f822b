"""Routing generators, row counts, bytes to move."""

import dataclasses

import pytest
import torch

from moebius.bench.baseline import dequantise_fp8, message_bytes, quantise_fp8
from moebius.bench.bound import bound_stats, combine_traffic, dispatch_traffic, inbox_bytes, round_traffic
from moebius.bench.moe_layer import Router, WholeLayer, step_input, tolerance, worst_error
from moebius.bench.ranks import num_cores
from moebius.bench.wire import gloo_wire, per_expert_wire
from moebius.bench.workload import ROUTINGS, RowCounts, Workload, count_rows, mean_rows, payload_row_bytes, route

SMALL = Workload(ranks=2, experts=16, topk=4, hidden=128, tokens=32)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routing_is_seeded_distinct_and_weighted_to_one(routing: str) -> None:
    workload = dataclasses.replace(SMALL, routing=routing)
    ids, weights = route(workload, rank=1, step=3)
    again, same_weights = route(workload, rank=1, step=3)
    assert torch.equal(ids, again)
    assert torch.equal(weights, same_weights)
    assert (ids.shape, ids.dtype, weights.dtype) == ((32, 4), torch.int32, torch.float32)
    assert ids.min() >= 0
    assert ids.max() < 16
    assert all(len(set(row)) == 4 for row in ids.tolist())
    torch.testing.assert_close(weights.sum(1), torch.ones(32))
    for other in (
        route(workload, rank=0, step=3),
        route(workload, rank=1, step=4),
        route(dataclasses.replace(workload, seed=1), rank=1, step=3),
    ):
        assert not torch.equal(ids, other[0])


def load(routing: str) -> list[int]:
    """Tokens of each expert, most first."""
    workload = dataclasses.replace(SMALL, routing=routing, tokens=1000)
    counts = torch.bincount(route(workload, 0, 0)[0].flatten(), minlength=16)
    return sorted(counts.tolist(), reverse=True)


def test_routings_differ_as_their_names_say() -> None:
    uniform, zipf, hot = load("uniform"), load("zipf"), load("hot")
    assert uniform[0] < 1.3 * uniform[-1]
    assert zipf[0] > 3 * zipf[-1]
    assert hot[0] == 1000  # one expert is in the choices of every token
    assert hot[1] < 1.4 * hot[-1]


def test_rows_are_counted_once_per_rank_and_expert() -> None:
    # Two ranks, experts 0 and 1 on the first. Token 0 stays, token 1 goes to both, token 2 names an expert twice.
    first = torch.tensor([[0, 1], [1, 2], [3, 3]])
    second = torch.tensor([[-1, -1], [0, -1]])
    rows = count_rows([first, second], num_experts=4)
    assert rows[0] == RowCounts(tokens=3, sent=4, sent_away=2, received=3, received_away=1, pairs=4, pairs_away=1)
    assert rows[1] == RowCounts(tokens=2, sent=1, sent_away=1, received=2, received_away=2, pairs=2, pairs_away=2)
    assert mean_rows([rows, rows]) == rows


ROWS = RowCounts(tokens=64, sent=120, sent_away=60, received=100, received_away=50, pairs=500, pairs_away=250)


def test_traffic_by_hand_token_major() -> None:
    config = Workload(ranks=2, layout="token_major").config()  # 2048 bf16: rows of 4096 bytes
    dispatch, combine = round_traffic(ROWS, config)
    assert dispatch.moved == (64 + 120) * 4096
    assert dispatch.copied == dispatch.moved // 2
    assert dispatch.copied_away == dispatch.copied // 2  # 60 of 120 written rows are another rank's
    assert combine.moved == (100 + 100 + 120 + 64) * 4096
    assert combine.copied_away == round(combine.moved / 2 * 50 / 164)


def test_traffic_by_hand_expert_major() -> None:
    config = Workload(ranks=2, layout="expert_major", payload="fp8_e4m3").config()
    assert payload_row_bytes(config) == 2048 + 4 * 16
    assert dispatch_traffic(ROWS, config).moved == (64 + 120 + 2 * 500) * 2112
    assert combine_traffic(ROWS, config).moved == (500 + 100 + 120 + 64) * 4096  # rows come home as bf16


def test_the_bound_shares_cores_among_ranks() -> None:
    copies = [(0, 10_000, 10_000, 30_000)]
    ranks = 3 * num_cores()
    assert bound_stats([copies])["round"].p50_us == 30.0
    assert bound_stats([copies] * ranks)["combine"].p50_us == 60.0


def test_inbox_holds_the_worst_routing() -> None:
    for layout in ("token_major", "expert_major"):
        workload = dataclasses.replace(SMALL, layout=layout, routing="hot")
        rows = count_rows([route(workload, rank, 0)[0] for rank in range(2)], 16)
        config = workload.config()
        assert all(one.copied <= inbox_bytes(config, 2) for row in rows for one in round_traffic(row, config))


def test_wire_by_hand() -> None:
    config = Workload(ranks=2).config()
    assert message_bytes(config) == 4096 + 8 * 8
    wire = gloo_wire([ROWS, ROWS], config, message_bytes(config))
    assert (wire.dispatch, wire.combine) == (60 * 4160 + 8, 50 * 4096)
    wire = per_expert_wire([ROWS, ROWS], config)
    assert (wire.dispatch, wire.combine) == (250 * (4096 + 16), 250 * 4096)


def test_fp8_round_trip() -> None:
    x = torch.randn(5, 256)
    x[2, :128] = 0.0
    quantised, scales = quantise_fp8(x)
    assert (quantised.dtype, scales.shape) == (torch.float8_e4m3fn, (5, 2))
    assert quantised.float().abs().max() == 448.0
    # 0.59765625 * (448 / 3.9375) is 68: a tie between 64 and 72.
    tie = torch.tensor([[0.59765625, 3.9375] + [0.0] * 126])
    assert quantise_fp8(tie)[0].float()[0, :2].tolist() == [64.0, 448.0]
    torch.testing.assert_close(dequantise_fp8(quantised, scales, torch.float32), x, rtol=1 / 16, atol=1e-2)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_router_does_not_depend_on_the_batch(routing: str) -> None:
    workload = dataclasses.replace(SMALL, hidden=1024, tokens=64, routing=routing)
    router, x = Router(workload), step_input(workload, 0, 0)
    ids, weights = router(x)
    for first, last in ((0, 1), (3, 20), (63, 64)):
        some_ids, some_weights = router(x[first:last].clone())
        assert torch.equal(some_ids, ids[first:last])
        torch.testing.assert_close(some_weights, weights[first:last])
    if routing == "hot":
        assert any((ids == expert).any(1).all() for expert in range(16))


def test_the_check_sees_a_misplaced_row() -> None:
    layer = WholeLayer(SMALL, intermediate=16)
    expected = layer.expect(0)
    y, scale = expected.y[0], expected.scale[0]
    limit = tolerance(layer.config)
    assert worst_error(y.bfloat16(), y, scale) <= limit / 3
    assert worst_error(y.roll(1, 0), y, scale) > 10 * limit
    y_nan = y.clone()
    y_nan[3, 5] = torch.nan
    assert worst_error(y_nan, y, scale) > limit
