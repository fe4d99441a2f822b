"""`python -m moebius load`: decode under open-loop arrivals, moebius and gloo in turn, up to the knee and below."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from moebius.errors import ConfigError

from .console import Progress, out, table, us
from .load_arrivals import Arrivals, read_trace
from .load_rank import Leg, Stack, find_capacity, run_legs
from .load_report import write_report
from .load_results import Samples, Slo, find_knee, geometric, is_sustained
from .machine import is_busy, provenance
from .ranks import RankPool, num_cores
from .routing_trace import replayed
from .workload import Workload

if TYPE_CHECKING:
    import pathlib

AUTO_RATES = 6
LOWEST, HIGHEST = 0.2, 1.1  # of the capacity with all slots taken: of the slowest side, of the fastest
KNEE_SHARE = 0.7
BLOCKS = 2  # legs of a rate and side
KNEE_TIMES = 4  # as long, in as many more legs
ABOVE_ZERO = ("layers", "intermediate", "burstiness", "on_ms", "output", "slo_ttft_ms", "slo_tpot_ms", "seconds")
HEADER = (
    "requests/s", "side", "TTFT p50", "p99 ms", "TPOT p50", "p99 ms", "queue p99", "round p50", "p99", "p99.9",
    "max us", "step p50", "p99 us", "skew p50", "batch", "served", "in SLO",
)  # fmt: skip
METHOD = (
    "Open loop: all arrivals are scheduled before the run and wait for nobody. A request's latency counts from its "
    "scheduled arrival, whenever it was taken in, and one that was cut off counts with the time it had waited: so no "
    "slow step can hide the requests behind it (coordinated omission). Requests go to the ranks in turn; all ranks "
    "step together, with 0 tokens where nothing runs, and agree on the time of a step through shared memory, alike for "
    "every side. Both sides get the same arrivals, each leg in an empty system, in turn; the first fifth of a leg is "
    "not counted. A round counts from the last rank's call to the last return, of dispatch and of combine; what "
    "earlier ranks wait before is named apart. Before, every layer was checked against the layer in one process."
)


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """What the flags of `load` say.

    Attributes:
        stack: what is computed.
        arrivals: the process.
        slo: that decides goodput and knee.
        sides: that take turns.
        rates: requests a second; None finds them.
        seconds: of arrivals, at each rate and side.
        report: where the HTML goes.
        timeout_s: after which a rate is killed.
    """

    stack: Stack
    arrivals: Arrivals
    slo: Slo
    sides: list[str]
    rates: list[float] | None
    seconds: float
    report: pathlib.Path
    timeout_s: float

    @classmethod
    def from_flags(cls, flags: dict[str, Any]) -> LoadOptions:
        """Check the flags, and read the traces.

        Raises:
            ConfigError: something impossible.
        """
        for name in (
            "layers",
            "intermediate",
            "burstiness",
            "on_ms",
            "output",
            "slo_ttft_ms",
            "slo_tpot_ms",
            "seconds",
        ):
            if not flags[name] > 0:
                raise ConfigError(f"`--{name.replace('_', '-')}` must be above 0 (got {flags[name]})")
        if (flags["arrivals"] == "replay") != (flags["arrival_trace"] is not None):
            raise ConfigError("`--arrivals replay` and `--arrival-trace FILE` go together")
        tiny = {"experts": 8, "topk": 2, "hidden": 128, "tokens": 4} if flags["tiny"] else {}
        trace, recorded = replayed(flags["routing_trace"])
        names = ("experts", "topk", "hidden", "tokens", "max_num_tokens", "payload", "layout", "routing", "seed")
        shape = {name: flags[name] for name in names} | tiny | recorded
        workload = Workload(ranks=flags["ranks"] or max(num_cores(), 2), routing_trace=trace, **shape)
        workload.config()  # refuse an impossible one before anything runs
        arrivals = Arrivals(
            process=flags["arrivals"],
            burstiness=flags["burstiness"],
            on_s=flags["on_ms"] / 1e3,
            off_s=max(flags["off_ms"], 0.0) / 1e3,
            output=max(flags["output"], 1.0),
            trace=read_trace(flags["arrival_trace"]) if flags["arrival_trace"] else (),
            seed=flags["seed"],
        )
        rates: Any = flags["rates"] or ([20.0, 60.0] if flags["tiny"] else "auto")
        if rates == "trace":
            if arrivals.own_rate is None:
                raise ConfigError("`--rates trace` needs `--arrivals replay`")
            rates = [arrivals.own_rate]
        return cls(
            stack=Stack(workload, 1 if tiny else flags["layers"], 16 if tiny else flags["intermediate"]),
            arrivals=arrivals,
            slo=Slo(flags["slo_ttft_ms"], flags["slo_tpot_ms"]),
            sides=list(dict.fromkeys(flags["sides"])),
            rates=None if rates == "auto" else rates,
            seconds=min(flags["seconds"], 0.6) if tiny else flags["seconds"],
            report=flags["report"],
            timeout_s=flags["timeout"],
        )


class _Run:
    """The pool, and what was measured on it so far."""

    def __init__(self, pool: RankPool, options: LoadOptions) -> None:
        self.pool, self.options = pool, options
        self.progress = Progress("load")
        self.points: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
        self.engine = ""

    def capacity(self) -> dict[str, float]:
        """Requests a second of each side with all slots taken, closed loop."""
        options = self.options
        ranks = self.pool.run(find_capacity, timeout_s=options.timeout_s, stack=options.stack, sides=options.sides)
        workload = options.stack.workload
        slots = workload.ranks * workload.tokens
        return {
            side: slots / max(rank[side] for rank in ranks) / options.arrivals.mean_output for side in options.sides
        }

    def measure(self, rates: dict[str, float], seconds: float, blocks: int, number: int) -> dict[str, Samples]:
        """Give each side its rate, in turn, block by block."""
        options = self.options
        legs = []
        for block in range(blocks):
            for side in options.sides if block % 2 == 0 else reversed(options.sides):
                requests = options.arrivals.draw(rates[side], seconds / blocks, number, block)
                legs.append(Leg(side, requests, seconds / blocks))
        ranks = self.pool.run(run_legs, timeout_s=options.timeout_s, stack=options.stack, legs=legs)
        self.engine = ranks[0][1]
        samples = {side: Samples() for side in options.sides}
        for leg, records in zip(legs, zip(*(records for records, _ in ranks), strict=True), strict=True):
            samples[leg.side].add(leg, records, options.slo)
        return samples

    def sweep(self, rates: list[float], begin: float, end: float) -> None:
        """Measure all sides at each rate; the progress goes from `begin` to `end`."""
        for index, rate in enumerate(rates):
            number = len(self.points[self.options.sides[0]])
            samples = self.measure(dict.fromkeys(self.options.sides, rate), self.options.seconds, BLOCKS, number)
            notes = []
            for side, one in samples.items():
                point = {"rate": rate, **one.to_json()}
                point["is_sustained"] = is_sustained(point, self.options.slo)
                self.points[side].append(point)
                notes.append(f"{side} {_ms(point['ttft']['p99_us'])} ms")
            self.progress.show(
                begin + (index + 1) / len(rates) * (end - begin), f"{rate:g}/s, p99 TTFT: {', '.join(notes)}"
            )

    def refine(self) -> list[float]:
        """A rate between each side's knee and the next higher one."""
        extra = []
        for points in self.points.values():
            knee = find_knee(points, self.options.slo)
            above = [point["rate"] for point in points if knee is not None and point["rate"] > knee]
            if knee is not None and above:
                extra.append(float(f"{(knee * min(above)) ** 0.5:.3g}"))
        return sorted(set(extra))


