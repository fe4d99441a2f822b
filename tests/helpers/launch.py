"""Run a function on every rank: in threads, or in processes joined by gloo. Nothing hangs, nothing is left running."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

Result = TypeVar("Result")
Members = tuple[int, ...]

START_TIMEOUT_S = 120.0  # importing torch in every process, on a busy machine
CLONE_NEWNET = 0x40000000  # setns(2)
PRELOAD = ["torch", "torch.distributed", "moebius", "tests.helpers.launch"]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank's process lives.

    Attributes:
        interface: of the network, that gloo takes its address from.
        namespace: network namespace to enter, by name; empty to stay.
        host: what `MOEBIUS_HOST` is set to.
    """

    interface: str = "lo"  # a machine may not resolve its own name
    namespace: str = ""
    host: str = ""

    def enter(self) -> None:
        """Move the calling process there, before it has threads."""
        if self.namespace:
            with open(f"/run/netns/{self.namespace}") as file:
                libc = ctypes.CDLL(None, use_errno=True)
                if libc.setns(file.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {self.namespace}")
        os.environ["MOEBIUS_HOST"] = self.host
        os.environ["GLOO_SOCKET_IFNAME"] = self.interface


class RankError(AssertionError):
    """A rank failed, died or hung; the message holds its traceback."""


def in_threads(num_ranks: int, function: Callable[[int], Result], *, timeout_s: float = 60.0) -> list[Result]:
    """Call `function(rank)` in a thread for each rank.

    Raises:
        BaseException: the error of the rank that failed first; the others are not waited for.
        RankError: some rank had not ended in `timeout_s`.
    """
    results: dict[int, Result] = {}
    errors: list[BaseException] = []
    changed = threading.Condition()

    def work(rank: int) -> None:
        try:
            result = function(rank)
        except BaseException as error:  # noqa: BLE001  # handed to the caller
            error.add_note(f"[rank {rank}]") if hasattr(error, "add_note") else None
            with changed:
                errors.append(error)
                changed.notify()
        else:
            with changed:
                results[rank] = result
                changed.notify()

    # Daemons: a rank stuck in a wait must not keep the interpreter alive.
    for rank in range(num_ranks):
        threading.Thread(target=work, args=(rank,), daemon=True, name=f"rank-{rank}").start()
    with changed:
        changed.wait_for(lambda: errors or len(results) == num_ranks, timeout_s)
        if errors:
            raise errors[0]
        missing = [rank for rank in range(num_ranks) if rank not in results]
    if missing:
        raise RankError(f"ranks {missing} had not ended after {timeout_s} s")
    return [results[rank] for rank in range(num_ranks)]


class RankPool:
    """Processes that stay, so that importing torch is paid once; jobs run on a gloo group of some of them.

    A job that fails ends the pool: its ranks may be at different places. Use it as a context manager.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        groups: Sequence[Members] = (),
        method: str = "forkserver",
        places: Sequence[Place] = (),
    ) -> None:
        """Start the processes and their groups.

        Args:
            num_ranks: processes.
            groups: ranks of each group that jobs will run on, besides that of all.
            method: "forkserver" forks from a process that has imported torch; "spawn" starts each anew.
            places: of each rank; by default all share this host.
        """
        self.num_ranks = num_ranks
        self.everyone: Members = tuple(range(num_ranks))
        self.closed = False
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload(PRELOAD)
        self._folder = tempfile.TemporaryDirectory(prefix="moebius-test-")
        store = os.path.join(self._folder.name, "store")
        self.processes: list[Any] = []
        self._pipes: list[multiprocessing.connection.Connection] = []
        wanted = list(dict.fromkeys([self.everyone, *groups]))
        with without_main():
            for rank in range(num_ranks):
                mine, theirs = multiprocessing.Pipe()
                place = places[rank] if places else Place()
                arguments = (rank, num_ranks, wanted, store, theirs, place)
                process = context.Process(target=serve, args=arguments, daemon=True)
                process.start()
                theirs.close()
                self.processes.append(process)
                self._pipes.append(mine)
        self._collect(self.everyone, time.monotonic() + START_TIMEOUT_S)

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        *,
        members: Members | None = None,
        absent: Collection[int] = (),
        timeout_s: float = 60.0,
    ) -> list[Any]:
        """Call `function(group, *arguments[i])` on the i-th member of a group, and wait.

        Args:
            function: importable by name.
            arguments: for each member.
            members: a group named at construction; None for all.
            absent: members that may die or stop: their results are None and not waited for.
            timeout_s: for all of them together.

        Raises:
            RankError: a member failed, died or was too slow; all processes are killed.
        """
        members = self.everyone if members is None else members
        deadline = time.monotonic() + timeout_s
        for rank, values in zip(members, arguments, strict=True):
            self._pipes[rank].send_bytes(dumps((function, members, values)))
        found = self._collect([rank for rank in members if rank not in absent], deadline)
        return [found.get(rank) for rank in members]

    def late(self, rank: int, *, timeout_s: float = 60.0) -> Any:
        """What a rank that was `absent` answers after all.

        Raises:
            RankError: as `run`.
        """
        return self._collect((rank,), time.monotonic() + timeout_s)[rank]

    def _collect(self, ranks: Collection[int], deadline: float) -> dict[int, Any]:
        found: dict[int, Any] = {}
        try:
            while len(found) < len(ranks):
                waiting = {self._pipes[rank]: rank for rank in ranks if rank not in found}
                left = deadline - time.monotonic()
                ready = multiprocessing.connection.wait(list(waiting), timeout=max(0.0, left))
                if not ready:
                    raise RankError(f"ranks {sorted(waiting.values())} had not answered in time")
                for pipe in ready:
                    rank = waiting[pipe]  # type: ignore[index]  # only pipes were passed
                    found[rank] = self._answer(rank)
        except BaseException:
            self.kill()
            raise
        return found

    def _answer(self, rank: int) -> Any:
        try:
            failed, value = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, OSError):
            self.processes[rank].join(5.0)
            raise RankError(f"[rank {rank}] died, exit code {self.processes[rank].exitcode}") from None
        if failed:
            raise RankError(f"[rank {rank}] {value}")
        return value

    def kill(self) -> None:
        """End every process at once."""
        self.closed = True
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(10.0)
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def close(self) -> None:
        """Ask the processes to end; kill those that do not."""
        if self.closed:
            return
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
        deadline = time.monotonic() + 5.0
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()


class TensorPickler(pickle.Pickler):
    """Tensors by value: plain pickle fails on FP8, and torch's own way needs file descriptors passed along."""

    def reducer_override(self, value: Any) -> Any:
        if type(value).__module__ == "torch" and type(value).__name__ == "Tensor":
            import torch

            plain = value.detach().contiguous()
            return rebuilt, (plain.flatten().view(torch.uint8).numpy().tobytes(), plain.dtype, tuple(plain.shape))
        return NotImplemented


def rebuilt(content: bytes, dtype: Any, shape: tuple[int, ...]) -> Any:
    """The tensor that was pickled."""
    import torch

    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).reshape(shape)


