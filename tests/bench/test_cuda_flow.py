"""The CUDA benchmark from flags to files, over the CPU engine; and what it says where there is no GPU."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius import ConfigError, PeerTimeoutError
from moebius.bench.cli import _parser, main
from moebius.bench.cuda.devices import HostDevice, NoDeviceError
from moebius.bench.cuda.measure import Bench
from moebius.bench.cuda.processes import GpuPool
from moebius.bench.cuda.rows import COLUMNS, point_rows
from moebius.bench.cuda.run import CudaOptions, run
from moebius.bench.cuda.schedules import HALVES
from moebius.bench.cuda.suites import Point
from moebius.bench.cuda.world import World
from moebius.bench.workload import Workload
from moebius.group import virtual_ranks

SMALL = Workload(ranks=2, experts=8, topk=2, hidden=256, tokens=4, payload="bf16", layout="token_major")


def options(folder: Path, *arguments: str) -> CudaOptions:
    flags = _parser().parse_args(["bench", "--device", "cuda", "--out", str(folder), "--seconds", "0.01", *arguments])
    return CudaOptions.from_flags(vars(flags))


def test_the_whole_suite_runs_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(options(tmp_path / "out", "--tiny"), HostDevice)
    text = capsys.readouterr().out
    assert result["errors"] == result["skipped"] == []
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["kind"] == "bench-cuda"
    assert len(written["rows"]) == len(result["rows"])
    with (tmp_path / "out" / "results.csv").open() as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    assert (tmp_path / "out" / "index.html").stat().st_size > 10_000
    assert (tmp_path / "out" / "hook-trace.json").exists()
    found = {(row["section"], row["mode"], row["schedule"], row["op"]) for row in result["rows"]}
    for mode in ("graph", "eager"):
        assert ("decode", mode, "chained", "round") in found
        assert {("decode", mode, "by_op", op) for op in ("dispatch", "combine")} <= found
        assert {("decode", mode, "by_half", half) for half in HALVES} <= found
    assert ("prefill", "eager", "by_op", "dispatch") in found
    assert ("sms", "graph", "lockstep", "round") in found
    for row in result["rows"]:
        assert row["p50_us"] > 0
        assert row["times_bound"] > 0
        assert (row["baseline_p50_us"] is None) == (row["section"] == "sms"), row
    assert {fit["op"] for fit in result["fits"]} >= {"dispatch", "combine", "round"}
    assert set(result["host_us"]) == {"bf16", "fp8_e4m3"}
    assert "fixed cost and slope" in text
    assert "host time of the calls" in text


def test_a_sweep_of_flags(tmp_path: Path) -> None:
    shape = ("--virtual-ranks", "2", "--experts", "8", "--topk", "2", "--hidden", "256", "--tokens", "1,3")
    result = run(options(tmp_path, *shape, "--payload", "bf16", "--sms", "4,64"), HostDevice)
    assert result["errors"] == []
    assert {(row["tokens"], row["sms"], row["schedule"]) for row in result["rows"] if row["op"] == "round"} == {
        (tokens, sms, schedule) for tokens in (1, 3) for sms, schedule in ((4, "chained"), (64, "lockstep"))
    }


def test_a_run_out_of_time_says_what_it_left_out(tmp_path: Path) -> None:
    result = run(options(tmp_path, "--tiny", "--budget", "0"), HostDevice)
    assert result["rows"] == []
    assert len(result["skipped"]) == 6
    assert (tmp_path / "index.html").exists()


def test_what_fails_is_named_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(HostDevice(2), lambda: virtual_ranks(2), 0.01)
    original, failing = World.step, {"on": True}

    def step(self: World, lane: int, half: str, number: int) -> None:
        if failing["on"] and number == 1 and half == "combine_recv":
            failing["on"] = False
            raise RuntimeError("CUDA error: planted\nmore")
        original(self, lane, half, number)

    monkeypatch.setattr(World, "step", step)
    found = bench.measure(Point("decode", SMALL, modes=("graph",)))
    bench.close()
    assert found.errors == ["decode R=2 T=4 bf16 token_major: graph chained: RuntimeError: CUDA error: planted"]
    # In place of the chain, the round in lockstep; and the other schedules.
    assert {key[2] for key in found.samples if key[0] == "moebius"} == {"lockstep", "by_op", "by_half"}


def test_ranks_that_hang_are_run_one_after_the_other_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(HostDevice(2), lambda: virtual_ranks(2), 0.01)
    original = World.settle
    hangs = iter([False, True, False, True])  # the check, chained, lockstep in its place, by_op

    def settle(self: World) -> None:
        original(self)
        if next(hangs, False):
            fault = {"rank": 1, "epoch": 0, "waited_us": 9, "expected": 1, "observed": 0}
            raise PeerTimeoutError(op="dispatch", half="recv", reason="deadline", **fault)

    monkeypatch.setattr(World, "settle", settle)
    first = bench.measure(Point("decode", SMALL, modes=("graph",)))
    assert len(first.errors) == 2
    second = bench.measure(Point("decode", SMALL, modes=("graph",)))
    bench.close()
    assert second.errors == []
    assert {key[2] for key in second.samples if key[0] == "moebius"} == {"lockstep", "by_half"}


def test_wrong_tokens_are_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(HostDevice(2), lambda: virtual_ranks(2), 0.01)
    monkeypatch.setattr(World, "_identity", lambda self, lane: self.expert_out[lane].fill_(3.0))
    found = bench.measure(Point("decode", SMALL))
    bench.close()
    assert found.samples == {}
    assert "got wrong tokens" in found.errors[0]


def test_processes_measure_alike() -> None:
    pool = GpuPool(2, 0.01, on_gpu=False)
    try:
        point = Point("sweep", SMALL, modes=("graph",))
        found = pool.measure(point)
        again = pool.measure(point)
    finally:
        pool.close()
    assert len(found) == len(again) == 2
    assert [one.errors for one in found] == [[], []]
    rows: list[dict[str, Any]] = point_rows(point, found, None)
    assert {row["op"] for row in rows} == {"round", "dispatch", "combine", *HALVES}
    assert all(row["p50_us"] > 0 and row["baseline_p50_us"] is None for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cuda", "--suite", "decode"]) == 1
    assert "NoDeviceError: no CUDA device here" in capsys.readouterr().err
    with pytest.raises(NoDeviceError, match="needs as many GPUs"):
        GpuPool(64, 0.1)


def test_flags_that_exclude_each_other(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        options(tmp_path, "--virtual-ranks", "2", "--ranks", "2")
    with pytest.raises(ConfigError, match="num_experts"):
        options(tmp_path, "--virtual-ranks", "3", "--suite", "decode")
    assert main(["bench", "--suite", "decode"]) == 2
    assert "belong to `--device cuda`" in capsys.readouterr().err
