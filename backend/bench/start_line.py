"""A barrier in shared memory, so that ranks enter a timed call within about a microsecond of each other."""

from __future__ import annotations

import os
from typing import Any

SLOT_WORDS = 16  # one 128-byte line a rank
_SPINS_PER_YIELD = 200  # arbitrary: some 20 us of Python


class StartLine:
    """The barrier as one rank sees it.

    Every rank writes its own word and reads the others': nothing is reset, so it cannot be left half passed. It only
    aligns clocks; no data depends on its memory order. It has no deadline of its own: the parent process has (`ranks`).
    """

    def __init__(self, shared: Any, rank: int, num_ranks: int, num_cores: int) -> None:
        """Look at `shared`, an array of `num_ranks * SLOT_WORDS` int64, as `rank`."""
        self._words = memoryview(shared).cast("B").cast("q")
        self._own = rank * SLOT_WORDS
        self._others = [peer * SLOT_WORDS for peer in range(num_ranks) if peer != rank]
        self._round = 0
        # With more ranks than cores a spinning rank holds the core that the awaited one needs.
        self._spins = _SPINS_PER_YIELD if num_ranks <= num_cores else 0

    def wait(self) -> None:
        """Return when all ranks have called."""
        self._round += 1
        words, epoch = self._words, self._round
        words[self._own] = epoch
        for peer in self._others:
            spins = 0
            while words[peer] < epoch:
                spins += 1
                if spins > self._spins:
                    os.sched_yield()
                    spins = 0
