"""Percentiles and samples."""

import gc
import math

import pytest

from moebius.bench.timing import MIN_SAMPLES_P999, percentile, quiet_gc, slowest_us, summarise


@pytest.mark.parametrize(
    ("percent", "expected"),
    [(0.0, 1.0), (1.0, 1.0), (50.0, 50.0), (50.5, 51.0), (99.0, 99.0), (99.9, 100.0), (100.0, 100.0)],
)
def test_percentile_is_the_nearest_rank(percent: float, expected: float) -> None:
    assert percentile([float(value) for value in range(1, 101)], percent) == expected


def test_percentile_is_exact_where_binary_is_not() -> None:
    assert percentile([float(value) for value in range(1, 1001)], 99.9) == 999.0


def test_percentile_of_few_and_none() -> None:
    assert percentile([7.0], 99.9) == 7.0
    assert math.isnan(percentile([], 50.0))


def test_summary_sorts_and_hides_a_tail_it_cannot_know() -> None:
    stats = summarise(float(value) for value in reversed(range(1, MIN_SAMPLES_P999)))
    assert (stats.samples, stats.p50_us, stats.p999_us) == (999, 500.0, None)
    assert stats.percentiles["99.9"] == 999.0
    assert stats.curve_us[0] == 1.0
    assert stats.curve_us[-1] == 999.0
    assert stats.curve_us == sorted(stats.curve_us)
    assert summarise(float(value) for value in range(MIN_SAMPLES_P999)).p999_us == 998.0


def test_a_sample_is_the_slowest_rank_of_its_round() -> None:
    first = [(0, 1_000, 2_000, 5_000), (0, 4_000, 4_000, 4_500)]
    second = [(0, 3_000, 3_000, 4_000), (0, 1_000, 1_000, 1_500)]
    assert slowest_us([first, second], (0, 1)) == [3.0, 4.0]
    assert slowest_us([first, second], (0, 1), (2, 3)) == [4.0, 4.5]


def test_the_collector_is_off_inside_and_back_after() -> None:
    with quiet_gc():
        assert not gc.isenabled()
    assert gc.isenabled()
