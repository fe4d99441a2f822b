"""Every legal order of the halves, and ranks that drift apart within it."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator

import pytest

import moebius
from moebius import AllToAll
from tests.conformance.engines import CONCURRENT, ENGINES
from tests.conformance.programs import ordered
from tests.helpers.cases import Case
from tests.helpers.rounds import Expected, Halves, check_rank, expect, of_rank
from tests.helpers.schedules import HALVES, Half, drifting, legal_orders
from tests.helpers.skew import Skew

SMALL = {"num_experts": 4, "num_topk": 2, "hidden": 16, "max_num_tokens": 3}
EXPERT = Case(num_ranks=2, mode="expert", routing="ragged", **SMALL)  # type: ignore[arg-type]
LATE = Case(num_ranks=2, mode="expert-late", **SMALL)  # type: ignore[arg-type]
TOKEN = Case(num_ranks=2, mode="token", **SMALL)  # type: ignore[arg-type]
MOST_ROUNDS = 5
# Rounds that are combined (True) and rounds that are only dispatched.
PATTERNS = [*itertools.product((True, False), repeat=3), (False,) * 5, (True, False, True, False), (False, True, True, False)]


@functools.lru_cache(maxsize=None)
def expected_rounds(case: Case) -> tuple[Expected, ...]:
    return tuple(expect(case, number) for number in range(MOST_ROUNDS))


class InTurn:
    """All ranks of a case in one thread, kept from order to order, so that rounds start at every parity."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.expected = expected_rounds(case)
        self.ranks = [AllToAll(group, case.config()) for group in moebius.virtual_ranks(case.num_ranks)]

    def run(self, sequence: list[tuple[int, Half]]) -> None:
        """Call the halves as (rank, half) in this sequence, and compare all that came."""
        halves = [Halves(a2a, of_rank(self.expected, rank)) for rank, a2a in enumerate(self.ranks)]
        for rank, (half, number) in sequence:
            getattr(halves[rank], half)(number)
        for rank, got in enumerate(halves):
            check_rank(self.case.config(), rank, got, self.expected)

    def settle(self) -> None:
        """Two plain rounds, which close what an order left open."""
        self.run(together(PLAIN, self.case.num_ranks))

    def close(self) -> None:
        for a2a in self.ranks:
            a2a.close()


PLAIN = [(half, number) for number in range(2) for half in HALVES]


def together(order: list[Half] | tuple[Half, ...], num_ranks: int) -> list[tuple[int, Half]]:
    """Every half on all ranks before the next half."""
    return [(rank, half) for half in order for rank in range(num_ranks)]


@pytest.fixture(params=[EXPERT, LATE, TOKEN], ids=lambda case: case.mode)
def in_turn(request: pytest.FixtureRequest) -> Iterator[InTurn]:
    ranks = InTurn(request.param)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda pattern: "".join("CD"[not whole] for whole in pattern))
def test_every_order_of_some_rounds(in_turn: InTurn, pattern: tuple[bool, ...]) -> None:
    orders = list(legal_orders(pattern, in_turn.case.depth))
    assert orders
    for order in orders:
        try:
            in_turn.run(together(order, in_turn.case.num_ranks))
            in_turn.settle()
        except Exception as error:
            raise AssertionError(f"in the order {order}") from error


def test_orders_of_four_rounds(in_turn: InTurn) -> None:
    """A sample: there are 3665."""
    orders = list(legal_orders((True,) * 4, in_turn.case.depth))
    for order in random.Random(4).sample(orders, 150):
        in_turn.run(together(order, in_turn.case.num_ranks))


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("mode", ["expert", "token"])
def test_ranks_drift_apart(num_ranks: int, mode: str) -> None:
    """Any order, any drift that makes nobody wait: a single thread plays what threads only might."""
    size = {**SMALL, "num_experts": 2 * num_ranks}
    ranks = InTurn(Case(num_ranks=num_ranks, mode=mode, routing="ragged", **size))  # type: ignore[arg-type]
    numbers = random.Random(num_ranks)
    orders = list(legal_orders((True,) * 4, 2))
    try:
        for _ in range(200):
            order = numbers.choice(orders)
            sequence = drifting(order, num_ranks, 2, numbers)
            try:
                ranks.run(sequence)
            except Exception as error:
                raise AssertionError(f"in the sequence {sequence}") from error
    finally:
        ranks.close()


@pytest.mark.parametrize("engine", CONCURRENT)
@pytest.mark.parametrize("mode", ["expert", "token"])
def test_orders_with_ranks_at_their_own_pace(engine: str, mode: str) -> None:
    """Orders of five rounds in a row, only some of them combined, under random delays."""
    case = Case(num_ranks=3, mode=mode, routing="ragged", num_experts=6, num_topk=2, hidden=16, max_num_tokens=3)
    expected = expected_rounds(case)
    numbers = random.Random(9)
    for attempt in range(8):
        pattern = tuple(numbers.random() < 0.6 for _ in range(MOST_ROUNDS))
        order = numbers.choice(list(itertools.islice(legal_orders(pattern, case.depth), 2000)))
        arguments = [(of_rank(expected, rank), order) for rank in range(case.num_ranks)]
        results = ENGINES[engine].run(case.config(), case.num_ranks, ordered, arguments, Skew(attempt))
        for rank, result in enumerate(results):
            check_rank(case.config(), rank, result, expected)
