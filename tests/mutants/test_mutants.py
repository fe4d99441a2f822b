"""The kernels' tests are tested: each planted mistake has to be seen."""

import pytest

from tests.helpers import kernels

from .suite import MUTANTS, changed, judge_all, score


def test_texts_stand_where_they_should() -> None:
    texts = kernels.sources()
    for mutant in MUTANTS:
        assert changed(mutant, texts[mutant.file]) != texts[mutant.file]
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 24


@pytest.mark.slow
@pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")
def test_every_mutant_is_caught() -> None:
    verdicts = judge_all(MUTANTS)
    print(*verdicts, score(verdicts), sep="\n")
    assert all(verdict.is_caught for verdict in verdicts), "\n".join(map(str, verdicts))
