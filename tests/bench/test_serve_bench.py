"""What is made of the runs of `vllm bench serve`, and the report of it; servers are in the tests with vLLM."""

import re
from pathlib import Path
from typing import Any

import pytest

from moebius.bench import serve_bench
from moebius.bench.cli import main
from moebius.bench.machine import provenance
from moebius.bench.serve_report import write_report
from moebius.bench.timing import summarise

RUN = {
    "ttfts": [0.010, 0.030, 0.5],
    "itls": [[0.002, 0.004], [0.006], []],
    "errors": ["", "", "refused"],
}


def test_samples_are_of_requests_that_succeeded() -> None:
    found = serve_bench.samples_ms(RUN)
    assert found["ttft"] == pytest.approx([10, 30])
    assert found["itl"] == pytest.approx([2, 4, 6])
    assert found["tpot"] == pytest.approx([3, 6])
    assert found["e2el"] == pytest.approx([16, 36])
    assert serve_bench.bunched(found) == 0
    assert serve_bench.percentiles_ms(found)["itl"] == pytest.approx({"p50": 4, "p90": 6, "p99": 6})


def runs(gloo_ms: list[float], ours_ms: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "pair": pair,
            "side": side,
            "load_1min": 0.1,
            "bunched": 0.25,
            "completed": 3,
            "failed": 0,
            "output_tokens_s": 100.0,
            "percentiles_ms": {metric: {"p50": p50, "p90": p50, "p99": p50} for metric in serve_bench.METRICS},
        }
        for pair, both in enumerate(zip(ours_ms, gloo_ms, strict=True))
        for side, p50 in zip(("moebius", "gloo"), both, strict=True)
    ]


def test_pairs_are_compared_by_their_medians() -> None:
    found = serve_bench.compare(runs([12.0, 9.0, 20.0], [10.0, 10.0, 10.0]))
    assert [pair["ratio"] for pair in found["pairs"]] == [1.2, 0.9, 2.0]
    assert found["median_ratio"] == 1.2
    assert found["pairs_not_worse"] == 2


def test_a_median_of_tokens_that_were_read_together_is_not_compared() -> None:
    found = serve_bench.compare(runs([12.0, 0.003, 20.0], [10.0, 10.0, 10.0]))
    assert [pair["ratio"] for pair in found["pairs"]] == [1.2, None, 2.0]
    assert (found["median_ratio"], found["pairs_not_worse"], found["pairs_compared"]) == (1.6, 2, 2)
    found = serve_bench.compare(runs([12.0], [0.002]))
    assert (found["median_ratio"], found["pairs_not_worse"], found["pairs_compared"]) == (None, 0, 0)


def result_of(told: list[dict[str, Any]]) -> dict[str, Any]:
    curves = {metric: summarise([1000.0, 2000.0, 3000.0]).to_json() for metric in serve_bench.METRICS}
    return {
        **provenance(),
        "method": serve_bench.METHOD,
        "settings": {"ranks": 2, "requests": 3, "rate": 8.0, "input_len": 32, "output_len": 32},
        "runs": told,
        "comparison": {metric: serve_bench.compare(told, metric) for metric in serve_bench.METRICS},
        "all_runs": {"moebius": curves, "gloo": curves},
    }


def test_the_report_is_one_file_that_says_the_figures(tmp_path: Path) -> None:
    result = result_of(runs([12.0, 9.0, 20.0], [10.0, 10.0, 10.0]))
    path = tmp_path / "deep" / "serve.html"
    write_report(path, result)
    text = path.read_text()
    assert "1.20 times faster than over gloo" in text
    assert "read up to 25% of the tokens" in text
    assert text.count("<tr><td>") == 4 + 6
    assert not re.search(r'(src|href)="', text)


def test_the_report_where_nothing_could_be_compared(tmp_path: Path) -> None:
    write_report(tmp_path / "serve.html", result_of(runs([0.002], [10.0])))
    assert "no time per token was measured" in (tmp_path / "serve.html").read_text()


def test_the_command_that_is_kept_has_no_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["moebius", "serve-bench", "/home/me/model", "--json", "a/b.json", "--rate", "2"])
    assert provenance()["command"] == "python -m moebius serve-bench model --json a/b.json --rate 2"


def test_the_command_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve-bench", "--help"])
    assert "--pairs" in capsys.readouterr().out
