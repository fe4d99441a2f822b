"""`serve-bench` over two real servers, in small."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vllm import runs
from tests.vllm.marks import needs_vllm

pytestmark = needs_vllm


@pytest.mark.slow
def test_a_pair_of_runs(model: Callable[[str], Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moebius", "serve-bench", str(model("qwen3_moe")), "--pairs", "1"]
    small = ["--requests", "6", "--output-len", "8", "--rate", "20"]
    files = ["--json", str(tmp_path / "serve.json"), "--report", str(tmp_path / "serve.html")]
    env = runs.environment()
    env.pop("VLLM_CPU_OMP_THREADS_BIND")
    with subprocess.Popen(
        [*command, *small, *files], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as ran:
        try:
            said, _ = ran.communicate(timeout=400)
        except subprocess.TimeoutExpired:
            # Interrupted it ends its servers, of which one is halted; killed it would leave both.
            ran.send_signal(signal.SIGINT)
            said, _ = ran.communicate(timeout=60)
        finally:
            ran.kill()
    assert ran.returncode == 0, said[-6000:]
    found = json.loads((tmp_path / "serve.json").read_text())
    assert {run["side"] for run in found["runs"]} == {"moebius", "gloo"}
    assert all(run["completed"] == 6 and run["failed"] == 0 for run in found["runs"])
    assert all(run["percentiles_ms"]["tpot"]["p50"] > 0 for run in found["runs"])
    assert "vllm bench serve" in (tmp_path / "serve.html").read_text()
