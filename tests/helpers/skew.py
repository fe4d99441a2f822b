"""Delays between the halves of a round, random but seeded, so that ranks drift apart."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Skew:
    """Delays of one run.

    Attributes:
        seed: same seed, same delays.
        longest_s: the longest delay, in seconds.
    """

    seed: int
    longest_s: float = 2e-3

    def delays(self, rank: int) -> Iterator[float]:
        """Endless delays of one rank, in seconds: none, short or the longest, so that ranks meet and part again."""
        numbers = random.Random(f"{self.seed}/{rank}")
        while True:
            yield numbers.choice((0.0, 0.0, numbers.random() * self.longest_s, self.longest_s))

    def pauses(self, rank: int) -> Iterator[None]:
        """Sleeps at every step of the iteration."""
        for delay in self.delays(rank):
            if delay:
                time.sleep(delay)
            yield
