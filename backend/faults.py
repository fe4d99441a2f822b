"""The exception of a fault that an engine recorded."""

from __future__ import annotations

from typing import Any

from .errors import MoebiusError, PeerTimeoutError, ProtocolError, RoutingError, StateError

# csrc/fault.h: FaultKind, Reason and Half, this one as (op, half).
FAULT_ROUTING, FAULT_TIMEOUT, FAULT_STALE = 1, 2, 4
REASONS = ("deadline", "died", "reported")
HALVES = (("dispatch", "send"), ("dispatch", "recv"), ("combine", "send"), ("combine", "recv"))


def error_of(fault: dict[str, Any], op: str, half: str, num_experts: int) -> MoebiusError:
    """Make the exception.

    Args:
        fault: the engine's record, its fields named as in csrc/fault.h.
        op: "dispatch" or "combine".
        half: "send" or "recv".
        num_experts: E.
    """
    if fault["kind"] == FAULT_ROUTING:
        return RoutingError(
            f"`topk_ids[{fault['token']}, {fault['choice']}]` must be -1 or an expert in [0, {num_experts}) "
            f"(got {fault['observed']})"
        )
    if fault["kind"] == FAULT_TIMEOUT:
        keys = ("rank", "epoch", "waited_us", "expected", "observed", "via")
        return PeerTimeoutError(op=op, half=half, reason=REASONS[fault["reason"]], **{key: fault[key] for key in keys})
    if fault["kind"] == FAULT_STALE:
        return StateError(
            f"{op} {half} of round {fault['epoch']}: too many rounds came in between, as of a graph that was replayed "
            "between the halves of an eager round; finish a round before the replay"
        )
    return ProtocolError(
        f"{op} {half} of round {fault['epoch']}: rank {fault['rank']} sent what the protocol does not allow "
        f"(expected epoch {fault['expected']}, observed {fault['observed']})"
    )
