"""All ranks of a case in one thread: the fastest way to run rounds, and the one where every wait is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import moebius
from moebius import AllToAll
from tests.helpers.rounds import Expected, Halves, check_rank, expect, of_rank
from tests.helpers.schedules import HALVES, Half

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.helpers.cases import Case

MOST_ROUNDS = 5


class InTurn:
    """The ranks of a case, kept from run to run, so that rounds start at every parity. Use as a context manager.

    Attributes:
        case: the case.
        expected: its first rounds.
        ranks: an `AllToAll` for each rank.
    """

    def __init__(self, case: Case, expected: Sequence[Expected] = ()) -> None:
        self.case = case
        self.expected = expected or [expect(case, number) for number in range(MOST_ROUNDS)]
        self.ranks = [AllToAll(group, case.config()) for group in moebius.virtual_ranks(case.num_ranks)]

    def __enter__(self) -> InTurn:
        return self

    def __exit__(self, *_: object) -> None:
        for a2a in self.ranks:
            a2a.close()

    def halves(self) -> list[Halves]:
        """To call by hand, one for each rank."""
        return [Halves(a2a, of_rank(self.expected, rank)) for rank, a2a in enumerate(self.ranks)]

    def run(self, sequence: Sequence[tuple[int, Half]]) -> None:
        """Call the halves as (rank, half) in this sequence, and compare all that came."""
        halves = self.halves()
        try:
            for rank, (half, number) in sequence:
                getattr(halves[rank], half)(number)
            self.check(halves)
        except Exception as error:
            raise AssertionError(f"{error}; in the sequence {sequence}") from error

    def check(self, halves: Sequence[Halves]) -> None:
        """Compare what came with the reference."""
        for rank, got in enumerate(halves):
            check_rank(self.case.config(), rank, got, self.expected)

    def together(self, order: Sequence[Half]) -> None:
        """Every half on all ranks before the next half."""
        self.run([(rank, half) for half in order for rank in range(self.case.num_ranks)])

    def one_round(self, number: int = 0) -> None:
        """A whole round."""
        self.together([(half, number) for half in HALVES])

    def epochs(self) -> list[int]:
        """Rounds begun, by rank."""
        return [a2a.epoch for a2a in self.ranks]
