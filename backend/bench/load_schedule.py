"""Continuous batching: which requests are in which decode step. No clock of its own, so that it can be tested.

Every rank runs the whole of it, over all ranks, on the same ticks: so they agree without talking about anything else.
"""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .load_arrivals import Request


class Scheduler:
    """Requests go to the ranks in turn, wait there first come first served, and stay for `output` steps.

    Attributes:
        first_step: of each request, or -1: the step that makes its first token.
        last_step: of each request, or -1: the one that makes its last.
        sizes: tokens of each rank in the coming step.
        num_steps: that were run.
    """

    def __init__(self, requests: Sequence[Request], num_ranks: int, slots: int) -> None:
        """Begin with nothing running.

        Args:
            requests: in order of arrival.
            num_ranks: that they are spread over.
            slots: requests that may run on a rank at once.
        """
        self._due_ns = [round(one.t * 1e9) for one in requests]
        self._output = [one.output for one in requests]
        self._num_ranks, self._slots = num_ranks, slots
        self._waiting: list[collections.deque[int]] = [collections.deque() for _ in range(num_ranks)]
        self._ending: dict[int, list[int]] = collections.defaultdict(list)
        self._arrived = 0
        self.first_step = [-1] * len(requests)
        self.last_step = [-1] * len(requests)
        self.sizes = [0] * num_ranks
        self.num_steps = 0

    @property
    def is_idle(self) -> bool:
        """Whether no request runs or waits."""
        return not any(self.sizes) and not any(self._waiting)

    @property
    def next_arrival_ns(self) -> int | None:
        """When the next request comes; None after the last."""
        return self._due_ns[self._arrived] if self._arrived < len(self._due_ns) else None

    @property
    def is_done(self) -> bool:
        """Whether every request has had its steps."""
        return self.is_idle and self.next_arrival_ns is None

    def admit(self, now_ns: int) -> None:
        """Take in what has arrived by `now_ns`, and fill the free slots."""
        while self._arrived < len(self._due_ns) and self._due_ns[self._arrived] <= now_ns:
            self._waiting[self._arrived % self._num_ranks].append(self._arrived)
            self._arrived += 1
        for rank, waiting in enumerate(self._waiting):
            while waiting and self.sizes[rank] < self._slots:
                request = waiting.popleft()
                self.sizes[rank] += 1
                self.first_step[request] = self.num_steps
                self._ending[self.num_steps + self._output[request] - 1].append(request)

    def end_step(self) -> None:
        """The step has run: let those go that had their last."""
        for request in self._ending.pop(self.num_steps, ()):
            self.last_step[request] = self.num_steps
            self.sizes[request % self._num_ranks] -= 1
        self.num_steps += 1