def run(options: LoadOptions) -> dict[str, Any]:
    """Sweep the load, measure at 70 % of each side's knee, print, and write the report.

    Returns:
        Everything the table and the report show.
    """
    origin = provenance()
    if is_busy(origin["machine"]):
        out(f"The machine is busy (load {origin['machine']['load_1min']}): its latencies will be, too.")
    with RankPool(options.stack.workload.ranks, 64) as pool:
        running = _Run(pool, options)
        capacity = running.capacity()
        rates = options.rates
        if rates is None:
            rates = geometric(LOWEST * min(capacity.values()), HIGHEST * max(capacity.values()), AUTO_RATES)
        running.sweep(rates, 0.0, 0.6)
        if options.rates is None:
            running.sweep(running.refine(), 0.6, 0.75)
        for points in running.points.values():
            points.sort(key=lambda point: point["rate"])
        knees = {side: find_knee(points, options.slo) for side, points in running.points.items()}
        steady = {side: KNEE_SHARE * (knees[side] or rates[0]) for side in options.sides}
        samples = running.measure(steady, KNEE_TIMES * options.seconds, KNEE_TIMES * BLOCKS, -1)
    running.progress.done()
    result: dict[str, Any] = {
        "kind": "load",
        **origin,
        "method": METHOD,
        "engine": running.engine,
        "workload": dataclasses.asdict(options.stack.workload),
        "layers": options.stack.layers,
        "intermediate": options.stack.intermediate,
        "arrivals": {
            **{name: value for name, value in dataclasses.asdict(options.arrivals).items() if name != "trace"},
            "mean_output": options.arrivals.mean_output,
            "trace_requests": len(options.arrivals.trace),
        },
        "slo": dataclasses.asdict(options.slo),
        "seconds": options.seconds,
        "sides": {
            side: {
                "capacity_per_s": round(capacity[side], 1),
                "knee_per_s": knees[side],
                "points": running.points[side],
                "steady": {"rate": round(steady[side], 3), **samples[side].to_json(with_curve=True)},
            }
            for side in options.sides
        },
    }
    for side in result["sides"].values():
        one = side["steady"]["round"]
        tail = one["p999_us"] is not None
        side["steady"]["p999_over_p50"] = round(one["p999_us"] / one["p50_us"], 2) if tail else None
    write_report(result, options.report)
    result["report"] = str(options.report)
    _print(result)
    return result


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e3:.3g}"


