"""Routing recorded in a live run, and what it is recorded for: to be replayed in `bench` and `load`."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius.bench.routing_trace import read_routing_trace
from tests.vllm import runs
from tests.vllm.cases import BATCHES
from tests.vllm.marks import needs_vllm

pytestmark = [needs_vllm, pytest.mark.slow]
EXPERTS, TOPK = 8, 2  # of the tiny model
LAYERS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


@pytest.fixture(scope="module")
def recorded(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the files that two data-parallel ranks recorded."""
    folder = tmp_path_factory.mktemp("recorded")
    trace = folder / "traces" / "run.pt"
    runs.generate(
        folder,
        model("qwen3_moe"),
        BATCHES,
        num_ranks=2,
        env={"MOEBIUS_VLLM_TRACE": str(trace)},
        data_parallel_size=2,
        enable_expert_parallel=True,
        all2all_backend="moebius",
    )
    return trace.parent


def test_each_rank_records_the_experts_of_its_own_tokens(recorded: Path) -> None:
    assert sorted(path.name for path in recorded.iterdir()) == ["run.rank0.pt", "run.rank1.pt"]
    for rank in range(2):
        found = torch.load(recorded / f"run.rank{rank}.pt", weights_only=True)
        assert (found["num_experts"], found["num_topk"]) == (EXPERTS, TOPK)
        assert list(found["layers"]) == LAYERS
        # A token for each byte; the last one that is made is not computed with any more.
        num_tokens = sum(len(prompt) + length - 1 for batch in BATCHES for prompt, length in batch[rank])
        for ids in found["layers"].values():
            assert ids.dtype == torch.int16
            assert ids.shape == (num_tokens, TOPK)
            assert ids.min() >= 0
            assert ids.max() < EXPERTS
            assert (ids[:, 0] != ids[:, 1]).all()


def moebius(folder: Path, command: str, *arguments: str) -> dict[str, Any]:
    """What a command of `python -m moebius` writes as JSON."""
    out = folder / f"{command}.json"
    ran = subprocess.run(
        [sys.executable, "-m", "moebius", command, *arguments, "--ranks", "2", "--json", str(out)],
        cwd=folder,
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:] + ran.stdout[-2000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_what_was_recorded_is_what_is_replayed(rank: int, recorded: Path) -> None:
    """Layer by layer, neighbours of the recording in its order: from some place on, and round its end."""
    found = torch.load(recorded / f"run.rank{rank}.pt", weights_only=True)
    trace = read_routing_trace(recorded / f"run.rank{rank}.pt")
    assert (trace.num_experts, trace.num_topk, len(trace.layers)) == (EXPERTS, TOPK, len(LAYERS))
    for number, name in enumerate(LAYERS):
        original = found["layers"][name].int()
        assert torch.equal(trace.layers[number], original)
        ids, weights = trace.sample(number, 20, torch.Generator().manual_seed(number))
        twice = torch.cat([original, original])
        assert any(torch.equal(twice[first : first + 20], ids) for first in range(len(original)))
        assert torch.equal(weights, torch.full((20, TOPK), 1 / TOPK))


@pytest.mark.parametrize("layout", ["expert_major", "token_major"])
def test_bench_replays_a_recording(layout: str, recorded: Path, tmp_path: Path) -> None:
    trace = str(recorded / "run.rank0.pt")
    rows = moebius(tmp_path, "bench", "--tiny", "--layout", layout, "--routing-trace", trace)["rows"]
    assert rows
    assert {(row["experts"], row["topk"], row["routing"]) for row in rows} == {(EXPERTS, TOPK, "trace")}


def test_load_replays_a_recording(recorded: Path, tmp_path: Path) -> None:
    """A stack of as many layers as were recorded; `load` compares each with the layer in one process before."""
    shape = ["--layers", str(len(LAYERS)), "--hidden", "128", "--tokens", "4", "--intermediate", "32"]
    quick = ["--rates", "50", "--seconds", "0.4", "--sides", "moebius"]
    found = moebius(tmp_path, "load", *shape, *quick, "--routing-trace", str(recorded / "run.rank1.pt"))
    assert (found["workload"]["experts"], found["workload"]["topk"]) == (EXPERTS, TOPK)
    assert found["layers"] == len(LAYERS)
    (point,) = found["sides"]["moebius"]["points"]
    assert point["round"]["samples"] > 0
    assert "recorded routing" in (tmp_path / "moebius-report" / "load.html").read_text()
