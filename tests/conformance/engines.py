"""The engines that the suite holds to one behaviour. A new engine adds a line to `ENGINES`.

A test hands an engine a *program*: a generator function `program(a2a, *arguments)` that yields after its sends and
returns what the rank got. Between two yields a program may receive only what every rank has sent before the first of
them, so one thread can run all ranks in turn, and threads or processes can run one each.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch

import moebius
from moebius import AllToAll, Config, VirtualNetwork
from tests.helpers import gpu, simt
from tests.helpers.launch import RankPool, in_threads

if TYPE_CHECKING:
    from tests.helpers.skew import Skew

Program = Callable[..., Generator[None, None, Any]]
Run = Callable[[Config, int, Program, Sequence[tuple[Any, ...]], "Skew | None"], list[Any]]

POOL_RANKS = 4
# Ranks of a group are not always the ranks of the world, nor neighbours.
POOL_GROUPS = {1: (2,), 2: (1, 3), 3: (0, 1, 3), 4: (0, 1, 2, 3)}
TIMEOUT_S = 120.0


@dataclasses.dataclass(frozen=True)
class Engine:
    """One way to run ranks.

    Attributes:
        name: part of the test's id.
        run: runs a program on every rank with its arguments, and returns what each returned.
        concurrent: ranks run at their own pace, so blocking calls and skew make sense.
        sizes: numbers of ranks it is tested with.
    """

    name: str
    run: Run
    concurrent: bool
    sizes: tuple[int, ...] = (1, 2, 3, 4)


def run_single(
    config: Config,
    num_ranks: int,
    program: Program,
    arguments: Sequence[tuple[Any, ...]],
    skew: Skew | None = None,
    *,
    make: Callable[..., AllToAll] = AllToAll,
    network: VirtualNetwork | None = None,
) -> list[Any]:
    """One thread, all ranks in turn from yield to yield; the skew is in the order of the ranks."""
    ranks = [make(group, config) for group in moebius.virtual_ranks(num_ranks, network)]
    try:
        steps = {rank: program(a2a, *arguments[rank]) for rank, a2a in enumerate(ranks)}
        results: dict[int, Any] = {}
        while steps:
            for rank in list(steps):
                try:
                    next(steps[rank])
                except StopIteration as end:
                    results[rank] = end.value
                    del steps[rank]
        return [results[rank] for rank in range(num_ranks)]
    finally:
        for a2a in ranks:
            a2a.close()


def run_simt(
    config: Config, num_ranks: int, program: Program, arguments: Sequence[tuple[Any, ...]], skew: Skew | None = None
) -> list[Any]:
    """As `run_single`, the kernels of the CUDA engine run by the host executor, with the test's own schedule."""
    simt.extension().reset(simt.seed_of_test())
    return run_single(config, num_ranks, program, arguments, skew, make=simt.SimtAllToAll)


def run_simt_nodes(
    per_node: int,
    config: Config,
    num_ranks: int,
    program: Program,
    arguments: Sequence[tuple[Any, ...]],
    skew: Skew | None = None,
) -> list[Any]:
    """As `run_simt`, in nodes of so many ranks: only those of one node reach each other without the network."""
    simt.extension().reset(simt.seed_of_test())
    return run_single(config, num_ranks, program, arguments, skew, make=simt.in_nodes_of(per_node))


def run_streams(
    config: Config, num_ranks: int, program: Program, arguments: Sequence[tuple[Any, ...]], skew: Skew | None = None
) -> list[Any]:
    """As `run_single` on one GPU, a stream for each rank: their kernels run, and wait for one another, at once."""
    device = torch.device("cuda", torch.cuda.current_device())
    streams = [torch.cuda.Stream(device) for _ in range(num_ranks)]  # type: ignore[no-untyped-call]

    def on_stream(a2a: AllToAll, *given: Any) -> Generator[None, None, Any]:
        steps = program(a2a, *given)
        while True:
            with torch.cuda.stream(streams[a2a.rank]):
                try:
                    next(steps)
                except StopIteration as end:
                    return end.value
            yield

    def make(group: Any, config: Config) -> AllToAll:
        return AllToAll(group, config, device)

    return run_single(config, num_ranks, on_stream, arguments, skew, make=make)


