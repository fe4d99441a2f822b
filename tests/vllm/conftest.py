"""The models, and the answers of one process that every other run is compared with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from serving_examples import tiny_model
from tests.vllm import runs
from tests.vllm.cases import BATCHES, on_one_rank


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of a kind; made when it is first asked for."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny_model.make_model(kind, made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="session")
def expected(
    model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, runs.Answer]]:
    """What a kind of model answers in one process, without us."""
    found: dict[str, dict[str, runs.Answer]] = {}

    def get(kind: str) -> dict[str, runs.Answer]:
        if kind not in found:
            folder = tmp_path_factory.mktemp(f"{kind}-alone")
            run = runs.generate(folder, model(kind), on_one_rank(BATCHES))
            assert "moebius 0" not in run.log
            found[kind] = run.answers
        return found[kind]

    return get


@pytest.fixture(scope="session", autouse=True)
def _own_compile_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No run finds what another one, or an earlier version, compiled."""
    import os

    os.environ["VLLM_CACHE_ROOT"] = str(tmp_path_factory.mktemp("cache"))
