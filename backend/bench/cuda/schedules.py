"""In which order the halves of all ranks are enqueued, and how long they take.

Kernels of different ranks wait for each other, so no half may be timed alone in a loop: a dispatch that is never
combined is closed by the next but one, which waits for all ranks inside its send. What is legal, and what it tells:

- `CHAINED`: one fork, many rounds, one join; each rank runs its rounds back to back on its own stream, as ranks on
  GPUs of their own would. The time of a round is that of the whole over the number of rounds, fork and join included.
- `CHAINED_DISPATCH`: the same with dispatches that nobody combines. Each then waits, inside its send, until all ranks
  have begun the one `depth` later, so this is dispatch and a barrier: never less than dispatch alone.
- `BLOCKING`: as `CHAINED`, in the two calls that are both halves at once; eager, for in a graph it is the same.
- `BY_OP`: all ranks dispatch from a common start to a join, then all combine. A stamp at each join. What is
  between two stamps is an operation, and one fork and join (`frame`, measured alone beside it).
- `BY_HALF`: a join after each half. Every receive then finds all that it waits for, so this is the cost of the
  half itself, without a wait; and since no kernel ever waits for one that has not run, it is safe with any SM budget.
- `LOCKSTEP`: `BY_HALF` without its inner stamps: the round where `CHAINED` cannot run.

Eager work is enqueued behind a gate, a kernel that keeps the device busy meanwhile: its time is the device's alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from .devices import Device

HALVES = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")
OPS = {"dispatch": HALVES[:2], "combine": HALVES[2:]}
GATE_S = 2e-3
MOST_GATE_S = 0.25
WARMUP_ROUNDS = 3


class Exchange(Protocol):
    """Something whose rounds have four halves on every lane."""

    def step(self, lane: int, half: str, number: int) -> None:
        """Enqueue a half of round `number`, of ours also "dispatch" or "combine", on the current stream."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Attributes as below.

    Attributes:
        name: as results call it.
        frames: of one round: the halves that run from a fork to a join, and what to call the time they take.
        is_chained: all rounds are one frame.
        whole: what a sample is the time of, without stamps.
    """

    name: str
    frames: tuple[tuple[str, tuple[str, ...]], ...]
    is_chained: bool = False
    whole: str = "round"

    @property
    def is_stamped(self) -> bool:
        """Whether each frame has a time of its own."""
        return not self.is_chained and all(name for name, _ in self.frames)


CHAINED = Schedule("chained", (("", HALVES),), is_chained=True)
CHAINED_DISPATCH = Schedule("chained", (("", OPS["dispatch"]),), is_chained=True, whole="dispatch")
BLOCKING = Schedule("blocking", (("", tuple(OPS)),), is_chained=True)
LOCKSTEP = Schedule("lockstep", tuple(("", (half,)) for half in HALVES))
BY_OP = Schedule("by_op", tuple(OPS.items()))
BY_HALF = Schedule("by_half", tuple((half, (half,)) for half in HALVES))


def play(device: Device, exchange: Exchange, schedule: Schedule, rounds: int) -> list[Any]:
    """Enqueue `rounds` rounds on the current stream and the lanes.

    Returns:
        Stamps: the start, then the end of every frame; of chained rounds the end of all. A graph records them whether
        they are looked at or not, so they have to live as long as it does.
    """
    stamps = [device.stamp()]
    if schedule.is_chained:
        device.fork()
    for number in range(rounds):
        for _, halves in schedule.frames:
            if not schedule.is_chained:
                device.fork()
            # All ranks' sends before any receive: a receive may hold the queue that it shares with another rank.
            for half in halves:
                for lane in range(device.num_lanes):
                    with device.lane(lane):
                        exchange.step(lane, half, number)
            if not schedule.is_chained:
                device.join()
                # In a graph also without a use for it: a node to wait for, or each lane would wait for every lane.
                stamps.append(device.stamp())
    if schedule.is_chained:
        device.join()
        stamps.append(device.stamp())
    return stamps


def samples(device: Device, schedule: Schedule, rounds: int, stamps: list[Any]) -> dict[str, list[float]]:
    """Microseconds by name; without names one sample of the whole, the mean of the `rounds`."""
    if not schedule.is_stamped:
        return {schedule.whole: [device.between_us(stamps[0], stamps[-1]) / rounds]}
    times = [device.between_us(begin, end) for begin, end in itertools.pairwise(stamps)]
    names = [name for name, _ in schedule.frames]
    return {name: times[index :: len(names)] for index, name in enumerate(names)}


def _merge(into: dict[str, list[float]], more: dict[str, list[float]]) -> None:
    for name, values in more.items():
        into.setdefault(name, []).extend(values)


def graph_samples(
    device: Device,
    exchange: Exchange,
    schedule: Schedule,
    rounds: int,
    replays: int,
    before: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Capture `rounds` rounds in one graph and time its replays.

    Args:
        device: where.
        exchange: what; all of its lanes.
        schedule: in which order.
        rounds: in the graph.
        replays: timed, after one that is not.
        before: called before each replay, when nothing runs; lines up the processes of several GPUs.
    """
    found: dict[str, list[float]] = {}
    with device.main():
        play(device, exchange, schedule, WARMUP_ROUNDS)
        device.synchronize()
    graph = device.capture(lambda: play(device, exchange, schedule, rounds))
    with device.main():
        for number in range(replays + 1):
            device.synchronize()
            before()
            device.gate(GATE_S / 40)  # the graph's own launch is over before it begins
            graph.replay()
            device.synchronize()
            if number:
                _merge(found, samples(device, schedule, rounds, graph.result))
    return found


def eager_samples(
    device: Device,
    exchange: Exchange,
    schedule: Schedule,
    rounds: int,
    repeats: int,
    before: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Enqueue `rounds` rounds behind a gate and time them, `repeats` times after one that is not.

    A repeat that took longer to enqueue than the gate held is done again behind a longer one.
    """
    found: dict[str, list[float]] = {}
    gate_s, number = GATE_S, 0
    with device.main():
        while number <= repeats:
            device.synchronize()
            before()
            device.gate(gate_s)
            begin = perf_counter()
            stamps = play(device, exchange, schedule, rounds)
            spent = perf_counter() - begin
            device.synchronize()
            if device.is_cuda and spent > gate_s and gate_s < MOST_GATE_S:
                gate_s = min(2.0 * max(spent, gate_s), MOST_GATE_S)
                continue
            if number:
                _merge(found, samples(device, schedule, rounds, stamps))
            number += 1
    return found
