"""When requests come, and how long they are: seeded processes, and the replay of a recorded trace.

All times are decided before anything runs (open loop): a slow server does not slow the arrivals down.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from typing import TYPE_CHECKING

from moebius.errors import ConfigError

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator

PROCESSES = ("poisson", "bursty", "on-off", "replay")


@dataclasses.dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        t: seconds from the begin of the run to its scheduled arrival.
        prompt: tokens of its prompt; kept, not computed: these are decode steps.
        output: decode steps that it needs, at least 1.
    """

    t: float
    prompt: int
    output: int


@dataclasses.dataclass(frozen=True)
class Arrivals:
    """An arrival process, for any rate.

    Attributes:
        process: "poisson"; "bursty" (gamma intervals); "on-off" (Poisson in periods of exponential length, nothing
            between them); "replay" (the trace, over and over, its time stretched to the wanted rate).
        burstiness: shape of the gamma distribution, as in `vllm bench serve`: the coefficient of variation of the
            intervals is 1 / sqrt(burstiness), so 1 is Poisson and less is burstier.
        on_s: mean length of an on period.
        off_s: mean length of the silence after it.
        output: mean decode steps of a request, geometrically distributed; the trace has its own.
        trace: the requests to replay.
        seed: of times and lengths.
    """

    process: str = "poisson"
    burstiness: float = 0.25
    on_s: float = 0.05
    off_s: float = 0.05
    output: float = 16.0
    trace: tuple[Request, ...] = ()
    seed: int = 0

    @property
    def mean_output(self) -> float:
        """Mean decode steps of a request."""
        return sum(one.output for one in self.trace) / len(self.trace) if self.trace else self.output

    @property
    def own_rate(self) -> float | None:
        """Requests a second of the trace; None for the other processes."""
        return len(self.trace) / _length(self.trace) if self.trace else None

    def draw(self, rate: float, seconds: float, *key: int) -> tuple[Request, ...]:
        """The requests of the first `seconds` at a mean of `rate` a second; the same for the same `key`."""
        if self.process == "replay":
            return tuple(itertools.takewhile(lambda one: one.t < seconds, self._replay(rate)))
        chance = random.Random(f"{self.seed} {key}")
        lengths = random.Random(f"{self.seed} {key} lengths")
        times = itertools.takewhile(lambda t: t < seconds, self._times(rate, chance))
        return tuple(Request(t, 0, _geometric(self.output, lengths)) for t in times)

    def _times(self, rate: float, chance: random.Random) -> Iterator[float]:
        if self.process == "on-off":
            yield from self._on_off(rate, chance)
        shape = self.burstiness if self.process == "bursty" else 1.0
        t = 0.0
        while True:
            t += chance.gammavariate(shape, 1.0 / (rate * shape))
            yield t

    def _on_off(self, rate: float, chance: random.Random) -> Iterator[float]:
        rate_on = rate * (self.on_s + self.off_s) / self.on_s
        begin = 0.0
        while True:
            end = begin + chance.expovariate(1.0 / self.on_s)
            t = begin + chance.expovariate(rate_on)
            while t < end:
                yield t
                t += chance.expovariate(rate_on)
            begin = end + (chance.expovariate(1.0 / self.off_s) if self.off_s > 0 else 0.0)

    def _replay(self, rate: float) -> Iterator[Request]:
        first, stretch = self.trace[0].t, len(self.trace) / _length(self.trace) / rate
        for lap in itertools.count():
            for one in self.trace:
                yield dataclasses.replace(one, t=(one.t - first + lap * _length(self.trace)) * stretch)


def _length(trace: tuple[Request, ...]) -> float:
    """Seconds after which the trace begins again: one mean interval after its last request."""
    return (trace[-1].t - trace[0].t) * len(trace) / (len(trace) - 1)


def _geometric(mean: float, chance: random.Random) -> int:
    """1, 2, .. with this mean."""
    if mean <= 1.0:
        return 1
    return 1 + math.floor(math.log(1.0 - chance.random()) / math.log(1.0 - 1.0 / mean))


def read_trace(path: pathlib.Path) -> tuple[Request, ...]:
    """Read a recorded arrival trace, a JSON object a line: {"t": seconds, "prompt": tokens, "output": tokens}.

    Raises:
        ConfigError: the file cannot be read as one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the arrival trace {path}: {error.strerror}") from None
    requests = [_request(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    requests.sort(key=lambda one: one.t)
    if len(requests) < 2 or requests[-1].t <= requests[0].t:
        raise ConfigError(f"{path}: a trace needs at least 2 requests at different times (got {len(requests)})")
    return tuple(requests)


def _request(place: str, line: str) -> Request:
    try:
        entry = json.loads(line)
        one = Request(float(entry["t"]), int(entry.get("prompt", 0)), int(entry["output"]))
        if not math.isfinite(one.t) or one.output < 1:
            raise ValueError("`t` must be finite and `output` at least 1")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{place}: not a request like {{"t": 0.5, "prompt": 128, "output": 32}} ({error!r})'
        ) from None
    return one
