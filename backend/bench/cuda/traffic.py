"""The bytes that each half must move through device memory, counted from the routing.

Rows only: no headers, ids, weights or signals, which any implementation may shape as it likes. A row that several
experts of a rank take is read once and written for each of them. In rows of all ranks together:

    half            reads                                          writes
    dispatch_send   T rows as they are given                       a row (payload, scales) per (token, rank)
    dispatch_recv   a row per (token, rank)                        expert_major: one per (token, expert);
                                                                   token_major: one per (token, rank)
    combine_send    expert_major: a row per (token, expert);       a row per (token, rank)
                    token_major: one per (token, rank)
    combine_recv    a row per (token, rank)                        T rows
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moebius.bench.workload import input_dtype, output_row_bytes, payload_row_bytes

from .schedules import HALVES, OPS

if TYPE_CHECKING:
    from moebius.bench.workload import RowCounts
    from moebius.config import Config


def half_bytes(rows: list[RowCounts], config: Config) -> dict[str, int]:
    """Bytes read plus written by each half, each operation and the round, of all the ranks in `rows`."""
    tokens = sum(row.tokens for row in rows)
    sent, received = sum(row.sent for row in rows), sum(row.received for row in rows)
    kept = sum(row.pairs for row in rows) if config.layout == "expert_major" else received
    given = config.hidden * input_dtype(config).itemsize
    travels, back = payload_row_bytes(config), output_row_bytes(config)
    halves = (
        tokens * given + sent * travels,
        (received + kept) * travels,
        (kept + received) * back,
        (sent + tokens) * back,
    )
    found = {half: round(moved) for half, moved in zip(HALVES, halves, strict=True)}
    found |= {op: sum(found[half] for half in of) for op, of in OPS.items()}
    return {**found, "round": found["dispatch"] + found["combine"]}
