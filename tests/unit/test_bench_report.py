"""Text, plots and pages."""

import re
import subprocess
import sys
from typing import Any

import pytest

from moebius import Config
from moebius.bench.console import size, table, us
from moebius.bench.plan import deep_ep_v1_bytes, ep_sizes
from moebius.bench.report import render
from moebius.bench.svg import log_ticks, nice_ticks, short_us
from moebius.bench.sweep import COLUMNS
from moebius.bench.timing import summarise

TIMES = {"samples": 1200, "p50_us": 10.0}


def entry(factor: float, *, has_bound: bool) -> dict[str, Any]:
    ours = summarise(factor * (1 + i / 100) for i in range(1000)).to_json()
    gloo = summarise(factor * (5 + i / 50) for i in range(1000)).to_json()
    bound = summarise([factor / 2]).to_json() if has_bound else None
    return {"moebius": ours, "gloo": gloo, "bound": bound, "speedup_p50": 3.0, "times_bound_p50": 2.0}


def result() -> dict[str, Any]:
    check = {"steps": 1000, "wrong_routing": 0, "wrong_output": 0, "worst_error": 0.001}
    parts = {"router": 10.0, "dispatch": 20.0, "experts": 30.0, "combine": 20.0, "sum": 1.0}
    halves = ("dispatch send", "dispatch receive", "combine send", "combine receive")
    steps = ("pack", "counts", "all_to_all", "unpack", "reduce", "all_to_all", "sum")
    wire = {"dispatch": 1000, "combine": 2000, "round": 3000}
    return {
        "workload": {
            "ranks": 2, "tokens": 4, "hidden": 64, "topk": 2, "experts": 8, "payload": "bf16", "layout": "<b>",
            "routing": "uniform",
        },
        "machine": {
            "cpu": "a & b", "cores": 2, "memory_bytes": 1 << 30, "system": "Linux", "load_1min": 0.1, "torch": "2",
            "python": "3", "moebius": "0",
        },
        "commit": None, "command": "python -m moebius demo", "engine": "cpu", "heap_bytes": 5000,
        "method": "m", "bound_method": "b",
        "ops": {op: entry(10.0, has_bound=op != "step") for op in ("dispatch", "combine", "round", "step")},
        "parts_us": {"moebius": parts, "gloo": parts},
        "check": {"tolerance": 0.02, "moebius": check, "gloo": check, "passed": True},
        "wire_bytes": {"moebius": wire, "gloo": wire, "per_expert": wire},
        "timeline": {
            "moebius": [[(name, i * 1.0, i + 1.0) for i, name in enumerate(halves)]] * 2,
            "gloo": [[(name, i * 1.0, i + 1.0) for i, name in enumerate(steps)]] * 2,
        },
    }  # fmt: skip


def test_the_report_loads_nothing_and_escapes() -> None:
    page = render(result())
    assert not re.search(r"https?://|//[a-z]|<script|<link|@import|url\(|src=", page)
    assert "<b>," not in page
    assert "a &amp; b" in page
    assert page.count("<svg") == page.count("</svg>") == 1 + 4 + 4  # brand, distributions, time lines and bars
    assert "nan" not in page.lower().replace("nanum", "")
    assert "3.0 times faster" in page


def test_the_report_admits_defeat() -> None:
    slower = result()
    slower["ops"]["round"]["speedup_p50"] = 0.5
    slower["check"]["passed"] = False
    slower["machine"]["load_1min"] = 9.5
    page = render(slower)
    assert "times faster" not in page
    assert "WRONG" in page
    assert "other work before this run" in page


def test_columns_are_those_of_the_field() -> None:
    expected = "op ranks tokens hidden topk dtype layout routing mode p50_us p99_us wire_bytes bound_us baseline_p50_us"
    assert " ".join(COLUMNS) == expected


def test_table_aligns() -> None:
    assert table(["a", "bb"], [["xx", "1"], ["y", "100"]]) == "a    bb\n--  ---\nxx    1\ny   100"


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (44_900_000, "44.9 MB"), (2.5e11, "250 GB")]
)
def test_sizes(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


def test_times() -> None:
    assert [us(None), us(9.99), us(123.4)] == ["-", "10.0", "123"]
    assert [short_us(9.0), short_us(123.4), short_us(12_345.0)] == ["9 µs", "123 µs", "12.3 ms"]


def test_ticks() -> None:
    assert nice_ticks(100.0, 5) == [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    assert nice_ticks(0.0) == [0.0]
    assert log_ticks(0.9, 11.0) == [1.0, 2.0, 5.0, 10.0]


# What DeepEP's own size hint answers for these shapes.
@pytest.mark.parametrize(("shape", "expected"), [((288, 128, 7168), 2_146_961_792), ((256, 128, 7168), None)])
def test_deep_ep_size(shape: tuple[int, int, int], expected: int | None) -> None:
    experts, tokens, hidden = shape
    config = Config(num_experts=experts, num_topk=8, hidden=hidden, max_num_tokens=tokens, payload="fp8_e4m3")
    num_bytes = deep_ep_v1_bytes(config, 8)
    assert num_bytes == deep_ep_v1_bytes(config, 64)
    assert num_bytes % 128 == 0
    if expected is not None:
        assert num_bytes == expected
    assert num_bytes == pytest.approx(4 * experts * tokens * (2 * hidden + hidden / 32), rel=0.01)


def test_ep_sizes_divide_the_experts() -> None:
    config = Config(num_experts=96, num_topk=8, hidden=128, max_num_tokens=4)
    assert ep_sizes(config) == [1, 2, 4, 8, 16, 32]
    assert ep_sizes(config, [3]) == [3]


def test_output_that_nobody_reads_ends_the_program_quietly() -> None:
    code = "from moebius.bench.console import out\nfor number in range(100_000): out(f'line {number}')"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        assert program.stdout.readline() == b"line 0\n"
        program.stdout.close()
        assert program.stderr.read() == b""
    assert program.returncode == 1
