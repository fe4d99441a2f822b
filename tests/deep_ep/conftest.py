"""Options that choose the subject of the surface suite, and the worlds its cases run in."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.deep_ep.seat import OURS
from tests.deep_ep.worlds import run_processes, run_threads


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deep_ep", "the surface suite of deep_ep")
    group.addoption("--deep-ep-module", default=OURS, help="module under test (default: moebius.deep_ep)")
    group.addoption("--deep-ep-device", default="cpu", help="cpu, or cuda: the GPUs in turn (default: cpu)")
    group.addoption("--deep-ep-ranks", type=int, default=2, help="ranks of the process world (default: 2)")


@pytest.fixture(scope="session")
def module_name(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("deep_ep_module", OURS))


@pytest.fixture(scope="session")
def subject(module_name: str) -> Any:
    return importlib.import_module(module_name)


@pytest.fixture
def only_ours(module_name: str) -> None:
    if module_name != OURS:
        pytest.skip("a test of moebius.deep_ep alone")


@pytest.fixture(scope="session")
def process_results(pytestconfig: pytest.Config, module_name: str) -> dict[str, str]:
    return run_processes(
        module_name,
        str(pytestconfig.getoption("deep_ep_device", "cpu")),
        int(pytestconfig.getoption("deep_ep_ranks", 2)),
    )


@pytest.fixture(scope="session")
def thread_results() -> dict[int, dict[str, str]]:
    """Results by number of virtual ranks, filled when a test first asks."""
    return {}


@pytest.fixture
def thread_result(module_name: str, thread_results: dict[int, dict[str, str]], request: pytest.FixtureRequest) -> Any:
    if module_name != OURS:
        pytest.skip("virtual ranks are ours")
    num_ranks = request.param
    if num_ranks not in thread_results:
        thread_results[num_ranks] = run_threads(num_ranks)
    return thread_results[num_ranks]
