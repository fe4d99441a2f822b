"""Processes that run the ranks: started once, given many jobs, killed when one fails or the time is up."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import datetime as dt
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from moebius.errors import MoebiusError

from .start_line import SLOT_WORDS, StartLine

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_PR_SET_PDEATHSIG = 1  # prctl(2)
_GRACE_S = 3.0  # for a rank to leave by itself before it is killed


class RankFailedError(MoebiusError):
    """A rank raised, died or did not answer in time; the others were killed. The message holds its traceback."""


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pin(rank: int, num_ranks: int) -> None:
    """Give the calling thread of each rank a core of its own, where there are enough.

    Left alone, Linux may keep two ranks on one core for seconds, as soon as anything else runs: they wake each other.
    After gloo has started its threads, which stay free: on the rank's own core they cost it milliseconds a call.
    """
    if hasattr(os, "sched_setaffinity") and num_ranks <= num_cores():
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})


@dataclasses.dataclass
class RankContext:
    """What a job finds in its process.

    Attributes:
        rank: this rank.
        num_ranks: R.
        group: the gloo process group of all ranks.
        start_line: the barrier before a timed call.
        inboxes: [bytes] uint8 of every rank, in memory that all of them share.
        progress: call it with anything picklable; the parent hands it to `on_progress`.
    """

    rank: int
    num_ranks: int
    group: dist.ProcessGroup
    start_line: StartLine
    inboxes: list[Tensor]
    progress: Callable[[Any], None]


class RankPool:
    """R processes with a gloo group among them. A context manager: on leaving, no process is left."""

    def __init__(self, num_ranks: int, inbox_bytes: int, start_timeout_s: float = 120.0) -> None:
        """Start the processes and wait until their group stands.

        Raises:
            RankFailedError: one of them did not come up.
        """
        self.num_ranks = num_ranks
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="moebius-")
        words = context.RawArray("q", num_ranks * SLOT_WORDS)
        inboxes = [context.RawArray("b", max(inbox_bytes, 64)) for _ in range(num_ranks)]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_rank_main,
                args=(rank, num_ranks, os.path.join(self._folder.name, "store"), words, inboxes, theirs),
                name=f"rank {rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        try:
            self._collect(time.monotonic() + start_timeout_s, None)
        except BaseException:
            self.close(grace_s=0.0)
            raise

    def run(
        self,
        job: Callable[..., Any],
        *,
        timeout_s: float,
        shards: list[Any] | None = None,
        on_progress: Callable[[Any], None] | None = None,
        **arguments: Any,
    ) -> list[Any]:
        """Call `job(context, **arguments)` on every rank and return what they return, by rank.

        Args:
            job: a function of a module, so that the processes can import it.
            timeout_s: after which all ranks are killed.
            shards: one value a rank, which `job` gets as `shard`.
            on_progress: called with what a rank reports meanwhile.
            **arguments: picklable.

        Raises:
            RankFailedError: the first rank that failed, with its traceback; the pool is closed.
        """
        try:
            for rank, pipe in enumerate(self._pipes):
                own = arguments if shards is None else {**arguments, "shard": shards[rank]}
                with contextlib.suppress(BrokenPipeError):
                    pipe.send((job, own))
            return self._collect(time.monotonic() + timeout_s, on_progress)
        except BaseException:
            self.close(grace_s=0.0)
            raise

    def _collect(self, deadline: float, on_progress: Callable[[Any], None] | None) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < self.num_ranks:
            pending = {self._pipes[r]: r for r in range(self.num_ranks) if r not in results}
            ready = wait(list(pending), timeout=max(deadline - time.monotonic(), 0.0))
            if not ready:
                late = ", ".join(str(rank) for rank in sorted(pending.values()))
                raise RankFailedError(f"rank {late} gave no answer in time; all ranks were killed")
            for pipe in ready:
                rank = pending[pipe]  # type: ignore[index]  # wait() returns what it was given
                try:
                    kind, value = self._pipes[rank].recv()
                except (EOFError, OSError):
                    self._processes[rank].join(_GRACE_S)
                    raise RankFailedError(f"rank {rank} died with exit code {self._processes[rank].exitcode}") from None
                if kind == "error":
                    raise RankFailedError(f"rank {rank} failed:\n{value}")
                if kind == "result":
                    results[rank] = value
                elif on_progress is not None:
                    on_progress(value)
        return [results[rank] for rank in range(self.num_ranks)]

    def close(self, grace_s: float = _GRACE_S) -> None:
        """End the processes: ask, wait for `grace_s` seconds, kill. Idempotent."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + grace_s
        for process in self._processes:
            process.join(max(deadline - time.monotonic(), 0.0))
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join()
        self._pipes, self._processes = [], []
        self._folder.cleanup()

    def __enter__(self) -> RankPool:
        """Return the pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def _rank_main(rank: int, num_ranks: int, store: str, words: Any, inboxes: list[Any], pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent ends us
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives a parent that is killed
    try:
        start_line = StartLine(words, rank, num_ranks, num_cores())
        torch.set_num_threads(1)  # a rank is a core
        os.putenv("GLOO_SOCKET_IFNAME", "lo")  # one machine, whose name may not resolve
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=num_ranks,
            timeout=dt.timedelta(seconds=120),
        )
        _pin(rank, num_ranks)
        group = dist.group.WORLD
        assert group is not None  # just initialised
        context = RankContext(
            rank=rank,
            num_ranks=num_ranks,
            group=group,
            start_line=start_line,
            inboxes=[torch.frombuffer(inbox, dtype=torch.uint8) for inbox in inboxes],
            progress=lambda value: pipe.send(("progress", value)),
        )
        pipe.send(("result", None))
        while True:
            try:
                job, arguments = pipe.recv()
            except (EOFError, OSError):
                return
            pipe.send(("result", job(context, **arguments)))
    except BaseException:  # noqa: BLE001  # whatever it was, the parent shows it and ends the others
        with contextlib.suppress(OSError):
            pipe.send(("error", traceback.format_exc()))
    finally:
        # No destroy_process_group(): it may wait for ranks that are gone.
        os._exit(0)
