"""Which calls the extension makes by itself, and the same calls without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moebius import MoebiusError
from tests.helpers.cases import Case
from tests.simt_engine.seats import Seats

if TYPE_CHECKING:
    from collections.abc import Callable

    from moebius import AllToAll

HALVES = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")


def small(mode: str = "expert", payload: str = "bf16", num_ranks: int = 1) -> Case:
    hidden = 512 if payload.startswith("fp8") else 16
    return Case(
        num_ranks=num_ranks,
        num_experts=4 * num_ranks,
        num_topk=2,
        hidden=hidden,
        max_num_tokens=4,
        mode=mode,
        payload=payload,
    )


class Counted:
    """The extension's calls, and how many of each it made.

    Attributes:
        made: by name; those that it declined are not in it.
    """

    def __init__(self, a2a: AllToAll) -> None:
        self._plain = a2a.plain
        assert self._plain is not None
        self.made: list[str] = []
        a2a.plain = self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        half = getattr(self._plain, name)

        def call(*arguments: Any) -> Any:
            result = half(*arguments)
            if result is not None:
                self.made.append(name)
            return result

        return call

    def taken(self) -> list[str]:
        """Those since the last time."""
        made, self.made = self.made, []
        return made


def taken_by(seats: Seats, number: int = 0) -> list[str]:
    """The halves of a round of one rank that the extension made by itself; its result is right."""
    counted = Counted(seats.ranks[0])
    seats.round(number)
    seats.ranks[0].plain = counted._plain
    return counted.taken()


def plain_inputs(seats: Seats, number: int) -> tuple[Any, Any, Any]:
    inputs = seats.expected[number].inputs[0]
    return inputs.x, inputs.topk_ids, inputs.topk_weights


class Alike:
    """One rank twice: as it is, and without the extension's own calls. Both are called alike.

    Attributes:
        seats: of either.
        counted: what the extension made for the first.
    """

    def __init__(self, case: Case) -> None:
        self.seats = [Seats(case), Seats(case)]
        for seats in self.seats:
            seats.round(0)
            seats.round(1)
        self.counted = Counted(self.seats[0].ranks[0])
        self.seats[1].ranks[0].plain = None

    def call(self, what: Callable[[Seats], Any]) -> Any:
        """What it comes to, the same in both: the error's type and text, or the first result."""
        found = []
        for seats in self.seats:
            a2a = seats.ranks[0]
            before = None if a2a.closed else a2a.epoch
            try:
                found.append(what(seats))
            except (MoebiusError, TypeError) as error:
                found.append((type(error), str(error)))
                assert a2a.closed or a2a.epoch == before
        if isinstance(found[0], tuple) or isinstance(found[1], tuple):
            assert found[0] == found[1]
        return found[0]
