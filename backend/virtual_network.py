"""An emulated network between the virtual ranks of one process, for tests and simulation."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, NamedTuple

from . import native
from .errors import ConfigError, StateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from . import _core


class Requests(NamedTuple):
    """What a rank has asked of its network so far.

    Attributes:
        put_signals: messages that end with a signal; with weights at dispatch, and without chunks, one for each remote
            rank and half.
        puts: parts of messages.
        num_bytes: of data.
    """

    put_signals: int
    puts: int
    num_bytes: int


@dataclasses.dataclass(eq=False)
class VirtualNetwork:
    """Virtual ranks on several virtual hosts, and the links between the hosts. For `virtual_ranks`.

    Messages are delivered by a thread: as late, in as many pieces and in as odd an order across pairs of ranks as is
    drawn from the seed, each message's signal after its data, the messages of a pair in order.

    Attributes:
        ranks_per_host: consecutive ranks share a host; the last host may have fewer.
        seed: of all that is drawn.
        latency_us: from a message's leaving to its arriving.
        max_delay_us: at most that much more, drawn for every message before it leaves, and for every piece.
        max_piece_bytes: messages arrive in pieces of at most that; 0: whole.
        gbps: of each rank's way out and way in, in 10^9 bits a second; 0: no limit.

    Raises:
        ConfigError: a number is out of its range.
    """

    ranks_per_host: int
    seed: int = 0
    latency_us: float = 0.0
    max_delay_us: float = 0.0
    max_piece_bytes: int = 0
    gbps: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not isinstance(self.ranks_per_host, int) or self.ranks_per_host < 1:
            raise ConfigError(f"`ranks_per_host` must be an int of at least 1 (got {self.ranks_per_host!r})")
        for name in ("seed", "latency_us", "max_delay_us", "max_piece_bytes", "gbps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1e12:
                raise ConfigError(f"`{name}` must be a number in [0, 1e12] (got {value!r})")
        self._made: list[_core.EmulatedNetwork] = []

    def hosts(self, num_ranks: int) -> tuple[int, ...]:
        """The host of each rank, by number."""
        return tuple(rank // self.ranks_per_host for rank in range(num_ranks))

    def connect(self, layout: _core.HeapLayout, heaps: Sequence[_core.Segment]) -> _core.EmulatedNetwork:
        """Make the network of one `AllToAll` object of all ranks; for `heap`."""
        made: _core.EmulatedNetwork = native.core().EmulatedNetwork(
            layout=layout,
            heaps=list(heaps),
            seed=int(self.seed) + len(self._made),
            latency_ns=round(self.latency_us * 1e3),
            max_delay_ns=round(self.max_delay_us * 1e3),
            max_piece_bytes=int(self.max_piece_bytes),
            bytes_per_ns=self.gbps / 8,
        )
        self._made.append(made)
        return made

    def requests(self, rank: int) -> Requests:
        """What `rank` has asked for, of the last object that was made."""
        return Requests(*self._last().traffic(rank))

    @property
    def num_refused(self) -> int:
        """Messages that a receiver did not let into its heap, over all objects; 0 unless something is broken."""
        return sum(made.num_refused for made in self._made)

    def cut(self, a: int, b: int, *, after_s: float = 0.0, stalled: bool = False) -> None:
        """Let nothing pass between two ranks any more, in all objects.

        Args:
            a: a rank.
            b: another.
            after_s: seconds from now.
            stalled: messages do not even leave, instead of vanishing on the way.
        """
        for made in self._made:
            made.cut(a, b, round(after_s * 1e9), stalled)

    def cut_off(self, ranks: Sequence[int], num_ranks: int, *, after_s: float = 0.0, stalled: bool = False) -> None:
        """Cut every pair of one of `ranks` and one of the other ranks; as `cut`."""
        others = [rank for rank in range(num_ranks) if rank not in ranks]
        for a, b in itertools.product(ranks, others):
            self.cut(a, b, after_s=after_s, stalled=stalled)

    def wait_idle(self, timeout_s: float = 10.0) -> bool:
        """Wait until nothing is under way; False after `timeout_s`."""
        return all(made.wait_idle(round(timeout_s * 1e9)) for made in self._made)

    def forget(self) -> None:
        """Let go of the networks of objects that are closed, with their memory."""
        self._made.clear()

    def _last(self) -> _core.EmulatedNetwork:
        if not self._made:
            raise StateError("no object uses this network yet")
        return self._made[-1]
