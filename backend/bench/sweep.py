"""`python -m moebius bench`: rounds of many shapes, moebius and gloo in turn, as columns."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import statistics
from typing import TYPE_CHECKING, Any

from .bound import bound_stats, inbox_bytes, round_traffic
from .console import Progress, out, table, us
from .machine import is_busy, provenance
from .ranks import RankPool, num_cores
from .routing_trace import replayed
from .sweep_rank import ROUTINGS_DRAWN, RoundTimes, run_rounds
from .timing import Stats, slowest_us, summarise
from .wire import mean_wire
from .workload import Workload, count_rows, mean_rows, route

if TYPE_CHECKING:
    import pathlib

COLUMNS = (
    "op", "ranks", "tokens", "hidden", "topk", "dtype", "layout", "routing", "mode", "p50_us", "p99_us", "wire_bytes",
    "bound_us", "baseline_p50_us",
)  # fmt: skip
SPANS = {"dispatch": ((0, 1),), "combine": ((1, 2),), "round": ((0, 2),)}
METHOD = (
    "Rounds of dispatch and combine without experts, called from Python with topk_ids given. Before each round all "
    "ranks meet at a barrier in shared memory, not timed; a sample is the time of the slowest rank. moebius, gloo and "
    "the memcpy bound take turns, in ten blocks each. Each rank is pinned to a core where there are enough."
)


@dataclasses.dataclass(frozen=True)
class SweepOptions:
    """What the flags of `bench` say.

    Attributes:
        workloads: every configuration, those of the same ranks together.
        repeat: how often the whole sweep runs.
        seconds: measuring time of a configuration.
        csv: where the columns go.
        timeout_s: after which one configuration is killed.
    """

    workloads: list[Workload]
    repeat: int
    seconds: float
    csv: pathlib.Path
    timeout_s: float

    @classmethod
    def from_flags(cls, flags: dict[str, Any]) -> SweepOptions:
        """The product of all comma lists; what is not given takes the default sweep, or one tiny shape."""
        tiny = flags["tiny"]
        default: dict[str, list[Any]] = {
            "ranks": [2] if tiny else [max(num_cores(), 2), 2 * max(num_cores(), 2)],
            "tokens": [4] if tiny else [1, 64],
            "hidden": [256] if tiny else [2048, 7168],
            "payload": ["bf16"],
            "layout": ["token_major", "expert_major"],
            "routing": ["uniform"],
        }
        lists = {name: flags[name] or values for name, values in default.items()} | {"topk": flags["topk"]}
        trace, recorded = replayed(flags["routing_trace"])
        if recorded:
            lists |= {"topk": [recorded["topk"]], "routing": ["uniform"]}
        fixed = {name: flags[name] for name in ("experts", "max_num_tokens", "seed")} | recorded
        workloads = [
            Workload(routing_trace=trace, **(fixed | shape))
            for shape in (dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values()))
        ]
        for workload in workloads:
            workload.config()  # refuse an impossible one before anything runs
        seconds = min(flags["seconds"], 0.2) if tiny else flags["seconds"]
        return cls(workloads, max(flags["repeat"], 1), seconds, flags["csv"], flags["timeout"])


def run(options: SweepOptions) -> dict[str, Any]:
    """Run the sweep, print and write its columns.

    Returns:
        The rows with all their percentiles.
    """
    origin = provenance()
    if is_busy(origin["machine"]):
        out(f"The machine is busy (load {origin['machine']['load_1min']}): its latencies will be, too.")
    progress = Progress("bench")
    total = len(options.workloads) * options.repeat
    runs: dict[Workload, list[dict[str, Any]]] = {workload: [] for workload in options.workloads}
    engine = ""
    for ranks, group in itertools.groupby(options.workloads, key=lambda workload: workload.ranks):
        workloads = list(group)
        with RankPool(ranks, max(inbox_bytes(workload.config(), ranks) for workload in workloads)) as pool:
            for _, workload in itertools.product(range(options.repeat), workloads):
                rows, engine = _measure(pool, workload, options)
                runs[workload].append(rows)
                done = sum(map(len, runs.values()))
                one = rows["round"]
                progress.show(done / total, f"R={ranks} T={workload.tokens} H={workload.hidden} {workload.layout}: "
                              f"{us(one['moebius'].p50_us)} us, gloo {us(one['gloo'].p50_us)} us")  # fmt: skip
    progress.done()
    result: dict[str, Any] = {
        "kind": "bench",
        **origin,
        "engine": engine,
        "method": METHOD,
        "repeat": options.repeat,
        "columns": list(COLUMNS),
        "rows": [_row(workload, op, runs[workload]) for workload in options.workloads for op in SPANS],
    }
    _print(result)
    _write_csv(result["rows"], options.csv)
    out(f"Written: {options.csv}")
    return result


def _measure(pool: RankPool, workload: Workload, options: SweepOptions) -> tuple[dict[str, Any], str]:
    config = workload.config()
    drawn = [
        count_rows([route(workload, rank, step)[0] for rank in range(workload.ranks)], workload.experts)
        for step in range(ROUTINGS_DRAWN)
    ]
    rows = mean_rows(drawn)
    records: list[RoundTimes] = pool.run(
        run_rounds,
        timeout_s=options.timeout_s,
        workload=workload,
        traffic=[round_traffic(one, config) for one in rows],
        seconds=options.seconds,
    )
    wire = mean_wire([record.wire for record in records])
    sides = {name: [getattr(record, name) for record in records] for name in ("moebius", "gloo", "copy")}
    measured: dict[str, Any] = {}
    bound = bound_stats(sides.pop("copy"))
    for op, spans in SPANS.items():
        measured[op] = {name: summarise(slowest_us(ranks, *spans)) for name, ranks in sides.items()}
        measured[op]["copy"] = bound[op]
        measured[op]["wire_bytes"] = round(getattr(wire, op))
    return measured, records[0].engine


def _row(workload: Workload, op: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row: medians over the repetitions, whose p50s stand beside them."""

    def over_runs(side: str, value: str) -> float:
        values: list[float] = [getattr(run[op][side], value) for run in runs]
        return round(statistics.median(values), 2)

    first: dict[str, Stats] = runs[0][op]
    p50, baseline, bound = over_runs("moebius", "p50_us"), over_runs("gloo", "p50_us"), over_runs("copy", "p50_us")
    ratios = [run[op]["gloo"].p50_us / run[op]["moebius"].p50_us for run in runs]
    return {
        "op": op,
        "ranks": workload.ranks,
        "tokens": workload.tokens,
        "hidden": workload.hidden,
        "topk": workload.topk,
        "dtype": workload.payload,
        "layout": workload.layout,
        "routing": "trace" if workload.routing_trace else workload.routing,
        "mode": "eager",
        "p50_us": p50,
        "p99_us": over_runs("moebius", "p99_us"),
        "wire_bytes": runs[0][op]["wire_bytes"],
        "bound_us": bound,
        "baseline_p50_us": baseline,
        "experts": workload.experts,
        "max_num_tokens": workload.max_num_tokens or workload.tokens,
        "seed": workload.seed,
        "speedup": round(statistics.median(ratios), 3),
        "speedup_spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "times_bound": round(p50 / bound, 3),
        "p50_us_of_runs": [run[op]["moebius"].p50_us for run in runs],
        "baseline_p50_us_of_runs": [run[op]["gloo"].p50_us for run in runs],
        "bound_us_of_runs": [run[op]["copy"].p50_us for run in runs],
        "moebius": _without_curve(first["moebius"]),
        "gloo": _without_curve(first["gloo"]),
        "bound": _without_curve(first["copy"]),
    }


def _without_curve(stats: Stats) -> dict[str, object]:
    return {name: value for name, value in stats.to_json().items() if name != "curve_us"}


def _print(result: dict[str, Any]) -> None:
    rows = result["rows"]
    out(table(COLUMNS, [[_cell(row[name]) for name in COLUMNS] for row in rows]))
    out()
    for row in rows:
        if row["op"] == "round":
            low, high = row["speedup_spread"]
            spread = f" ({low:.2f} to {high:.2f} over {result['repeat']} runs)" if result["repeat"] > 1 else ""
            name = (
                f"R={row['ranks']} T={row['tokens']} H={row['hidden']} {row['dtype']} {row['layout']} {row['routing']}"
            )
            out(f"{name}: {row['speedup']:.2f}x faster than gloo{spread}, {row['times_bound']:.2f}x the memcpy bound")
    out()
    out(result["method"])


def _cell(value: object) -> str:
    return us(value) if isinstance(value, float) else str(value)


def _write_csv(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