def _print(result: dict[str, Any]) -> None:
    sides = result["sides"]
    rows = []
    for points in itertools.zip_longest(*(side["points"] for side in sides.values())):
        rows += [_row(name, point) for name, point in zip(sides, points, strict=True)]
    out(table(HEADER, rows, left=2))
    out()
    slo = result["slo"]
    for name, side in sides.items():
        knee, steady = side["knee_per_s"], side["steady"]
        known = f"knee at {knee:g} requests/s" if knee else "no rate held the SLO"
        ratio = steady["p999_over_p50"]
        tail = f"p99.9/p50 {ratio:.1f}" if ratio else "too few rounds for p99.9"
        one = steady["round"]
        out(f"{name}: {known}; at {steady['rate']:g}/s a round takes {us(one['p50_us'])} us at p50, "
            f"{us(one['p99_us'])} at p99, {us(one['p999_us'])} at p99.9: {tail}")  # fmt: skip
    out(f"SLO: p99 TTFT {slo['ttft_ms']:g} ms from the scheduled arrival, TPOT {slo['tpot_ms']:g} ms. "
        "The knee is the highest rate within it that is served to 95 %.")  # fmt: skip
    out()
    out(result["method"])
    out(f"Report: {result['report']}")


def _row(name: str, point: dict[str, Any]) -> list[str]:
    ttft, tpot, one, step = point["ttft"], point["tpot"], point["round"], point["step"]
    share = point["good_share"]
    return [
        f"{point['rate']:g}", name, _ms(ttft["p50_us"]), _ms(ttft["p99_us"]), _ms(tpot["p50_us"]), _ms(tpot["p99_us"]),
        _ms(point["queue"]["p99_us"]), *(us(one[key]) for key in ("p50_us", "p99_us", "p999_us", "max_us")),
        us(step["p50_us"]), us(step["p99_us"]), us(point["skew"]["p50_us"]), f"{point['mean_batch']:.1f}",
        f"{point['throughput_share']:.0%}", "-" if share is None else f"{share:.0%}",
    ]  # fmt: skip