def dumps(value: Any) -> bytes:
    stream = io.BytesIO()
    TensorPickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Keep children from importing the main script, which is pytest's and costs half a second each."""
    main = sys.modules["__main__"]
    kept: dict[str, Any] = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(kept)


class Prefixed(io.TextIOBase):
    """A stream whose lines begin with the rank."""

    def __init__(self, stream: Any, prefix: str) -> None:
        self._stream = stream
        self._prefix = prefix
        self._at_start = True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self._stream.write(self._prefix + line if self._at_start else line)
            self._at_start = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def serve(
    rank: int,
    num_ranks: int,
    groups: list[Members],
    store: str,
    pipe: multiprocessing.connection.Connection,
    place: Place,
) -> None:
    """Body of a process: join the groups, then answer jobs until an empty one or the end of the pipe."""
    sys.stdout = Prefixed(sys.stdout, f"[rank {rank}] ")
    sys.stderr = Prefixed(sys.stderr, f"[rank {rank}] ")
    try:
        place.enter()
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
        made = {members: dist.new_group(list(members)) for members in groups}
        pipe.send_bytes(dumps((False, None)))
        while job := pipe.recv_bytes():
            pipe.send_bytes(attempt(job, made))
    except EOFError:
        pass  # the parent is gone
    except BaseException:  # noqa: BLE001  # told to the parent
        pipe.send_bytes(dumps((True, traceback.format_exc())))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads would wait for peers that are dead


def attempt(job: bytes, groups: dict[Members, Any]) -> bytes:
    """(failed, result or traceback) of a job, pickled here so that a result that cannot be is told too."""
    try:
        function, members, arguments = pickle.loads(job)
        return dumps((False, function(groups[members], *arguments)))
    except BaseException:  # noqa: BLE001  # told to the parent
        return dumps((True, traceback.format_exc()))
