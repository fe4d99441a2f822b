"""Bytes that cross from one rank to another, for three ways of sending the same tokens."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .workload import RowCounts, output_row_bytes, payload_row_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from moebius.all_to_all import AllToAll
    from moebius.config import Config

_COUNT_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Wire:
    """Bytes that one rank sends to the others, on average over the ranks.

    Attributes:
        dispatch: tokens, their headers and signals or counts.
        combine: rows, and signals.
    """

    dispatch: float
    combine: float

    @property
    def round(self) -> float:
        """Both."""
        return self.dispatch + self.combine


def measure(exchange: AllToAll, rounds: Iterable[Callable[[], Callable[[], object]]]) -> Wire:
    """What `exchange` says it has written to other ranks, per round.

    Args:
        exchange: this rank's.
        rounds: each runs a dispatch and returns what runs its combine.
    """
    dispatched = combined = count = 0
    for dispatch in rounds:
        start = exchange.remote_bytes
        combine = dispatch()
        middle = exchange.remote_bytes
        combine()
        dispatched += middle - start
        combined += exchange.remote_bytes - middle
        count += 1
    return Wire(dispatched / count, combined / count)


def mean_wire(ranks: list[Wire]) -> Wire:
    """The average over ranks."""
    return Wire(_mean([one.dispatch for one in ranks]), _mean([one.combine for one in ranks]))


def gloo_wire(rows: list[RowCounts], config: Config, message_bytes: int) -> Wire:
    """The baseline: one message per (token, rank), one row back; a count a peer in dispatch."""
    return Wire(
        _mean([row.sent_away for row in rows]) * message_bytes + _COUNT_BYTES * (len(rows) - 1),
        _mean([row.received_away for row in rows]) * output_row_bytes(config),
    )


def per_expert_wire(rows: list[RowCounts], config: Config) -> Wire:
    """One message per (token, expert) and one row back each, as DeepEP V1: 16 bytes of header, no weights."""
    pairs = _mean([row.pairs_away for row in rows])
    return Wire(pairs * (16 + payload_row_bytes(config)), pairs * output_row_bytes(config))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
