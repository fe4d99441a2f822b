"""The kernels on the host executor against the CPU engine, bit for bit, over seeded schedules.

`MOEBIUS_KERNEL_SEEDS`: seeds a case, more than what is run by default.
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.helpers import kernels

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def program() -> Path:
    return kernels.Built(kernels.OPTIMISED).program


def cases(program: Path) -> list[str]:
    return subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()


def run_all(program: Path, num_seeds: int, timeout_s: float) -> None:
    def run(case: str) -> tuple[bool, str]:
        return kernels.run(program, case, 0, num_seeds, timeout_s)

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        verdicts = list(workers.map(run, cases(program)))
    print(*(said for _, said in verdicts), sep="")
    assert all(is_right for is_right, _ in verdicts), "\n".join(said for is_right, said in verdicts if not is_right)


def test_every_case_is_right_in_every_schedule(program: Path) -> None:
    run_all(program, int(os.environ.get("MOEBIUS_KERNEL_SEEDS", "35")), 3600)


@pytest.mark.slow
def test_a_few_schedules_are_clean_under_sanitizers() -> None:
    run_all(kernels.Built(kernels.SANITIZED).program, 5, 600)


def test_a_run_is_its_seeds_alone(program: Path) -> None:
    def counters(first_seed: int, num_seeds: int) -> str:
        is_right, said = kernels.run(program, "stopped", first_seed, num_seeds)
        assert is_right, said
        return said.split("steps ")[1].split()[0]

    assert counters(3, 1) == counters(0, 4)
