"""Virtual ranks of the emulated engine, and rounds of theirs in one thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import moebius
from tests.helpers.rounds import Expected, check_received, copied, dispatch_arguments, expect
from tests.helpers.simt import SimtAllToAll, extension

if TYPE_CHECKING:
    from torch import Tensor

    from moebius import Dispatched, PendingCombine, PendingDispatch
    from tests.helpers.cases import Case


class Seats:
    """The ranks of a case, its first rounds, and what to call.

    Attributes:
        case: the case.
        expected: its rounds.
        ranks: an `AllToAll` for each rank.
    """

    def __init__(self, case: Case, count: int = 6) -> None:
        self.case = case
        self.expected: list[Expected] = [expect(case, number) for number in range(count)]
        config = case.config()
        self.ranks = [SimtAllToAll(group, config) for group in moebius.virtual_ranks(case.num_ranks)]

    def send(self, rank: int, number: int) -> PendingDispatch:
        arguments = dispatch_arguments(self.case.config(), self.expected[number].inputs[rank])
        return self.ranks[rank].dispatch_send(**arguments)

    def reply(self, rank: int, number: int, recv: Dispatched) -> PendingCombine:
        round_ = self.expected[number]
        late = round_.inputs[rank].topk_weights if self.case.mode == "expert-late" else None
        return self.ranks[rank].combine_send(round_.expert_out[rank], recv, late)

    def call(self, number: int) -> tuple[list[Dispatched], list[Tensor]]:
        """All halves of a round on all ranks; nothing is waited for."""
        everyone = range(len(self.ranks))
        sent = [self.send(rank, number) for rank in everyone]
        received = [pending.receive() for pending in sent]
        replies = [self.reply(rank, number, received[rank]) for rank in everyone]
        return received, [pending.receive() for pending in replies]

    def dispatch(self, rank: int, number: int) -> Dispatched:
        """Both halves in one call."""
        return self.ranks[rank].dispatch(**dispatch_arguments(self.case.config(), self.expected[number].inputs[rank]))

    def combine(self, rank: int, number: int, recv: Dispatched) -> Tensor:
        """Both halves in one call."""
        round_ = self.expected[number]
        late = round_.inputs[rank].topk_weights if self.case.mode == "expert-late" else None
        return self.ranks[rank].combine(round_.expert_out[rank], recv, late)

    def wait(self) -> None:
        for a2a in self.ranks:
            a2a.synchronize()

    def check(self, number: int, received: list[Dispatched], combined: list[Tensor], what: str = "") -> None:
        """Compare a round with the reference; the world is idle."""
        round_ = self.expected[number]
        for rank, recv in enumerate(received):
            check_received(self.case.config(), copied(recv), round_.dispatched[rank], f"{what} rank {rank}: ")
        for rank, home in enumerate(combined):
            same = (home == round_.combined[rank]) | (home.isnan() & round_.combined[rank].isnan())
            assert bool(same.all()), f"{what} rank {rank}: combined"

    def round(self, number: int) -> None:
        """A whole round, waited for and compared."""
        received, combined = self.call(number)
        self.wait()
        self.check(number, received, combined)

    def device_epochs(self) -> list[int]:
        return [a2a._engine._native.num_rounds() for a2a in self.ranks]  # type: ignore[union-attr]

    def close(self) -> None:
        for a2a in self.ranks:
            a2a.close()


def idle() -> None:
    """Run all that is enqueued; what a kernel recorded stays where it is."""
    extension().run_until_idle()
