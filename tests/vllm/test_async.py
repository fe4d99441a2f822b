"""The engine that servers run on, with requests that come and go."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vllm import runs
from tests.vllm.cases import BATCHES, compare, on_one_rank
from tests.vllm.marks import needs_vllm

pytestmark = needs_vllm
REPEATS = 12


@pytest.mark.slow
def test_requests_that_come_and_go(
    model: Callable[[str], Path], expected: Callable[[str], dict[str, runs.Answer]], tmp_path: Path
) -> None:
    wanted = expected("qwen3_moe")
    prompts = [one for batch in on_one_rank(BATCHES) for one in batch[0]]
    llm = {
        "model": str(model("qwen3_moe")),
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "data_parallel_size": 2,
        "enable_expert_parallel": True,
        "all2all_backend": "moebius",
    }
    spec = {"llm": llm, "prompts": prompts, "repeats": REPEATS, "out": str(tmp_path / "out.json")}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    cores = f"0|{min(1, (os.cpu_count() or 1) - 1)}"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.vllm.serving", str(tmp_path / "spec.json")],
            env=runs.environment(VLLM_CPU_OMP_THREADS_BIND=cores, MOEBIUS_VLLM_FORMAT="batched"),
            cwd=runs.ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        process.wait(timeout=240)
        left = runs.wait_until_gone(process, 20)
    finally:
        runs.end(process)
    assert process.returncode == 0, (tmp_path / "log").read_text()[-4000:]
    assert left == [], "an engine that is shut down leaves no process"
    assert "2 ranks, batched format" in (tmp_path / "log").read_text()
    found = json.loads((tmp_path / "out.json").read_text())
    num_asked = len(prompts) * REPEATS
    assert len(found) == num_asked - num_asked // 5
    for answer in found:
        prompt = answer["prompt"]
        compare({prompt: runs.Answer(answer["tokens"], answer["logprobs"])}, {prompt: wanted[prompt]})
