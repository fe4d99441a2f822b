"""The bytes a round must move, and how long this machine's memcpy takes for as many.

What must be moved, in rows (a row is one token without any header; `workload.RowCounts` has the counts), per rank:

- dispatch: read T rows and write one row per (token, rank); `expert_major` also reads and writes one per
  (token, expert);
- combine: read the experts' rows (one per (token, expert) in `expert_major`, one per received (token, rank) in
  `token_major`), write one row per received (token, rank), read one row per sent (token, rank) and write T rows.

The bound is the time in which all ranks at once copy half as many bytes each (a copy reads and writes every byte), in
one block, out of private memory. The part of the block that stands for rows of other ranks goes into another rank's
shared memory, which that rank has read since, so its cache lines must be fetched as those of a real message must; the
rest stays private. With more ranks than cores it is that time times ranks per core, for a core copies for one rank at a
time. No counting, no signals, no sums. `bench` copies with warm caches, as its rounds run; `demo` after
reading the weights of the rank's experts, as its steps do.
"""

from __future__ import annotations

import dataclasses
from time import perf_counter_ns as now
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .ranks import num_cores
from .timing import Stats, slowest_us, summarise
from .workload import RowCounts, output_row_bytes, payload_row_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moebius.config import Config

    from .ranks import RankContext
    from .timing import Instants

OPS = ("dispatch", "combine")
_COPY_SPANS = {"dispatch": ((0, 1),), "combine": ((2, 3),), "round": ((0, 1), (2, 3))}  # columns of `CopyBound.run`


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that one rank reads and writes in one operation, at least.

    Attributes:
        moved: reads plus writes.
        copied_away: of the `moved / 2` bytes to copy, those that go into other ranks' memory.
    """

    moved: int
    copied_away: int

    @property
    def copied(self) -> int:
        """Bytes whose copy moves as much."""
        return self.moved // 2


def dispatch_traffic(rows: RowCounts, config: Config) -> Traffic:
    """What dispatch must move on a rank."""
    pairs = rows.pairs if config.layout == "expert_major" else 0
    return _traffic(rows.tokens + pairs, rows.sent + pairs, rows.sent_away, payload_row_bytes(config))


def combine_traffic(rows: RowCounts, config: Config) -> Traffic:
    """What combine must move on a rank."""
    expert_rows = rows.pairs if config.layout == "expert_major" else rows.received
    reads, writes = expert_rows + rows.sent, rows.received + rows.tokens
    return _traffic(reads, writes, rows.received_away, output_row_bytes(config))


def _traffic(reads: float, writes: float, written_away: float, row_bytes: int) -> Traffic:
    moved = (reads + writes) * row_bytes
    away = moved / 2 * (written_away / writes) if writes else 0.0
    return Traffic(round(moved), round(away))


def round_traffic(rows: RowCounts, config: Config) -> tuple[Traffic, Traffic]:
    """Dispatch's and combine's."""
    return dispatch_traffic(rows, config), combine_traffic(rows, config)


def inbox_bytes(config: Config, num_ranks: int) -> int:
    """Shared memory that `CopyBound` needs of a rank, whatever the routing."""
    tokens, k = config.max_num_tokens, config.num_topk
    pairs = tokens * num_ranks * min(k, config.num_local_experts(num_ranks))
    worst = RowCounts(tokens, tokens * num_ranks, tokens * num_ranks, tokens * num_ranks, tokens * num_ranks, pairs)
    return max(traffic.copied for traffic in round_traffic(worst, config))


def bound_stats(ranks: Sequence[Sequence[tuple[int, ...]]]) -> dict[str, Stats]:
    """The bound of dispatch, of combine and of the round, from what `CopyBound.run` returned on each rank."""
    share = max(1.0, len(ranks) / num_cores())
    return {op: summarise(share * time for time in slowest_us(ranks, *spans)) for op, spans in _COPY_SPANS.items()}


class CopyBound:
    """Copies the bytes of a round, in step with the other ranks."""

    def __init__(self, context: RankContext, traffic: tuple[Traffic, Traffic]) -> None:
        """Make the blocks of this rank."""
        self._start_line = context.start_line
        self._copies: list[list[tuple[Tensor, Tensor]]] = []
        away = context.inboxes[(context.rank + 1) % context.num_ranks]
        own = context.inboxes[context.rank]
        size = max(one.copied for one in traffic)
        source = torch.randint(0, 255, (max(size, 1),), dtype=torch.uint8)
        private = torch.zeros_like(source)
        for one in traffic:
            cut = min(one.copied_away, one.copied)
            self._copies.append([(away[:cut], source[:cut]), (private[: one.copied - cut], source[cut : one.copied])])
        self._read = (torch.empty(size, dtype=torch.uint8), own[:size])

    def run(self, num_rounds: int, before: Callable[[], object] | None = None) -> Instants:
        """Copy `num_rounds` times.

        Args:
            num_rounds: how often.
            before: called before either copy, to leave the caches as the layer does; without, they are warm.

        Returns:
            Per round: begin and end of dispatch's bytes, begin and end of combine's.
        """
        times: Instants = []
        dispatch, combine = self._copies
        for _ in range(num_rounds):
            self._read[0].copy_(self._read[1])  # the lines go back to their owner, as when it reads a message
            if before is not None:
                before()
            self._start_line.wait()
            begin = now()
            for target, source in dispatch:
                target.copy_(source)
            end = combine_begin = now()
            if before is not None:
                before()
                self._start_line.wait()
                combine_begin = now()
            for target, source in combine:
                target.copy_(source)
            times.append((begin, end, combine_begin, now()))
        return times
