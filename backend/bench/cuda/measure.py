"""One point on one device: samples of everything, by name. Runs alike on each process of several GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import torch

from moebius.bench.timing import quiet_gc
from moebius.bench.workload import count_rows, route
from moebius.errors import PeerTimeoutError

from .schedules import (
    BLOCKING,
    BY_HALF,
    BY_OP,
    CHAINED,
    CHAINED_DISPATCH,
    LOCKSTEP,
    Schedule,
    eager_samples,
    graph_samples,
)
from .suites import Counts, Point, counts
from .torch_exchange import TorchExchange
from .traffic import half_bytes
from .world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .devices import Device
    from .schedules import Exchange

TIMEOUT_S = 2.0
MOST_HUNG = 2
PLAIN_SHARE = 4  # of our repetitions are torch's, whose rounds are ten times as long
HOST_ROUNDS = 12  # behind one gate
HOST_REPEATS = 20
FRAME = Schedule("frame", (("frame", ("frame",)),))


@dataclasses.dataclass
class Measured:
    """What one process found at a point.

    Attributes:
        samples: microseconds by (side, mode, schedule, op).
        bytes: that the ranks of this device move, by half and op.
        sms: budget of a rank.
        errors: what could not be measured, and why.
    """

    samples: dict[tuple[str, str, str, str], list[float]]
    bytes: dict[str, int]
    sms: int
    errors: list[str]


class Bench:
    """Measures points, and keeps the ranks of one for the next where the memory is the same."""

    def __init__(
        self,
        device: Device,
        groups: Callable[[], Sequence[Any]],
        seconds: float,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        """Measure on `device`.

        Args:
            device: with a lane for each rank that runs here.
            groups: makes the groups of those ranks, for each set of them anew.
            seconds: of each schedule.
            before: see `schedules.graph_samples`.
        """
        self._device, self._groups, self._seconds, self._before = device, groups, seconds, before
        self._hung = 0  # schedules in which a rank waited in vain for another's kernel
        self._world: World | None = None
        self._key: Any = None

    def close(self) -> None:
        """Let go of the last ranks."""
        if self._world is not None:
            with contextlib.suppress(RuntimeError):
                self._world.close()
        self._world = self._key = None

    @contextlib.contextmanager
    def world(self, point: Point) -> Iterator[World]:
        """The ranks of a point with its tokens loaded; made anew when the last use ended in an error."""
        workload = point.workload
        sms = point.sms(self._device.num_sms, self._device.num_lanes)
        largest = dataclasses.replace(workload, tokens=workload.max_num_tokens or workload.tokens)
        key = (largest, sms)
        if key != self._key:
            self.close()
            self._world, self._key = World(self._device, self._groups(), largest, sms, TIMEOUT_S), key
        assert self._world is not None  # made above, or still there
        try:
            self._world.load(workload)
            yield self._world
        except BaseException:
            self.close()
            raise

    def measure(self, point: Point) -> Measured:
        """Everything of a point. What fails is named in `errors`; the rest goes on."""
        device, lanes = self._device, self._device.num_lanes
        found = Measured({}, {}, point.sms(device.num_sms, lanes), [])

        def attempt(what: str, job: Callable[[], None]) -> bool:
            try:
                with quiet_gc():
                    job()
            except (RuntimeError, ValueError) as error:  # ours, torch's, CUDA's: the other figures still count
                self._hung += isinstance(error, PeerTimeoutError)
                found.errors.append(f"{point.name}: {what}: {type(error).__name__}: {str(error).splitlines()[0]}")
                return False
            return True

        if not attempt("check", lambda: self._check(point, found)):
            return found
        many = counts(found.bytes["round"], lanes, self._seconds)
        # A device that will not run the ranks side by side does not learn to: each more try costs its deadline.
        are_resident = found.sms * lanes <= device.num_sms and self._hung < MOST_HUNG
        schedules = schedules_of(point, are_resident)
        if not device.is_cuda:  # whose calls wait, so that one lane cannot begin the dispatch that another waits for
            schedules = tuple(one for one in schedules if one not in (CHAINED_DISPATCH, BLOCKING))
        for mode, schedule in itertools.product(point.modes, schedules):
            if schedule is BLOCKING and mode == "graph":
                continue  # there it is CHAINED
            job = functools.partial(self._ours, point, found, mode, schedule, many)
            if not attempt(f"{mode} {schedule.name}", job) and schedule is CHAINED and LOCKSTEP not in schedules:
                attempt(f"{mode} lockstep", functools.partial(self._ours, point, found, mode, LOCKSTEP, many))
        # In processes of their own the ranks share no lane, and a copy in torch would need another library.
        if point.with_baseline and lanes == point.workload.ranks:
            attempt("torch baseline", lambda: self._torch(point, found, many))
        return found

    def _check(self, point: Point, found: Measured) -> None:
        with self.world(point) as world:
            world.check()
            found.bytes = round_bytes(world, point)

    def _ours(self, point: Point, found: Measured, mode: str, schedule: Schedule, many: Counts) -> None:
        with self.world(point) as world:
            _collect(found, "moebius", mode, schedule, self._samples(world, mode, schedule, many))
            world.settle()

    def _torch(self, point: Point, found: Measured, many: Counts) -> None:
        with self.world(point) as world:
            many = dataclasses.replace(
                many,
                rounds=max(2, many.rounds // PLAIN_SHARE),
                replays=max(8, many.replays // PLAIN_SHARE),
                eager_repeats=max(4, many.eager_repeats // PLAIN_SHARE),
            )
            plain = TorchExchange(self._device, world.config, world.inputs, world.host_routes, world.expert_out)
            for mode in point.modes:
                _collect(found, "torch", mode, BY_HALF, self._samples(plain, mode, BY_HALF, many))
                _collect(found, "torch", mode, LOCKSTEP, self._samples(plain, mode, LOCKSTEP, many))

    def _samples(self, exchange: Exchange, mode: str, schedule: Schedule, many: Counts) -> dict[str, list[float]]:
        if mode == "graph":
            return graph_samples(self._device, exchange, schedule, many.rounds, many.replays, self._before)
        return eager_samples(self._device, exchange, schedule, many.eager_rounds, many.eager_repeats, self._before)

    def frame_us(self) -> list[float]:
        """What a stamped frame costs without us: a fork, one small kernel a lane, a join. In a graph."""
        return graph_samples(self._device, _Nothing(self._device), FRAME, 20, 20, self._before)["frame"]

    def launch_us(self) -> float:
        """Host time of the smallest call of torch that launches a kernel, at the median: what this host is worth."""
        device, found = self._device, list[float]()
        word = torch.zeros(1, device=device.where)
        with quiet_gc(), device.main():
            for _ in range(HOST_REPEATS + 1):
                device.synchronize()
                device.gate(TIMEOUT_S / 100)
                for _ in range(HOST_ROUNDS):
                    begin = perf_counter_ns()
                    word.add_(1.0)
                    found.append((perf_counter_ns() - begin) / 1e3)
            device.synchronize()
        return sorted(found)[len(found) // 2]

    def host_us(self, point: Point) -> dict[str, list[float]]:
        """Host time of the calls of a round, see `World.host_times`, while the device is busy. Of one rank."""
        device, found = self._device, dict[str, list[float]]()
        with self.world(point) as world, quiet_gc(), device.main():
            for repeat in range(HOST_REPEATS + 1):
                device.synchronize()
                device.gate(TIMEOUT_S / 100)
                times = [world.host_times() for _ in range(HOST_ROUNDS)]
                device.synchronize()
                for one in times if repeat else ():
                    for name, spent in one.items():
                        found.setdefault(name, []).append(spent)
            world.settle()
        return found


def schedules_of(point: Point, are_resident: bool) -> tuple[Schedule, ...]:
    """What to play at a point.

    Args:
        point: of budgets, only what compares from the smallest to all.
        are_resident: all ranks' kernels fit the device at once, so that one may wait for another.
    """
    if not are_resident:
        return LOCKSTEP, BY_HALF
    if point.section == "sms":
        return CHAINED, LOCKSTEP, BY_HALF
    return CHAINED, CHAINED_DISPATCH, BLOCKING, BY_OP, BY_HALF


class _Nothing:
    """One small kernel a lane."""

    def __init__(self, device: Device) -> None:
        self._words = [torch.zeros(1, device=device.where) for _ in range(device.num_lanes)]

    def step(self, lane: int, half: str, number: int) -> None:
        del half, number
        self._words[lane].add_(1.0)


def round_bytes(world: World, point: Point) -> dict[str, int]:
    """Mean bytes of each half over the routings drawn, of the ranks on this device."""
    workload = point.workload
    totals: dict[str, int] = {}
    steps = len(world.host_routes[0])
    mine = {a2a.rank: lane for lane, a2a in enumerate(world.ranks)}
    for step in range(steps):
        ids = [
            world.host_routes[mine[rank]][step][0] if rank in mine else route(workload, rank, step)[0]
            for rank in range(workload.ranks)
        ]
        rows = count_rows(ids, workload.experts)
        for name, moved in half_bytes([rows[rank] for rank in mine], world.config).items():
            totals[name] = totals.get(name, 0) + moved
    return {name: total // steps for name, total in totals.items()}


def _collect(found: Measured, side: str, mode: str, schedule: Schedule, samples: dict[str, list[float]]) -> None:
    for op, values in samples.items():
        found.samples[side, mode, schedule.name, op] = values
