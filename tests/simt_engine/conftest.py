"""The tests of this folder run the CUDA engine on the host executor, each with a schedule of its own."""

import pytest

from tests.helpers import simt


@pytest.fixture(autouse=True)
def fresh_world() -> None:
    why = simt.why_not()
    if why is not None:
        pytest.skip(why)
    simt.extension().reset(simt.seed_of_test())
