"""Every example runs as its first line says."""

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "serving_examples").glob("*.py"))
# What each says when it went well. Those in the second table need vLLM, or what comes with it.
PLAIN = {
    "overlapped_layer": ("rank 0: 20 steps", "rank 1: 20 steps"),
    "two_micro_batches": ("rank 0: 6 layers", "rank 1: 6 layers"),
}
WITH_VLLM = {
    "load_test": ("100 requests", "0 lost, 0 other than offline"),
    "offline": ("rank 0: 'The capital", "rank 1: 'To be"),
    "serve_and_stream": ("2 ranks, standard format", "streamed in"),
    "tiny_model": ("a model of kind qwen3_moe",),
}
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not in this environment: make test-vllm"
)


def run(name: str, tmp_path: Path, timeout_s: float) -> str:
    """What an example prints, run by the command in its first line."""
    first = (ROOT / "serving_examples" / f"{name}.py").read_text().splitlines()[0].strip('".')
    program, *arguments = shlex.split(first.replace("FOLDER", str(tmp_path / "made")))
    launchers = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--standalone"]}
    ran = subprocess.run(
        [sys.executable, *launchers[program], *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


@pytest.mark.parametrize("name", PLAIN)
def test_example_runs_as_its_first_line_says(name: str, tmp_path: Path) -> None:
    printed = run(name, tmp_path, 120)
    assert all(words in printed for words in PLAIN[name]), printed


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_VLLM)
def test_example_with_vllm_runs_as_its_first_line_says(name: str, tmp_path: Path) -> None:
    printed = run(name, tmp_path, 500)
    assert all(words in printed for words in WITH_VLLM[name]), printed


def test_the_readme_lists_every_example_and_each_is_run() -> None:
    table = (ROOT / "serving_examples/README.md").read_text()
    assert {path.stem for path in EXAMPLES} == PLAIN.keys() | WITH_VLLM.keys()
    assert all(f"[{path.name}]" in table for path in EXAMPLES)
