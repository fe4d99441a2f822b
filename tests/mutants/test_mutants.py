"""The kernels' tests are tested: each planted mistake has to be seen. Here one of each file; `make mutants`: all."""

import pytest

from tests.helpers import kernels

from .suite import FILES, MUTANTS, changed, judge_all, score


def test_texts_stand_where_they_should() -> None:
    texts = kernels.sources()
    for mutant in MUTANTS:
        assert changed(mutant, texts[mutant.file]) != texts[mutant.file]
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 24


@pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")
def test_one_of_each_file_is_caught() -> None:
    verdicts = judge_all([file.MUTANTS[0] for file in FILES])
    print(*verdicts, score(verdicts), sep="\n")
    assert all(verdict.is_caught for verdict in verdicts), "\n".join(map(str, verdicts))
