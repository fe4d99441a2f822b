"""What a rank does in a test of faults: rounds, with an accident at a given place. Processes import it by name."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

from moebius import AllToAll, Config, PeerTimeoutError
from tests.helpers.rounds import Halves, RankRound, Received
from tests.helpers.schedules import HALVES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

WAIT_S = 0.3  # long enough to be in the wait, on a busy machine; being late only makes another point of the kill


@dataclasses.dataclass(frozen=True)
class Accident:
    """What happens to a rank, and where.

    Attributes:
        number: of the round.
        before: the half it happens before.
        what: "kill" or "stop" at once, "kill-inside" a moment later, in the half; "sleep" for a while; "close" and end.
    """

    number: int
    before: str
    what: str

    def happen(self) -> None:
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.what == "kill-inside":
            threading.Timer(WAIT_S, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif self.what == "sleep":
            time.sleep(3 * WAIT_S)


@dataclasses.dataclass(frozen=True)
class Played:
    """What a rank went through.

    Attributes:
        received: by round, also of rounds lost later.
        combined: by round.
        kept: as in `Halves`.
        lost: by round: the attributes of its error, the message, and `took_s`, how long the half took.
        dead_ranks: at the end.
        epoch: at the end.
    """

    received: dict[int, Received]
    combined: dict[int, Tensor]
    kept: dict[int, Received]
    lost: dict[int, dict[str, Any]]
    dead_ranks: tuple[int, ...]
    epoch: int


def play(
    group: Any,
    config: Config,
    rounds: Sequence[RankRound],
    accidents: Sequence[Accident] = (),
    halves_called: Sequence[str] = HALVES,
) -> Played:
    """Rounds one after another; one that a rank fails in is given up for the next."""
    with AllToAll(group, config) as a2a:
        halves = Halves(a2a, rounds)
        lost: dict[int, dict[str, Any]] = {}
        for number in range(len(rounds)):
            for half in halves_called:
                for accident in accidents:
                    if (accident.number, accident.before) == (number, half):
                        if accident.what == "close":
                            return Played(halves.received, halves.combined, {}, lost, a2a.dead_ranks, a2a.epoch)
                        accident.happen()
                start = time.monotonic()
                try:
                    getattr(halves, half)(number)
                except PeerTimeoutError as error:
                    lost[number] = {**vars(error), "message": str(error), "took_s": time.monotonic() - start}
                    break
        return Played(halves.received, halves.combined, {}, lost, a2a.dead_ranks, a2a.epoch)
