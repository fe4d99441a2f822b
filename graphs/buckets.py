"""The batch sizes that a step is captured for."""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

from moebius.errors import ConfigError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Buckets:
    """Batch sizes, ascending; a batch runs in the smallest that holds it.

    Attributes:
        sizes: the buckets, in tokens.
    """

    __slots__ = ("sizes",)

    def __init__(self, sizes: Iterable[int]) -> None:
        """Take the sizes in any order.

        Raises:
            ConfigError: there is none, or one is no int of at least 1.
        """
        given = list(sizes)
        for size in given:
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ConfigError(f"`buckets` must be ints of at least 1 (got {size!r})")
        if not given:
            raise ConfigError("`buckets` must name at least one batch size (got none)")
        self.sizes: tuple[int, ...] = tuple(sorted(set(given)))

    @classmethod
    def up_to(cls, largest: int) -> Buckets:
        """The powers of two below `largest`, and `largest`: at most every other row of a batch is padding."""
        return cls([*(1 << power for power in range(max(0, largest - 1).bit_length())), largest])

    @property
    def largest(self) -> int:
        """Most tokens of a batch."""
        return self.sizes[-1]

    def of(self, num_tokens: int) -> int:
        """The bucket of a batch; the smallest for one without tokens.

        Raises:
            ShapeError: the batch is larger than every bucket.
        """
        if num_tokens > self.largest:
            raise ShapeError(f"a batch must have at most {self.largest} tokens, the largest bucket (got {num_tokens})")
        return self.sizes[bisect.bisect_left(self.sizes, num_tokens)]

    def __iter__(self) -> Iterator[int]:
        """Ascending."""
        return iter(self.sizes)

    def __len__(self) -> int:
        """How many."""
        return len(self.sizes)

    def __repr__(self) -> str:
        """As it would be constructed."""
        return f"Buckets({list(self.sizes)})"
