"""Whether there is a GPU to test on, and why not."""

from __future__ import annotations

import functools

import pytest
import torch

from moebius import MoebiusError, native


@functools.cache
def why_not() -> str | None:
    """Why the CUDA engine cannot run here; None if it can."""
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    try:
        native.cuda().num_devices()
    except MoebiusError as error:
        return str(error)
    return None


def marks() -> list[pytest.MarkDecorator]:
    """For `pytestmark` of a file whose tests need a GPU."""
    return [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]
