"""What the calls of any `deep_ep` do, on ranks in processes, and on virtual ranks where the subject is ours.

To hold another implementation against it:

    pytest tests/deep_ep --deep-ep-module=deep_ep --deep-ep-device=cuda --deep-ep-ranks=8
"""

from __future__ import annotations

import pytest

from tests.deep_ep.worlds import CASES, SKIPPED


def _judge(what: str) -> None:
    if what.startswith(SKIPPED):
        pytest.skip(what.removeprefix(SKIPPED))
    if what:
        pytest.fail(what, pytrace=False)


@pytest.mark.parametrize("case", CASES)
def test_in_processes(process_results: dict[str, str], case: str) -> None:
    _judge(process_results[case])


@pytest.mark.parametrize("thread_result", [1, 4], indirect=True, ids=lambda ranks: f"R{ranks}")
@pytest.mark.parametrize("case", CASES)
def test_in_threads(thread_result: dict[str, str], case: str) -> None:
    _judge(thread_result[case])
