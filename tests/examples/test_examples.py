"""Every example runs as its first line says."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "serving_examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_as_its_first_line_says(example: Path) -> None:
    first = example.read_text().splitlines()[0].strip('".')
    program, *arguments = shlex.split(first)
    assert program == "torchrun"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments]
    ran = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "rank 0:" in ran.stdout
    assert "rank 1:" in ran.stdout


def test_the_readme_lists_every_example() -> None:
    table = (ROOT / "serving_examples/README.md").read_text()
    assert EXAMPLES
    assert all(f"[{path.name}]" in table for path in EXAMPLES)