def run_stream_threads(
    config: Config, num_ranks: int, program: Program, arguments: Sequence[tuple[Any, ...]], skew: Skew | None = None
) -> list[Any]:
    """A thread and a stream for each rank, on one GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    # Allocating may wait for the device: all of them before the first kernel that waits for another rank.
    ranks = [AllToAll(group, config, device) for group in moebius.virtual_ranks(num_ranks)]
    streams = [torch.cuda.Stream(device) for _ in range(num_ranks)]  # type: ignore[no-untyped-call]

    def run(rank: int) -> Any:
        with torch.cuda.stream(streams[rank]):
            return drive(ranks[rank], program, rank, arguments[rank], skew)

    try:
        return in_threads(num_ranks, run, timeout_s=TIMEOUT_S)
    finally:
        for a2a in ranks:
            a2a.close()


def run_rank(group: Any, config: Config, program: Program, rank: int, arguments: tuple[Any, ...], skew: Any) -> Any:
    """One rank at its own pace."""
    with AllToAll(group, config) as a2a:
        return drive(a2a, program, rank, arguments, skew)


def drive(a2a: AllToAll, program: Program, rank: int, arguments: tuple[Any, ...], skew: Any) -> Any:
    """Run the program to its end."""
    pauses = skew.pauses(rank) if skew is not None else None
    steps = program(a2a, *arguments)
    while True:
        if pauses is not None:
            next(pauses)
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def run_threads(
    config: Config,
    num_ranks: int,
    program: Program,
    arguments: Sequence[tuple[Any, ...]],
    skew: Skew | None = None,
    *,
    network: VirtualNetwork | None = None,
) -> list[Any]:
    """A thread for each rank."""
    groups = moebius.virtual_ranks(num_ranks, network)
    return in_threads(
        num_ranks,
        lambda rank: run_rank(groups[rank], config, program, rank, arguments[rank], skew),
        timeout_s=TIMEOUT_S,
    )


def over_network(run: Callable[..., list[Any]], ranks_per_host: int) -> Run:
    """The same over an emulated network between hosts, as bad as it can be without making the suite slow."""

    def run_over(
        config: Config, num_ranks: int, program: Program, arguments: Sequence[tuple[Any, ...]], skew: Skew | None = None
    ) -> list[Any]:
        network = VirtualNetwork(ranks_per_host, seed=simt.seed_of_test(), max_delay_us=100.0, max_piece_bytes=700)
        results = run(config, num_ranks, program, arguments, skew, network=network)
        assert network.num_refused == 0, "a message went where its sender has no business"
        return results

    return run_over


def run_processes(
    config: Config, num_ranks: int, program: Program, arguments: Sequence[tuple[Any, ...]], skew: Skew | None = None
) -> list[Any]:
    """A process for each rank, kept from test to test."""
    jobs = [(config, program, rank, arguments[rank], skew) for rank in range(num_ranks)]
    return pool().run(run_rank, jobs, members=POOL_GROUPS[num_ranks], timeout_s=TIMEOUT_S)


_pools: list[RankPool] = []


def pool() -> RankPool:
    """The processes; started by the first who asks, and again after a failure."""
    if not _pools or _pools[-1].closed:
        _pools.append(RankPool(POOL_RANKS, groups=list(POOL_GROUPS.values())))
        atexit.register(_pools[-1].close)
    return _pools[-1]


# Why an engine is not here, by the first word of its name.
NEEDS: dict[str, Callable[[], str | None]] = {"simt": simt.why_not, "cuda": gpu.why_not}
ENGINES = {
    engine.name: engine
    for engine in (
        Engine("cpu-single", run_single, concurrent=False),
        Engine("cpu-threads", run_threads, concurrent=True),
        Engine("cpu-processes", run_processes, concurrent=True),
        Engine("cpu-hosts-4x1", over_network(run_single, 1), concurrent=False),
        Engine("cpu-hosts-2x2", over_network(run_threads, 2), concurrent=True, sizes=(3, 4)),
        Engine("simt", run_simt, concurrent=False),
        Engine("simt-2x2", functools.partial(run_simt_nodes, 2), concurrent=False, sizes=(4,)),
        Engine("simt-4x1", functools.partial(run_simt_nodes, 1), concurrent=False, sizes=(2, 4)),
        Engine("cuda-streams", run_streams, concurrent=False),
        Engine("cuda-threads", run_stream_threads, concurrent=True),
    )
    if not NEEDS.get(engine.name.partition("-")[0], lambda: None)()
}
CONCURRENT = [name for name, engine in ENGINES.items() if engine.concurrent]
