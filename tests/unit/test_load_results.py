"""What records say: latencies from the scheduled arrival, the parts of a round, SLO and knee."""

from typing import Any

import pytest

from moebius.bench.load_arrivals import Request
from moebius.bench.load_rank import Leg, LegRecord
from moebius.bench.load_results import PARTS, Samples, Slo, find_knee, geometric, is_sustained

US = 1000
SLO = Slo(ttft_ms=5.0, tpot_ms=2.0)


def record(rank: int, num_steps: int, first: list[int], last: list[int], step_us: int = 1000) -> LegRecord:
    """Steps of one layer from 200 ms on, back to back; rank 1 calls dispatch 30 us later, and is as quick."""
    rows: list[tuple[int, ...]] = []
    ticks = []
    for step in range(num_steps):
        tick = (200_000 + step * step_us) * US
        dispatch = tick + (100 + 30 * rank) * US
        combine = tick + 500 * US
        end = tick + 900 * US
        rows.append((tick, tick + 10 * US, dispatch, tick + 200 * US, combine, combine + 50 * US, end))
        ticks.append(tick)
    return LegRecord(0, ticks, rows, [1] * num_steps, first, last)


def measure(requests: list[Request], num_steps: int, first: list[int], last: list[int]) -> Samples:
    samples = Samples()
    leg = Leg("moebius", tuple(requests), 1.0)
    samples.add(leg, [record(rank, num_steps, first, last) for rank in range(2)], SLO)
    return samples


def test_latency_counts_from_the_scheduled_arrival() -> None:
    # Scheduled at 200 ms, begun in the step of 204 ms, 3 tokens.
    samples = measure([Request(0.2, 0, 3)], 8, [4], [6])
    assert samples.queue == [4000.0]
    assert samples.ttft == [4900.0]
    assert samples.tpot == [1000.0]
    assert samples.good == 1
    assert samples.offered == 3
    assert sum(spent[0] for spent in samples.parts.values()) == pytest.approx(6900.0)
    assert samples.parts["queueing"] == [4000.0]
    assert samples.parts["wait for ranks"] == [pytest.approx(3 * 30.0)]
    assert samples.parts["communication"] == [pytest.approx(3 * 120.0)]
    assert samples.parts["compute"] == [pytest.approx(3 * (890.0 - 150.0))]


def test_a_round_begins_with_the_last_rank() -> None:
    samples = measure([Request(0.2, 0, 1)], 3, [0], [0])
    assert samples.round == [120.0] * 3
    assert samples.skew == [30.0] * 3
    assert samples.step == [900.0] * 3
    assert samples.served == 6


def test_who_was_cut_off_counts_with_what_it_waited() -> None:
    samples = measure([Request(0.25, 0, 4), Request(0.25, 0, 1), Request(0.2, 0, 50)], 8, [-1, 0, 0], [-1, 0, -1])
    assert max(samples.ttft) == 1e6  # 1.25 of the second it ran, less 0.25
    assert samples.unfinished == 2
    content = samples.to_json()
    assert content["requests"] == 3
    assert content["unfinished"] == 2
    assert content["good_share"] <= 0.3334


def test_the_first_fifth_is_not_counted() -> None:
    samples = measure([Request(0.19, 0, 1), Request(0.2, 0, 1)], 2, [0, 0], [0, 0])
    assert len(samples.ttft) == 1
    assert samples.seconds == pytest.approx(0.8)


def test_nothing_measured_is_said_without_nan() -> None:
    content = measure([], 0, [], []).to_json(with_curve=True)
    assert content["ttft"]["p99_us"] is None
    assert content["round"]["mean_us"] is None
    assert content["good_share"] is None
    assert content["parts_us"] == dict.fromkeys(PARTS, 0.0)
    assert not is_sustained({"rate": 1.0, **content}, SLO)


@pytest.mark.parametrize(
    ("ttft_ms", "tpot_ms", "is_met"),
    [(5.0, 2.0, True), (5.001, 1.0, False), (1.0, 2.001, False), (1.0, None, True), (6.0, None, False)],
)
def test_slo(ttft_ms: float, tpot_ms: float | None, is_met: bool) -> None:
    assert SLO.is_met(1e3 * ttft_ms, None if tpot_ms is None else 1e3 * tpot_ms) == is_met


def point(rate: float, p99_ms: float | None, share: float) -> dict[str, Any]:
    return {"rate": rate, "ttft": {"p99_us": None if p99_ms is None else 1e3 * p99_ms}, "throughput_share": share}


def test_the_knee_is_the_highest_rate_that_keeps_both_promises() -> None:
    points = [point(1.0, 1.0, 1.0), point(2.0, 2.0, 0.97), point(4.0, 4.9, 0.94), point(8.0, 90.0, 0.99)]
    assert find_knee(points, SLO) == 2.0
    assert find_knee(points[2:], SLO) is None
    assert find_knee([*points, point(16.0, 5.0, 0.95)], SLO) == 16.0
    assert find_knee([], SLO) is None


def test_rates_are_geometric() -> None:
    assert geometric(10.0, 160.0, 5) == [10.0, 20.0, 40.0, 80.0, 160.0]
    assert geometric(7.0, 7.0, 1) == [7.0]
