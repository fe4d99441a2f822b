"""Programs that engines run on a rank; see `engines`. Processes import them by name."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from tests.helpers.rounds import Halves, RankRound, Result

if TYPE_CHECKING:
    from moebius import AllToAll

Half = tuple[str, int]


def whole_rounds(a2a: AllToAll, rounds: Sequence[RankRound]) -> Generator[None, None, Result]:
    """One round after another, all four halves of each."""
    halves = Halves(a2a, rounds)
    for number in range(len(rounds)):
        halves.dispatch_send(number)
        yield
        halves.dispatch_receive(number)
        halves.combine_send(number)
        yield
        halves.combine_receive(number)
    return Result(halves.received, halves.combined)


def ordered(a2a: AllToAll, rounds: Sequence[RankRound], order: Sequence[Half]) -> Generator[None, None, Result]:
    """The halves in the order given; see `schedules`."""
    halves = Halves(a2a, rounds)
    for half, number in order:
        getattr(halves, half)(number)
        yield
    return Result(halves.received, halves.combined)
