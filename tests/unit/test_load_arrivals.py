"""Arrival processes: seeded, with the mean and the spread that they promise; recorded ones replayed."""

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest

from moebius import ConfigError
from moebius.bench.load_arrivals import Arrivals, Request, read_trace

RATE, SECONDS = 500.0, 60.0
TRACE = (Request(2.0, 10, 3), Request(2.5, 20, 4), Request(4.0, 30, 5))


def intervals(requests: tuple[Request, ...]) -> list[float]:
    return [later.t - earlier.t for earlier, later in itertools.pairwise(requests)]


def variation(values: list[float]) -> float:
    return statistics.pstdev(values) / statistics.fmean(values)


@pytest.mark.parametrize("process", ["poisson", "bursty", "on-off"])
def test_the_mean_rate_and_length_are_as_asked(process: str) -> None:
    requests = Arrivals(process=process, output=8.0, seed=3).draw(RATE, SECONDS, 1)
    assert len(requests) == pytest.approx(RATE * SECONDS, rel=0.1)
    assert statistics.fmean(one.output for one in requests) == pytest.approx(8.0, rel=0.05)
    assert min(one.output for one in requests) == 1
    times = [one.t for one in requests]
    assert times == sorted(times)
    assert 0.0 <= times[0] <= times[-1] < SECONDS


@pytest.mark.parametrize(
    ("process", "burstiness"), [("poisson", 0.25), ("bursty", 1.0), ("bursty", 0.25), ("bursty", 4.0)]
)
def test_the_spread_of_the_intervals_is_that_of_the_gamma_distribution(process: str, burstiness: float) -> None:
    spread = variation(intervals(Arrivals(process=process, burstiness=burstiness).draw(RATE, SECONDS, 0)))
    assert spread == pytest.approx(1.0 if process == "poisson" else 1.0 / math.sqrt(burstiness), rel=0.06)


def test_on_off_has_silences_and_a_higher_rate_between_them() -> None:
    arrivals = Arrivals(process="on-off", on_s=0.2, off_s=0.6)
    gaps = intervals(arrivals.draw(RATE, SECONDS, 0))
    assert statistics.median(gaps) == pytest.approx(math.log(2.0) / (4.0 * RATE), rel=0.1)
    assert statistics.fmean(gap for gap in gaps if gap > 0.05) == pytest.approx(0.6, rel=0.3)
    assert variation(gaps) > 3.0


def test_the_same_key_gives_the_same_requests() -> None:
    arrivals = Arrivals(seed=5)
    assert arrivals.draw(RATE, 1.0, 2, 3) == arrivals.draw(RATE, 1.0, 2, 3)
    assert arrivals.draw(RATE, 1.0, 2, 3) != arrivals.draw(RATE, 1.0, 2, 4)
    assert arrivals.draw(RATE, 1.0, 2) != Arrivals(seed=6).draw(RATE, 1.0, 2)


def test_a_trace_is_replayed_as_it_was_and_again() -> None:
    arrivals = Arrivals(process="replay", trace=TRACE)
    assert arrivals.own_rate == pytest.approx(1.0)
    assert arrivals.mean_output == 4.0
    requests = arrivals.draw(1.0, 5.0, 0)
    assert [(one.t, one.prompt, one.output) for one in requests] == [
        (0.0, 10, 3), (0.5, 20, 4), (2.0, 30, 5), (3.0, 10, 3), (3.5, 20, 4)
    ]  # fmt: skip
    assert [one.t for one in arrivals.draw(10.0, 0.31, 0)] == pytest.approx([0.0, 0.05, 0.2, 0.3])


def test_a_trace_is_read_in_the_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        "\n".join(json.dumps({"t": one.t, "prompt": one.prompt, "output": one.output}) for one in TRACE[::-1])
    )
    assert read_trace(path) == TRACE


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"t": 0, "prompt": 1, "output": 1}\nno', "line 2: not a request"),
        ('{"t": 0, "prompt": 1, "output": 0}', "`output` at least 1"),
        ('{"t": 0, "prompt": 1}', "line 1: not a request"),
        ('{"t": 0, "output": 1}', "at least 2 requests"),
        ("[]", "line 1: not a request"),
    ],
)
def test_a_broken_trace_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_trace(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(tmp_path / "none")
