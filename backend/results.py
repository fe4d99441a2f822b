"""What dispatch and combine return: typed, and unusable once it is out of date."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from .all_to_all import AllToAll
    from .rounds import Round
    from .slots import SlotBuffers


Result = TypeVar("Result")


@dataclasses.dataclass
class ResultTensors:
    """The tensors of a dispatch's result, wherever they are held; `Dispatched` says what each is."""

    x: Tensor
    scales: Tensor | None
    expert_num_tokens: Tensor
    src_num_tokens: Tensor
    topk_ids: Tensor | None
    topk_weights: Tensor | None
    src_info: Tensor | None
    layout_range: Tensor | None


# In the order in which operators return them.
RESULT_NAMES = tuple(field.name for field in dataclasses.fields(ResultTensors))


class Dispatched:
    """The tokens that a round brought to this rank's experts.

    The tensors belong to the round's slot: they are overwritten `depth` dispatches later, and reading them from
    then on raises `StateError`; so does, on the CPU, reading the tokens of a token_major result once its combine has
    begun, which gives them back to their senders. On CUDA the host has them before they have come; of a round that
    failed, the counts are zero. In the shapes, L is local experts, R ranks, M `max_num_tokens`, K top-k.

    Attributes:
        num_tokens: T of this rank's own dispatch.
    """

    __slots__ = ("_buffers", "_round", "num_tokens")

    def __init__(self, begun: Round, buffers: SlotBuffers) -> None:
        """Tie a round to the buffers that it was received into."""
        self._round = begun
        self._buffers = buffers
        self.num_tokens = begun.num_tokens

    @property
    def epoch(self) -> int:
        """Number of the round."""
        return self._round.epoch

    @property
    def x(self) -> Tensor:
        """The tokens, in the payload's dtype (uint8 for opaque).

        expert_major: [L, R*M, H]; the rows of expert l are the first `expert_num_tokens[l]`, ordered by (source rank,
        token); those past it are undefined. token_major: [R*M, H], on the CPU the inbox itself: the rows of source
        rank r are the `src_num_tokens[r]` from r*M on, in token order.
        """
        self._round.check_arrived()
        return self._buffers.x

    @property
    def scales(self) -> Tensor | None:
        """Scales of the payload's groups of 128, [L, R*M, H/128] fp32, or [.., H/512] int32 of packed UE8M0.

        Column-major in the last two dimensions for expert_major (as DeepGEMM reads them), [R*M, ..] row-major for
        token_major; [.., scale_bytes] uint8, row-major, for opaque; None for a payload without scales.
        """
        self._round.check_arrived()
        return self._buffers.scales

    @property
    def expert_num_tokens(self) -> Tensor:
        """[L] int32: tokens for each local expert."""
        self._round.check_live()
        return self._buffers.expert_num_tokens

    @property
    def src_num_tokens(self) -> Tensor:
        """[R] int32: tokens that each rank sent here."""
        self._round.check_live()
        return self._buffers.src_num_tokens

    @property
    def topk_ids(self) -> Tensor | None:
        """token_major: [R*M, K] int32, local expert or -1 (all -1 in unused rows); else None."""
        self._round.check_arrived()
        return self._buffers.topk_ids

    @property
    def topk_weights(self) -> Tensor | None:
        """token_major: [R*M, K] fp32; else None."""
        self._round.check_arrived()
        return self._buffers.topk_weights

    @property
    def src_info(self) -> Tensor | None:
        """expert_major: [L, R*M] int32, index of each row's token at its source; else None."""
        self._round.check_live()
        return self._buffers.src_info

    @property
    def layout_range(self) -> Tensor | None:
        """expert_major: [L, R] int64, first row << 32 | rows, of each source; else None."""
        self._round.check_live()
        return self._buffers.layout_range


class Pending(Generic[Result]):
    """An operation whose send half has run."""

    __slots__ = ("_owner", "_rest", "_result", "_round")

    def __init__(self, begun: Round, owner: AllToAll, rest: tuple[Any, ...]) -> None:
        """Hold whose receive half is to run, and what it takes after the round."""
        self._round = begun
        self._owner: AllToAll | None = owner
        self._rest = rest
        self._result: Result | None = None

    @property
    def epoch(self) -> int:
        """Number of the round."""
        return self._round.epoch

    def receive(self) -> Result:
        """Run the receive half, once; again, and it returns the same result.

        Raises:
            PeerTimeoutError: a rank did not deliver within the deadline; the round is lost.
            StateError: the object was closed.
        """
        raise NotImplementedError

    def _settle(self, result: Result) -> None:
        """Keep the result, and nothing else; the extension does the same."""
        self._result = result
        self._owner, self._rest = None, ()


class PendingDispatch(Pending[Dispatched]):
    """A dispatch whose send half has run; `receive` waits for every rank's tokens and lays them out."""

    __slots__ = ()

    def receive(self) -> Dispatched:
        """See `Pending`."""
        owner = self._owner
        if owner is not None:
            plain = owner.plain
            if plain is None or plain.dispatch_recv(self) is None:
                self._settle(owner._receive_dispatch(self._round, *self._rest))
        assert self._result is not None
        return self._result


class PendingCombine(Pending["Tensor"]):
    """A combine whose send half has run; `receive` waits for the rows of this rank's tokens and adds them up."""

    __slots__ = ()

    def receive(self) -> Tensor:
        """See `Pending`."""
        owner = self._owner
        if owner is not None:
            plain = owner.plain
            if plain is None or plain.combine_recv(self) is None:
                self._settle(owner._receive_combine(self._round, *self._rest))
        assert self._result is not None
        return self._result
