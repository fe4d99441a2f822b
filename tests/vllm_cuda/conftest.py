"""Tests of this folder that need a device and vLLM say why they skip."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.helpers import gpu
from tests.vllm_cuda.compiled import stand_in

FOLDER = Path(__file__).parent

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def why_not() -> str | None:
    """What is missing; None if nothing is."""
    if gpu.why_not() is not None:
        return gpu.why_not()
    for name in ("triton", "vllm"):
        if importlib.util.find_spec(name) is None:
            return f"no {name} in this environment: docs/vllm.md, On a GPU, says what to bring"
    stand_in()
    from vllm.platforms import current_platform

    return None if current_platform.is_cuda() else f"vLLM does not find CUDA (its platform: {current_platform!r})"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu") and FOLDER in item.path.parents]
    reason = why_not() if marked else None
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
