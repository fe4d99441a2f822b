"""Which halves of which rounds have run: the order of calls, checked before anything happens."""

from __future__ import annotations

import enum

from .errors import MoebiusError, StateError


class Stage(enum.IntEnum):
    """How far a round has come on this rank."""

    SENT = 0  # dispatch send has run
    RECEIVED = 1
    REPLIED = 2  # combine send has run
    COMBINED = 3
    LOST = 4  # a rank failed in it
    OVERWRITTEN = 5  # its slot serves a later round


# For every call's path: before Python 3.12, to read a member from its class is to call a function.
SENT, RECEIVED, REPLIED, COMBINED, LOST, OVERWRITTEN = Stage

NEXT_CALL = {
    Stage.SENT: "receive() of its dispatch",
    Stage.RECEIVED: "combine() of its result",
    Stage.REPLIED: "receive() of its combine",
}


STALE = "{}: the result of round {} is stale, a later dispatch reuses its memory"


class Round:
    """One round on this rank.

    Attributes:
        epoch: its number.
        num_tokens: T of this rank's dispatch.
        stage: how far it has come.
        is_in_place: whether its result is shown where it arrived, in memory that peers write to again.
        error: why it was lost.
        handle: address of the word that a device keeps its number in; 0 where the host does.
        capture: number of the capture that it belongs to, 0 for none.
        kept: what has to live as long as it does.
    """

    __slots__ = ("capture", "epoch", "error", "handle", "is_in_place", "kept", "num_tokens", "stage")

    def __init__(self, epoch: int, num_tokens: int, is_in_place: bool, handle: int, capture: int, kept: object) -> None:
        """Begin it."""
        self.epoch = epoch
        self.num_tokens = num_tokens
        self.stage = SENT
        self.is_in_place = is_in_place
        self.error: MoebiusError | None = None
        self.handle = handle
        self.capture = capture
        self.kept = kept

    def lose(self, error: MoebiusError) -> MoebiusError:
        """Mark it lost, for the error that is returned."""
        self.stage = Stage.LOST
        self.error = error
        return error

    def refusal(self, stage: Stage, call: str) -> MoebiusError:
        """Why `call`, which needs the round to be at `stage`, cannot run.

        Returns:
            A `StateError` that says what has to come first, or that it is too late; or what the round was lost with.
        """
        if self.stage is Stage.LOST and self.error is not None:
            return self.error
        if self.stage is Stage.OVERWRITTEN:
            return StateError(STALE.format(call, self.epoch))
        if self.stage < stage:
            return StateError(f"{call}: round {self.epoch} expects {NEXT_CALL[self.stage]} first")
        return StateError(f"{call}: round {self.epoch} has already been through it")

    def check_live(self) -> None:
        """Check that this rank's own tensors still hold the round's result.

        Raises:
            StateError: a later dispatch reuses their memory.
        """
        if self.stage is OVERWRITTEN:
            raise StateError(STALE.format("result", self.epoch))

    def check_arrived(self) -> None:
        """Check that the tokens of the round's result are still there.

        Raises:
            StateError: a later dispatch reuses their memory, or the other ranks may, after a combine of a result that
                is shown in place.
        """
        self.check_live()
        if self.is_in_place and self.stage > RECEIVED:
            raise StateError(
                f"result: combine gave the memory of the tokens of round {self.epoch} back to their senders, for they "
                "are shown in place (token_major)"
            )


class RoundTable:
    """The last round of each of the `depth` slots.

    Attributes:
        slots: them; None for a slot without one.
    """

    def __init__(self, depth: int, *, is_in_place: bool) -> None:
        """Start with no round."""
        self._is_in_place = is_in_place
        self.slots: list[Round | None] = [None] * depth

    def check_free(self, epoch: int) -> None:
        """Check that round `epoch` may take its slot.

        Raises:
            StateError: the round before it in the slot still expects a receive.
        """
        last = self.slots[epoch % len(self.slots)]
        if last is not None and (last.stage is SENT or last.stage is REPLIED):
            raise StateError(
                f"dispatch: round {last.epoch} still expects {NEXT_CALL[last.stage]}; "
                f"at most depth = {len(self.slots)} rounds may be open"
            )

    def begin(self, epoch: int, num_tokens: int, handle: int = 0, capture: int = 0, kept: object = None) -> Round:
        """Give the slot of round `epoch` to it; what it held becomes stale. The others as in `Round`."""
        slot = epoch % len(self.slots)
        last = self.slots[slot]
        if last is not None and last.stage is not LOST:
            last.stage = OVERWRITTEN
        begun = self.slots[slot] = Round(epoch, num_tokens, self._is_in_place, handle, capture, kept)
        return begun

    def live(self) -> list[Round]:
        """The rounds whose memory serves no later one, and that are not lost."""
        return [begun for begun in self.slots if begun is not None and begun.stage < Stage.LOST]

    def find(self, epoch: int) -> Round:
        """The round `epoch`.

        Raises:
            StateError: a later one has its slot, or it has not begun.
        """
        found = self.slots[epoch % len(self.slots)]
        if found is None or found.epoch != epoch:
            raise StateError(f"round {epoch} is stale: a later dispatch reuses its memory")
        return found
