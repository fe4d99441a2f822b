"""The pure parts of the CUDA benchmarks: bytes, fits, schedules over a fake clock, rows, traces, the state of a GPU."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.bench.cuda import gpu
from moebius.bench.cuda.devices import HostDevice
from moebius.bench.cuda.fit import two_terms
from moebius.bench.cuda.hbm import CopyBound
from moebius.bench.cuda.measure import Measured, schedules_of
from moebius.bench.cuda.report import render
from moebius.bench.cuda.rows import COLUMNS, fits, point_rows, slowest
from moebius.bench.cuda.schedules import (
    BLOCKING,
    BY_HALF,
    BY_OP,
    CHAINED,
    CHAINED_DISPATCH,
    HALVES,
    LOCKSTEP,
    OPS,
    Schedule,
    eager_samples,
    graph_samples,
    play,
)
from moebius.bench.cuda.suites import Point, counts, decode_suite, smoke_suite, sms_budgets, sweep_points
from moebius.bench.cuda.tables import cell, goals
from moebius.bench.cuda.trace import hook_gaps, read_kernels, verdict
from moebius.bench.cuda.traffic import half_bytes
from moebius.bench.workload import RowCounts, Workload, count_rows, route

BASE = Workload(ranks=8, experts=256, topk=8, hidden=7168, tokens=128)


class Recorder:
    """An exchange that notes its steps and takes as long as it is told, on a clock of its own."""

    def __init__(self, costs: dict[str, int]) -> None:
        self.now, self.costs = 0, costs
        self.steps: list[tuple[int, str, int]] = []

    def clock(self) -> int:
        return self.now

    def step(self, lane: int, half: str, number: int) -> None:
        self.steps.append((lane, half, number))
        self.now += self.costs[half]


COSTS = dict(zip(HALVES, (1000, 2000, 3000, 4000), strict=True))


@pytest.mark.parametrize("schedule", [CHAINED, LOCKSTEP, BY_OP, BY_HALF], ids=lambda schedule: schedule.name)
def test_all_sends_come_before_any_receive(schedule: Schedule) -> None:
    exchange = Recorder(COSTS)
    play(HostDevice(3, exchange.clock), exchange, schedule, 2)
    assert exchange.steps == [(lane, half, number) for number in (0, 1) for half in HALVES for lane in range(3)]


def test_a_round_is_the_mean_of_a_chain() -> None:
    exchange = Recorder(COSTS)
    device = HostDevice(2, exchange.clock)
    for schedule in (CHAINED, LOCKSTEP):
        assert graph_samples(device, exchange, schedule, rounds=5, replays=3) == {"round": [20.0] * 3}
        assert eager_samples(device, exchange, schedule, rounds=5, repeats=2) == {"round": [20.0] * 2}


def test_dispatch_is_chained_alone() -> None:
    exchange = Recorder(COSTS)
    device = HostDevice(2, exchange.clock)
    assert graph_samples(device, exchange, CHAINED_DISPATCH, rounds=5, replays=3) == {"dispatch": [6.0] * 3}
    assert {half for _, half, _ in exchange.steps} == set(OPS["dispatch"])


def test_blocking_calls_are_chained() -> None:
    exchange = Recorder({"dispatch": 3000, "combine": 7000})
    device = HostDevice(2, exchange.clock)
    assert eager_samples(device, exchange, BLOCKING, rounds=5, repeats=2) == {"round": [20.0] * 2}
    assert [half for _, half, _ in exchange.steps[:4]] == ["dispatch", "dispatch", "combine", "combine"]


def test_stamps_tell_operations_and_halves_apart() -> None:
    exchange = Recorder(COSTS)
    device = HostDevice(2, exchange.clock)
    assert graph_samples(device, exchange, BY_OP, rounds=2, replays=2) == {"dispatch": [6.0] * 4, "combine": [14.0] * 4}
    found = eager_samples(device, exchange, BY_HALF, rounds=3, repeats=1)
    assert found == {half: [2 * COSTS[half] / 1e3] * 3 for half in HALVES}


def test_bytes_of_a_routing_counted_by_hand() -> None:
    # Two ranks, two experts each. Rank 0: a token to both experts of rank 0, one to one expert of each rank.
    # Rank 1: a token that goes nowhere, one to both experts of rank 1.
    ids = [torch.tensor([[0, 1], [1, 2]]), torch.tensor([[-1, -1], [2, 3]])]
    rows = count_rows(ids, 4)
    work = Workload(ranks=2, experts=4, topk=2, hidden=128, tokens=2, layout="expert_major", payload="bf16")
    row, fp8 = 256, 128 + 4
    found = half_bytes(rows, work.config())
    assert found["dispatch_send"] == 4 * row + 4 * row  # 4 tokens; 2 + 1 + 0 + 1 messages
    assert found["dispatch_recv"] == 4 * row + 6 * row  # 6 pairs
    assert found["combine_send"] == 6 * row + 4 * row
    assert found["combine_recv"] == 4 * row + 4 * row
    assert found["round"] == sum(found[half] for half in HALVES) == found["dispatch"] + found["combine"]
    by_token = half_bytes(rows, dataclasses.replace(work, layout="token_major", payload="fp8_e4m3").config())
    assert by_token["dispatch_send"] == 4 * row + 4 * fp8  # x is read as bf16
    assert by_token["dispatch_recv"] == 4 * fp8 + 4 * fp8
    assert by_token["combine_send"] == 4 * row + 4 * row


def test_bytes_of_the_shape_that_the_engine_is_judged_by() -> None:
    rows = count_rows([route(BASE, rank, 0)[0] for rank in range(8)], 256)
    moved = half_bytes(rows, dataclasses.replace(BASE, payload="bf16", layout="expert_major").config())
    assert sum(row.pairs for row in rows) == 8 * 128 * 8
    # A token reaches 8 * (1 - (7/8)^8) = 5.25 ranks of 8 on average.
    assert sum(row.sent for row in rows) == pytest.approx(5.25 * 1024, rel=0.02)
    assert moved["dispatch"] == pytest.approx(14336 * 1024 * (1 + 5.25 + 5.25 + 8), rel=0.02)
    assert moved["combine"] == pytest.approx(moved["dispatch"], rel=0.02)


def test_the_fit_finds_both_terms() -> None:
    tokens = [1, 2, 4, 8, 64, 512]
    fit = two_terms(tokens, [12.0 + 0.25 * t for t in tokens])
    assert fit is not None
    assert fit.fixed_us == pytest.approx(12.0)
    assert fit.slope_us == pytest.approx(0.25)
    assert fit.worst < 1e-6
    off = two_terms(tokens, [(12.0 + 0.25 * t) * (1.1 if t == 8 else 1.0) for t in tokens])
    assert off is not None
    assert 0.02 < off.worst < 0.1


def test_no_fit_of_too_few_sizes() -> None:
    assert two_terms([1, 1, 1, 2], [1.0, 1.0, 1.0, 2.0]) is None
    assert two_terms([1, 2, 3], [1.0, 0.0, 2.0]) is None


def test_budgets_go_from_four_to_all() -> None:
    assert sms_budgets(132) == [4, 8, 16, 32, 64, 128, 132]
    assert sms_budgets(16) == [4, 8, 16]
    assert sms_budgets(2) == [2]


@pytest.mark.parametrize(("ranks_there", "budgets"), [(8, [4, 8, 16]), (1, [4, 8, 16, 32, 64, 128, 132])])
def test_the_decode_suite_has_all_that_it_is_judged_by(ranks_there: int, budgets: list[int]) -> None:
    points = decode_suite(BASE, 132, ranks_there)
    shapes = {(p.section, p.workload.tokens, p.workload.payload, p.workload.layout, p.workload.ranks) for p in points}
    for payload in ("bf16", "fp8_e4m3"):
        assert {("decode", 1, payload, "expert_major", 8), ("decode", 128, payload, "expert_major", 8)} <= shapes
        assert ("prefill", 8192, payload, "token_major", 8) in shapes
        for ranks, expected in ((8, budgets), (1, sms_budgets(132))):
            sms = [
                p.num_sms
                for p in points
                if (p.section, p.workload.ranks, p.workload.payload) == ("sms", ranks, payload)
            ]
            assert sms == expected
    for point in (*points, *smoke_suite(BASE, 132, 8)):
        point.workload.config()
        assert point.workload.max_num_tokens >= point.workload.tokens


def test_a_sweep_is_a_product() -> None:
    points = sweep_points(BASE, {"tokens": [1, 2], "payload": ["bf16"]}, [0, 4])
    assert [(p.workload.tokens, p.num_sms) for p in points] == [(1, 0), (1, 4), (2, 0), (2, 4)]
    assert points[0].sms(132, 8) == 16
    assert points[1].sms(132, 8) == 4


def test_kernels_that_do_not_fit_together_never_wait_for_each_other() -> None:
    assert schedules_of(Point("decode", BASE), False) == (LOCKSTEP, BY_HALF)
    assert schedules_of(Point("sms", BASE), False) == (LOCKSTEP, BY_HALF)
    assert CHAINED in schedules_of(Point("sms", BASE), True)
    assert {CHAINED, BLOCKING} <= set(schedules_of(Point("decode", BASE), True))


def test_counts_fit_the_queue_and_depend_on_nothing_measured() -> None:
    for moved, lanes in itertools.product((0, 10**6, 6 * 10**8, 2 * 10**10), (1, 8, 32)):
        many = counts(moved, lanes, 0.2)
        assert many == counts(moved, lanes, 0.2)
        assert 2 <= many.rounds <= 20
        assert 8 <= many.replays <= 100
        assert many.eager_rounds * lanes * 8 <= 1024


def measured(scale: float = 1.0, *, with_torch: bool = True) -> Measured:
    samples = {
        ("moebius", "graph", "chained", "round"): [10.0 * scale, 11.0 * scale, 12.0 * scale],
        ("moebius", "graph", "by_op", "dispatch"): [6.0 * scale] * 3,
        ("moebius", "graph", "by_op", "combine"): [7.0 * scale] * 3,
        ("moebius", "graph", "chained", "dispatch"): [5.0 * scale] * 3,
    }
    if with_torch:
        samples |= {("torch", "graph", "lockstep", "round"): [44.0, 44.0]}
        samples |= {("torch", "graph", "by_half", half): [5.0, 7.0] for half in HALVES}
    moved = dict.fromkeys((*HALVES, "dispatch", "combine", "round"), 4000)
    return Measured(samples, moved, 16, [])


def test_rows_stand_beside_their_baseline() -> None:
    first, second, *_ = point_rows(Point("decode", BASE), [measured()], None)
    assert set(COLUMNS) <= first.keys()
    assert (first["op"], first["p50_us"], first["baseline_p50_us"], first["speedup"]) == ("round", 11.0, 20.0, 1.818)
    assert (second["op"], second["baseline_p50_us"]) == ("dispatch", 10.0)  # both halves of each round, added
    assert first["bound_us"] is None
    assert first["gbps"] == round(4000 / 11.0 / 1e3, 1)
    bound = CopyBound(HostDevice(1))
    row = point_rows(Point("decode", BASE), [measured(with_torch=False)], bound)[0]
    assert row["times_bound"] == pytest.approx(11.0 / row["bound_us"], rel=1e-3)
    assert row["baseline_p50_us"] is None


def test_a_sample_of_processes_is_the_slowest() -> None:
    merged = slowest([measured(1.0), measured(3.0)])
    assert merged["moebius", "graph", "chained", "round"] == [30.0, 33.0, 36.0]


def test_fits_keep_shapes_apart() -> None:
    rows = []
    for tokens, payload in itertools.product((1, 8, 64), ("bf16", "fp8_e4m3")):
        work = dataclasses.replace(BASE, tokens=tokens, payload=payload)
        rows += point_rows(Point("decode", work), [measured(1.0 + tokens)], None)
    found = fits(rows)
    assert {(fit["op"], fit["dtype"]) for fit in found} == {
        (op, dtype) for op in ("round", "dispatch", "combine") for dtype in ("bf16", "fp8_e4m3")
    }
    one = next(fit for fit in found if fit["op"] == "round")
    assert (one["fixed_us"], one["slope_us"], one["bound_slope_us"]) == (pytest.approx(11.0), pytest.approx(11.0), None)


def trace(*kernels: tuple[str, int, float, float]) -> dict[str, Any]:
    events = [
        {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": {"stream": stream}}
        for name, stream, ts, dur in kernels
    ]
    return {"traceEvents": [*events, {"ph": "X", "cat": "cpu_op", "name": "mm", "ts": 0, "dur": 1}]}


SEND, RECEIVE = "void moebius::cuda::dispatch_send_kernel<1>(P)", "moebius::cuda::dispatch_recv_kernel(P)"


def test_a_gap_without_us_is_clean() -> None:
    kernels = read_kernels(
        trace((SEND, 7, 0, 5), ("gemm", 7, 6, 20), ("gemm", 7, 27, 10), (RECEIVE, 7, 37, 4), (SEND, 9, 20, 3))
    )
    (gap,) = hook_gaps(kernels)
    assert (gap.stream, gap.before, gap.after) == (7, SEND, RECEIVE)
    assert (gap.idle_us, gap.compute_us, gap.num_compute, gap.overlap_us) == (32.0, 30.0, 2, 0.0)
    assert verdict([gap], kernels)["clean"]


def test_a_half_that_runs_into_a_gap_is_seen() -> None:
    kernels = read_kernels(trace((SEND, 7, 0, 9), ("gemm", 7, 6, 20), (RECEIVE, 7, 24, 4)))
    (gap,) = hook_gaps(kernels)
    assert gap.overlap_us == 3.0 + 2.0
    assert not verdict([gap], kernels)["clean"]
    assert not verdict([], kernels)["clean"]  # nothing seen is no proof


def test_the_state_of_a_gpu_is_read_by_its_fields() -> None:
    line = "NVIDIA H200, 580.1, 1980, 3201, 1980, 300.5, 700.0, 40, P0, 1234"
    state = gpu.read_state(f"other, 1, 1, 1, 1, 1, 1, 1, P8, 0\n{line}\n", 1)
    assert (state["name"], state["driver"], state["sm_clock_mhz"], state["state"]) == (
        "NVIDIA H200",
        "580.1",
        "1980",
        "P0",
    )
    assert gpu.read_state("", 0) == gpu.read_state("No devices were found", 0) == {}


def result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    machine = {"cpu": "a & b", "cores": 2, "system": "Linux", "torch": "2", "python": "3", "moebius": "0"}
    halves = {name: {"p50_us": 2.0, "p99_us": 3.0, "samples": 9} for name in (*HALVES, "round")}
    return {
        "machine": machine, "commit": None, "command": "python -m moebius bench", "suite": "decode",
        "gpu": {"name": "<b>", "sms": 132, "stream_gbps": 4300.0, "torch_cuda": "13.0", "before": {}, "meanwhile": []},
        "ranks_are": "virtual", "method": "m", "rows": rows, "fits": fits(rows), "host_us": {"bf16": halves},
        "frame_us": {"8": 4.0}, "profile": {"gaps": [], "clean": False}, "errors": ["a <failure>"], "skipped": [],
        "seconds": 1.0,
    }  # fmt: skip


def test_goals_are_named_with_what_was_measured() -> None:
    rows = []
    for tokens in (1, 8, 128):
        rows += point_rows(
            Point("decode", dataclasses.replace(BASE, tokens=tokens, payload="bf16")), [measured()], None
        )
    last = {(row["schedule"], row["op"]): row for row in rows[-len(rows) // 3 :]}
    last["chained", "dispatch"] |= {"p50_us": 8.0, "times_bound": 1.6, "bound_us": 5.0}
    last["chained", "round"]["p50_us"] = 11.0
    last["by_op", "combine"]["bound_us"] = 2.5
    found = {one["what"]: one for one in goals(result(rows))}
    assert not found["dispatch, T=128, bf16, in a chain: times the bound"]["reached"]
    assert found["combine, T=128, bf16, the round less that: times the bound"]["value"] == 1.2
    assert found["round in a graph, T=1, bf16"]["value"] == 11.0
    assert found["host time of a round's two calls, bf16"]["reached"]


@pytest.mark.parametrize("has_rows", [True, False])
def test_the_page_loads_nothing_and_escapes(has_rows: bool) -> None:
    rows = []
    for section, tokens in itertools.product(("decode", "prefill", "sms", "sweep"), (1, 8, 64)):
        work = dataclasses.replace(BASE, tokens=tokens)
        rows += point_rows(Point(section, work), [measured()], None)
    page = render(result(rows if has_rows else []))
    assert "<b>" not in page.split("<h1>")[1].split("</h1>")[0]
    assert "a &lt;failure&gt;" in page
    assert not any(word in page for word in ("http://", "https://", "<script", "<link", "url("))


def test_cells() -> None:
    assert (cell(None), cell(3), cell(3.14159), cell("x")) == ("-", "3", "3.1", "x")


def test_nothing_here_needs_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps(trace()))
    assert read_kernels(json.loads(path.read_text())) == []
    assert half_bytes([RowCounts(0, 0, 0, 0, 0, 0)], BASE.config())["round"] == 0
