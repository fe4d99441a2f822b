"""Tests of this folder that need a device say why they skip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moebius import NativeNotBuiltError, native

FOLDER = Path(__file__).parent


def why_not() -> str:
    """What is missing for the tests on a device; empty if nothing is."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        native.cuda()
    except NativeNotBuiltError as error:
        return str(error)
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu") and FOLDER in item.path.parents]
    reason = why_not() if marked else ""
    if reason:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
