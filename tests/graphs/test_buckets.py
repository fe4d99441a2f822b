"""Which bucket a batch runs in."""

from __future__ import annotations

from typing import Any

import pytest

from moebius import ConfigError, ShapeError
from moebius.graphs import Buckets


def test_a_batch_runs_in_the_smallest_bucket_that_holds_it() -> None:
    buckets = Buckets([8, 1, 4, 8])
    assert buckets.sizes == (1, 4, 8)
    assert [buckets.of(num_tokens) for num_tokens in range(9)] == [1, 1, 4, 4, 4, 8, 8, 8, 8]
    assert (buckets.largest, len(buckets), list(buckets), repr(buckets)) == (8, 3, [1, 4, 8], "Buckets([1, 4, 8])")


def test_a_batch_above_the_largest_is_refused() -> None:
    with pytest.raises(ShapeError, match="at most 8 tokens, the largest bucket \\(got 9\\)"):
        Buckets([2, 8]).of(9)


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(1, (1,)), (2, (1, 2)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12))],
)
def test_the_default_is_the_powers_of_two(largest: int, sizes: tuple[int, ...]) -> None:
    assert Buckets.up_to(largest).sizes == sizes


@pytest.mark.parametrize("sizes", [[], [0], [-1, 2], [True], [2.0], ["4"]])
def test_an_impossible_bucket_is_refused(sizes: list[Any]) -> None:
    with pytest.raises(ConfigError, match="`buckets` must"):
        Buckets(sizes)
