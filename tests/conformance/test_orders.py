"""Every legal order of the halves, and ranks that drift apart within it."""

from __future__ import annotations

import functools
import itertools
import random
from typing import TYPE_CHECKING

import pytest

from tests.conformance.engines import CONCURRENT, ENGINES
from tests.conformance.programs import ordered
from tests.helpers.cases import Case
from tests.helpers.in_turn import MOST_ROUNDS, InTurn
from tests.helpers.rounds import Expected, Halves, Result, check_rank, expect, of_rank
from tests.helpers.schedules import Half, drifting, legal_orders
from tests.helpers.skew import Skew

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from moebius import AllToAll, Config

# Rounds that are combined (C) and rounds that are only dispatched (D).
COMBINED = ["CCC", "CC"]
MIXED = ["CCD", "CDC", "DCC", "CDD", "DCD", "DDC", "DDD", "DDDDD", "CDCD", "DCCD"]


def small(mode: str, num_ranks: int = 2) -> Case:
    return Case(
        num_ranks=num_ranks,
        num_experts=2 * num_ranks,
        num_topk=2,
        hidden=16,
        max_num_tokens=3,
        mode=mode,
        routing="ragged",
    )


@functools.cache
def expected_rounds(case: Case) -> tuple[Expected, ...]:
    return tuple(expect(case, number) for number in range(MOST_ROUNDS))


@functools.cache
def orders_of(pattern: str) -> list[tuple[Half, ...]]:
    return list(legal_orders([letter == "C" for letter in pattern], 2))


@pytest.fixture(params=["expert", "expert-late", "token"])
def in_turn(request: pytest.FixtureRequest) -> Iterator[InTurn]:
    case = small(request.param)
    with InTurn(case, expected_rounds(case)) as ranks:
        yield ranks


@pytest.mark.parametrize("pattern", COMBINED)
def test_every_order_in_one_thread(in_turn: InTurn, pattern: str) -> None:
    for order in orders_of(pattern):
        in_turn.together(order)
        in_turn.one_round()  # the next order starts at the other parity


def test_orders_of_four_rounds(in_turn: InTurn) -> None:
    """A sample of the 3665."""
    for order in random.Random(4).sample(orders_of("CCCC"), 150):
        in_turn.together(order)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("mode", ["expert", "token"])
def test_ranks_drift_apart(num_ranks: int, mode: str) -> None:
    """Any order, any drift that makes nobody wait: a single thread plays what threads only might."""
    case = small(mode, num_ranks)
    numbers = random.Random(num_ranks)
    with InTurn(case, expected_rounds(case)) as ranks:
        for _ in range(200):
            ranks.run(drifting(numbers.choice(orders_of("CCCC")), num_ranks, 2, numbers))


def all_orders(
    a2a: AllToAll, config: Config, rank: int, expected: Sequence[Expected], orders: Sequence[Sequence[Half]]
) -> Generator[None, None, int]:
    """Call the orders one after another, at this rank's own pace, and compare in place."""
    for order in orders:
        halves = Halves(a2a, of_rank(expected, rank))
        try:
            for half, number in order:
                getattr(halves, half)(number)
            check_rank(config, rank, halves, expected)
        except Exception as error:
            raise AssertionError(f"{error}; in the order {order}") from error
        yield
    return len(orders)


@pytest.mark.parametrize("pattern", MIXED)
@pytest.mark.parametrize("mode", ["expert", "token"])
def test_every_order_with_rounds_left_uncombined(mode: str, pattern: str) -> None:
    """A round that is never combined is closed by the dispatch D rounds later, which waits for the other ranks."""
    case = small(mode)
    expected, orders = expected_rounds(case), orders_of(pattern)
    arguments = [(case.config(), rank, expected, orders) for rank in range(case.num_ranks)]
    done = ENGINES["cpu-threads"].run(case.config(), case.num_ranks, all_orders, arguments, None)
    assert done == [len(orders)] * case.num_ranks


@pytest.mark.parametrize("engine", CONCURRENT)
@pytest.mark.parametrize("mode", ["expert", "token"])
def test_orders_under_skew(engine: str, mode: str) -> None:
    """Orders of five rounds in a row, only some of them combined, ranks delayed at random between the halves."""
    case = small(mode, 3)
    expected = expected_rounds(case)
    numbers = random.Random(9)
    for attempt in range(8):
        pattern = [numbers.random() < 0.6 for _ in range(MOST_ROUNDS)]
        order = numbers.choice(list(itertools.islice(legal_orders(pattern, case.depth), 2000)))
        arguments = [(of_rank(expected, rank), order) for rank in range(case.num_ranks)]
        results: list[Result] = ENGINES[engine].run(case.config(), case.num_ranks, ordered, arguments, Skew(attempt))
        for rank, result in enumerate(results):
            assert set(result.received) == set(range(MOST_ROUNDS))
            assert set(result.combined) == {number for number, whole in enumerate(pattern) if whole}
            check_rank(case.config(), rank, result, expected)
