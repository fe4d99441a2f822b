"""The commands as a user types them, on tiny shapes."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius import Config, plan
from moebius.bench.sweep import COLUMNS

LAYOUTS = ("token_major", "expert_major")


def moebius(folder: Path, *arguments: str, code: int = 0) -> str:
    """Run a command in an empty folder; its standard output."""
    command = [sys.executable, "-m", "moebius", *arguments]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == code, run.stdout + run.stderr
    return run.stdout + (run.stderr if code else "")


def read(path: Path) -> Any:
    content = json.loads(path.read_text())
    assert {"machine", "kind"} <= content.keys()
    return content


def test_doctor(tmp_path: Path) -> None:
    text = moebius(tmp_path, "doctor", "--json", "doctor.json")
    found = read(tmp_path / "doctor.json")
    assert found["engines"]["cpu"]["works"]
    assert found["engines"]["cpu"]["simd"] in found["engines"]["cpu"]["simd_available"]
    for engine in found["engines"].values():
        assert engine["works"] or engine["why"] in text


def test_plan_is_what_is_allocated(tmp_path: Path) -> None:
    text = moebius(tmp_path, "plan", "--json", "plan.json")
    rows = {row["ranks"]: row for row in read(tmp_path / "plan.json")["plan"]}
    assert sorted(rows) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    config = Config(num_experts=256, num_topk=8, hidden=7168, max_num_tokens=128, payload="fp8_e4m3")
    for ranks, row in rows.items():
        assert row["heap_bytes"] == sum(row["regions"].values()) == plan(config, ranks, 8).heap_bytes
    assert rows[8]["heap_bytes"] <= 50_000_000
    assert "DeepEP V1" in text


def test_plan_of_given_ranks(tmp_path: Path) -> None:
    moebius(tmp_path, "plan", "--ranks", "3,6", "--experts", "12", "--json", "plan.json")
    assert [row["ranks"] for row in read(tmp_path / "plan.json")["plan"]] == [3, 6]


def test_plan_of_a_cluster(tmp_path: Path) -> None:
    cluster = ("--ranks", "64", "--per-node", "8", "--nic-gbps", "400", "--nvlink-gbps", "450")
    text = moebius(tmp_path, "plan", *cluster, "--json", "plan.json")
    assert "DeepEP V1, docs/legacy.md" in text
    assert "173 / 314" in text
    content = read(tmp_path / "plan.json")
    (row,) = content["plan"]
    assert row["halves"]["dispatch"]["nic_requests"] == row["halves"]["combine"]["nic_requests"] == 56
    assert content["cluster"]["nic_gbit_per_s"] == 400
    refused = moebius(tmp_path, "plan", "--ranks", "12", "--experts", "48", code=2)
    assert "ConfigError: ranks must fill their nodes of 8 (got 12 ranks)" in refused


def test_plan_of_a_recorded_routing(tmp_path: Path) -> None:
    torch.save(
        {"num_experts": 16, "num_topk": 2, "layers": {"a": torch.tensor([[0, 1], [0, 2], [0, -1]])}}, tmp_path / "r.pt"
    )
    text = moebius(tmp_path, "plan", "--ranks", "16", "--routing-trace", "r.pt", "--json", "plan.json")
    assert "recorded routing" in text
    content = read(tmp_path / "plan.json")
    assert (content["config"]["num_experts"], content["config"]["num_topk"]) == (16, 2)
    assert content["plan"][0]["ranks_a_token"] == pytest.approx(5 / 3)


def test_bench(tmp_path: Path) -> None:
    text = moebius(
        tmp_path, "bench", "--tiny", "--repeat", "2", "--routing", "hot", "--csv", "b.csv", "--json", "b.json"
    )
    with (tmp_path / "b.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [(row["op"], row["layout"]) for row in rows] == [
        (op, layout) for layout in LAYOUTS for op in ("dispatch", "combine", "round")
    ]
    content = read(tmp_path / "b.json")
    assert content["command"].startswith("python -m moebius bench --tiny")
    for written, row in zip(rows, content["rows"], strict=True):
        assert float(written["p50_us"]) == row["p50_us"] > 0
        assert row["wire_bytes"] > 0
        assert len(row["p50_us_of_runs"]) == 2
        assert row["moebius"]["samples"] >= 40
        assert row["moebius"]["percentiles_us"]["99"] >= row["moebius"]["percentiles_us"]["50"]
    assert "faster than gloo" in text


@pytest.mark.parametrize(
    "options",
    [
        ("--layout", "token_major", "--routing", "zipf"),
        ("--layout", "expert_major", "--payload", "fp8_e4m3", "--max-num-tokens", "9"),
        ("--layout", "token_major", "--payload", "fp8_e4m3", "--routing", "hot"),
        ("--layout", "expert_major", "--payload", "fp32", "--ranks", "3"),
    ],
)
def test_demo(tmp_path: Path, options: tuple[str, ...]) -> None:
    shape = (
        "--tokens",
        "6",
        "--hidden",
        "256",
        "--experts",
        "12",
        "--topk",
        "3",
        "--intermediate",
        "16",
        "--steps",
        "20",
    )
    text = moebius(tmp_path, "demo", *shape, *options, "--json", "demo.json")
    content = read(tmp_path / "demo.json")
    check = content["check"]
    assert check["passed"]
    assert check["moebius"]["wrong_routing"] == check["gloo"]["wrong_output"] == 0
    for op in ("dispatch", "combine", "round", "step"):
        assert content["ops"][op]["moebius"]["samples"] == content["ops"][op]["gloo"]["samples"] == 20
        assert content["ops"][op]["moebius"]["p999_us"] is None
    assert content["wire_bytes"]["moebius"]["round"] > 0
    page = (tmp_path / "moebius-report" / "index.html").read_text()
    assert not re.search(r"https?://|<script|<link|src=", page)
    assert "Report: moebius-report/index.html" in text
    assert "all equal to the layer in one process" in text


def test_impossible_shapes_are_refused_by_name(tmp_path: Path) -> None:
    text = moebius(tmp_path, "demo", "--ranks", "3", "--experts", "64", code=2)
    assert "ConfigError: `num_experts` must be a multiple of the 3 ranks (got 64)" in text
    assert "Traceback" not in text
    assert "invalid choice" in moebius(tmp_path, "bench", "--engine", "quantum", code=2)
