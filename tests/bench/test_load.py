"""`load` as a user types it, tiny; what its files say must agree with each other."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bench.test_cli import moebius, read

SHAPE = ("--tiny", "--seconds", "0.4", "--slo-ttft-ms", "5000", "--slo-tpot-ms", "5000", "--json", "load.json")


def check_point(point: dict[str, Any]) -> None:
    assert point["requests"] > 0
    assert 0 <= point["unfinished"] <= point["requests"]
    assert point["ttft"]["samples"] == point["queue"]["samples"] == point["requests"]
    assert point["round"]["samples"] == point["skew"]["samples"] >= point["steps"] > 0
    for name in ("ttft", "queue", "round", "step", "skew"):
        one = point[name]
        assert 0 <= one["p50_us"] <= one["p90_us"] <= one["p99_us"] <= one["max_us"]
    assert point["queue"]["p50_us"] <= point["ttft"]["p50_us"]
    assert point["goodput_per_s"] <= point["requests"] / 0.3
    assert all(length >= 0 for name, length in point["parts_us"].items() if name != "scheduling")


def test_both_sides_in_one_run(tmp_path: Path) -> None:
    text = moebius(tmp_path, "load", *SHAPE, "--rates", "40,100", "--arrivals", "bursty", "--payload", "fp8_e4m3")
    content = read(tmp_path / "load.json")
    assert content["kind"] == "load"
    assert "scheduled arrival" in content["method"]
    assert "coordinated omission" in text
    assert list(content["sides"]) == ["moebius", "gloo"]
    offered = []
    for side in content["sides"].values():
        assert [point["rate"] for point in side["points"]] == [40.0, 100.0]
        for point in side["points"]:
            check_point(point)
        held = [point["rate"] for point in side["points"] if point["is_sustained"]]
        assert side["knee_per_s"] == (max(held) if held else None)
        assert side["steady"]["rate"] == pytest.approx(0.7 * (side["knee_per_s"] or 40.0))
        assert len(side["steady"]["round"]["curve_us"]) > 2
        offered.append([point["offered_tokens_per_s"] for point in side["points"]])
    assert offered[0] == offered[1]  # the same requests
    page = (tmp_path / "moebius-report" / "load.html").read_text()
    assert not re.search(r"https?://|<script|<link|src=", page)
    assert "Report: moebius-report/load.html" in text


def test_recorded_arrivals_and_routings(tmp_path: Path) -> None:
    lines = [json.dumps({"t": 0.01 * i, "prompt": 5, "output": 1 + i % 7}) for i in range(30)]
    (tmp_path / "arrivals.jsonl").write_text("\n".join(lines))
    ids = torch.stack([torch.arange(50) % 12, (torch.arange(50) + 6) % 12, torch.full((50,), -1)], 1).short()
    trace = {"num_experts": 12, "num_topk": 3, "layers": {"model.layers.0": ids, "model.layers.1": ids.flip(0)}}
    torch.save(trace, tmp_path / "routing.pt")
    replay = ("--arrivals", "replay", "--arrival-trace", "arrivals.jsonl", "--routing-trace", "routing.pt")
    moebius(tmp_path, "load", *SHAPE, *replay, "--rates", "trace", "--layout", "token_major", "--sides", "moebius")
    content = read(tmp_path / "load.json")
    assert content["workload"]["experts"] == 12
    assert content["workload"]["topk"] == 3
    assert content["arrivals"]["trace_requests"] == 30
    (point,) = content["sides"]["moebius"]["points"]
    assert point["rate"] == pytest.approx(100.0)
    check_point(point)


def test_routings_are_replayed_in_bench(tmp_path: Path) -> None:
    ids = torch.stack([torch.arange(50) % 12, (torch.arange(50) + 6) % 12], 1).short()
    torch.save({"num_experts": 12, "num_topk": 2, "layers": {"a": ids}}, tmp_path / "routing.pt")
    moebius(
        tmp_path, "bench", "--tiny", "--layout", "expert_major", "--routing-trace", "routing.pt", "--json", "b.json"
    )
    rows = read(tmp_path / "b.json")["rows"]
    assert {(row["experts"], row["topk"], row["routing"]) for row in rows} == {(12, 2, "trace")}


def test_impossible_flags_are_refused_by_name(tmp_path: Path) -> None:
    assert "`--arrivals replay` and" in moebius(tmp_path, "load", "--tiny", "--arrivals", "replay", code=2)
    assert "`--rates trace` needs" in moebius(tmp_path, "load", "--tiny", "--rates", "trace", code=2)
    assert "`--layers` must be above 0" in moebius(tmp_path, "load", "--layers", "0", code=2)
    text = moebius(tmp_path, "load", "--routing-trace", "none.pt", code=2)
    assert "cannot read the routing trace none.pt" in text
    assert "Traceback" not in text
