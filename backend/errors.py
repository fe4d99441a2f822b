"""Every exception moebius raises. The docstring of each says who can recover, and how."""

from __future__ import annotations

from typing import Any


class MoebiusError(RuntimeError):
    """Base of all errors of this package; catch it to catch them all."""


class ConfigError(MoebiusError, ValueError):
    """A `Config` (or a constructor argument) is impossible. Recover by constructing with other values."""


class ShapeError(MoebiusError, ValueError):
    """A tensor's shape, dtype, strides or device disagrees with the config.

    Raised before anything changed: correct the tensor and call again.
    """


class RoutingError(MoebiusError, ValueError):
    """A value inside `topk_ids` is no expert, or disagrees with the dispatch it belongs to.

    Raised before anything changed: correct the routing and call again.
    """


class StateError(MoebiusError):
    """A call breaks the order of a round: a receive left out, a stale result combined, a closed object used.

    Raised before anything changed. It is a bug of the calling code; the object stays usable.
    """


class PeerAccessError(MoebiusError):
    """The memory of another rank cannot be mapped, or its host not be reached.

    Recover by the change of environment it names.
    """


class NativeNotBuiltError(MoebiusError, ImportError):
    """A compiled extension is missing. The message says how to build it."""


class CudaError(MoebiusError):
    """A call of CUDA failed. The message says what is missing where that is the reason: a GPU, a driver, a newer one.

    After an error of a kernel ("illegal memory access" and the like) the process cannot use its GPU any more. What
    came from a missing or unfit device is recovered from by running where there is one.

    Attributes:
        call: the function of CUDA's that failed.
        code: what it returned, a `cudaError_t`; for names in "cu" and a capital a `CUresult`, in "nvshmem" its status.
    """

    def __init__(self, call: str, code: int, message: str) -> None:
        """Take the call, its result and the message."""
        super().__init__(message)
        self.call = call
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes."""
        return CudaError, (self.call, self.code, str(self))


class ProtocolError(MoebiusError):
    """A signal from the future or a malformed message: ranks disagree about the order of calls, or memory is damaged.

    Not recoverable: close the object on every rank.
    """


class PeerTimeoutError(MoebiusError, TimeoutError):
    """A rank did not deliver within the deadline, or its process has died.

    The round is lost; the rank is masked from now on (`AllToAll.dead_ranks`), and the next dispatch starts a
    round among the others. Recover by going on without it, or by closing.

    Attributes:
        op: "dispatch" or "combine".
        half: "send" or "recv": the half that waited.
        rank: the rank that is blamed.
        epoch: the round.
        waited_us: how long the wait lasted, in microseconds.
        expected: the epoch that was waited for.
        observed: the epoch found in the signal word instead.
        reason: "deadline", "died" (its process is gone) or "reported" (another rank gave it up and said so).
        via: the rank that reported it, or that was itself held up by it; -1 when it was waited for directly.
    """

    def __init__(
        self,
        *,
        op: str,
        half: str,
        rank: int,
        epoch: int,
        waited_us: float,
        expected: int,
        observed: int,
        reason: str,
        via: int = -1,
    ) -> None:
        """Build the message from the record the engine left."""
        self._fields = {
            "op": op,
            "half": half,
            "rank": rank,
            "epoch": epoch,
            "waited_us": waited_us,
            "expected": expected,
            "observed": observed,
            "reason": reason,
            "via": via,
        }
        self.op = op
        self.half = half
        self.rank = rank
        self.epoch = epoch
        self.waited_us = waited_us
        self.expected = expected
        self.observed = observed
        self.reason = reason
        self.via = via
        why = {
            "deadline": "did not arrive within the deadline",
            "died": "died",
            "reported": f"was given up by rank {via}",
        }[reason]
        through = f" (seen through rank {via})" if via >= 0 and reason != "reported" else ""
        super().__init__(
            f"{op} {half} of round {epoch}: rank {rank} {why}{through} after {waited_us:.0f} us "
            f"(expected epoch {expected}, observed {observed}); the rank is masked, the next dispatch "
            "starts a round without it"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes, as what ranks report to their parent."""
        return _timeout_of, (self._fields,)


def _timeout_of(fields: dict[str, Any]) -> PeerTimeoutError:
    return PeerTimeoutError(**fields)


class UnsupportedError(MoebiusError, NotImplementedError):
    """A call that an interface we stand in for has, and this package does not cover. Its message says what is."""


class UnknownKeywordError(MoebiusError, TypeError):
    """A keyword outside the signature of a drop-in. Recover by leaving it out; the message lists the supported set."""


class VersionError(MoebiusError, ImportError):
    """A package that we adapt to has changed under us. The message says where, and which versions fit.

    Raised before anything of it was changed. Recover by installing one of those, or by not choosing the adapter.
    """
