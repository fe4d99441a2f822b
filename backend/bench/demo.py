"""`python -m moebius demo`: decode steps of a MoE layer over moebius and over gloo, checked, timed, bounded, drawn."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from typing import TYPE_CHECKING, Any

import torch

from .baseline import message_bytes
from .bound import OPS, bound_stats, inbox_bytes, round_traffic
from .console import Progress, out, size, table, us
from .demo_rank import MARKS, SIDES, RankRecord, Reference, Schedule, run_demo
from .machine import is_busy, provenance
from .moe_layer import WholeLayer, tolerance
from .ranks import RankPool, num_cores
from .report import write_report
from .timing import MIN_SAMPLES_P999, Instants, Stats, slowest_us, summarise
from .wire import Wire, gloo_wire, mean_wire, per_expert_wire
from .workload import RowCounts, Workload, count_rows, mean_rows

if TYPE_CHECKING:
    import pathlib

POOL_STEPS = 16  # distinct steps that the run repeats; more than any depth, so stale rows cannot pass
STEPS_PER_BLOCK = 50
COPIES_PER_BLOCK = 12
ROWS = (*OPS, "round", "step")
OP_SPANS = {
    "dispatch": [("dispatch_begin", "dispatch_end")],
    "combine": [("combine_begin", "combine_end")],
    "round": [("dispatch_begin", "dispatch_end"), ("combine_begin", "combine_end")],
    "step": [("begin", "end")],
}
METHOD = (
    "All ranks enter dispatch, and combine, together: through a barrier in shared memory that is not timed. "
    "A sample is the time of the slowest rank, from call to return, in Python. A round is dispatch plus combine; a "
    "step is the whole layer (router, dispatch, experts, shared expert, combine, sum), waits for the slowest included. "
    "moebius, gloo and the copies of the bound take turns in short blocks of one run, so that noise meets all of them. "
    "Each rank is pinned to a core where there are enough."
)
BOUND = (
    "The bound is the time in which all ranks at once memcpy as many bytes as a round must read and write, "
    "with the share that belongs to other ranks going to their memory (times ranks per core, where there are more); no "
    "counting, signals or sums."
)


@dataclasses.dataclass(frozen=True)
class DemoOptions:
    """What the demo's own flags say.

    Attributes:
        steps: on each side.
        seconds: after which no more steps begin.
        intermediate: I, channels inside an expert.
        report: where the HTML goes.
        timeout_s: after which everything is killed.
    """

    steps: int
    seconds: float
    intermediate: int
    report: pathlib.Path
    timeout_s: float


def run(workload: Workload, options: DemoOptions) -> dict[str, Any]:
    """Run the demo and write its report.

    Returns:
        Everything the table shows, and the curves and bars of the report.
    """
    config = workload.config()
    origin = provenance()
    if is_busy(origin["machine"]):
        out(f"The machine is busy (load {origin['machine']['load_1min']}): its latencies will be, too.")
    torch.set_num_threads(num_cores())
    progress = Progress("reference")
    references, rows = _references(workload, options.intermediate, progress)
    traffic = [round_traffic(one, config) for one in rows]
    block = max(min(STEPS_PER_BLOCK, options.steps // 4), 1)
    schedule = Schedule(
        steps=options.steps,
        block=block,
        warmup=min(2 * POOL_STEPS, options.steps),
        copies=COPIES_PER_BLOCK,
        timeline=min(60, options.steps),
        seconds=options.seconds,
    )
    progress = Progress("running")

    def show(state: Any) -> None:
        blocks, p50 = state
        note = f"a round: moebius {us(p50['moebius'])} us, gloo {us(p50['gloo'])} us"
        progress.show(blocks / schedule.blocks, note)

    with RankPool(workload.ranks, inbox_bytes(config, workload.ranks)) as pool:
        records = pool.run(
            run_demo,
            timeout_s=options.timeout_s,
            shards=references,
            on_progress=show,
            workload=workload,
            intermediate=options.intermediate,
            traffic=traffic,
            schedule=schedule,
        )
    progress.done()
    result = {"kind": "demo", **origin, **_result(workload, options, records, rows)}
    write_report(result, options.report)
    result["report"] = str(options.report)
    return result


def _references(workload: Workload, intermediate: int, progress: Progress) -> tuple[list[bytes], list[RowCounts]]:
    """Compute the steps in this one process.

    Returns:
        A share for each rank, and the mean rows a rank handles.
    """
    layer = WholeLayer(workload, intermediate)
    steps, counts = [], []
    with torch.inference_mode():
        for step in range(POOL_STEPS):
            steps.append(layer.expect(step))
            counts.append(count_rows(list(steps[-1].topk_ids), workload.experts))
            progress.show((step + 1) / POOL_STEPS, "the layer in one process")
    progress.done("the layer in one process")
    shares = [
        Reference(
            topk_ids=torch.stack([step.topk_ids[rank] for step in steps]),
            y=torch.stack([step.y[rank] for step in steps]),
            scale=torch.stack([step.scale[rank] for step in steps]),
        ).pack()
        for rank in range(workload.ranks)
    ]
    return shares, mean_rows(counts)


def _result(
    workload: Workload, options: DemoOptions, records: list[RankRecord], rows: list[RowCounts]
) -> dict[str, Any]:
    config = workload.config()
    times = {side: [record.steps[side] for record in records] for side in SIDES}
    bound = bound_stats([record.copies for record in records])
    ops: dict[str, Any] = {}
    for op in ROWS:
        sides = {side: _op_stats(op, times[side]) for side in SIDES}
        limit = bound.get(op)
        ops[op] = {
            "moebius": sides["moebius"].to_json(),
            "gloo": sides["gloo"].to_json(),
            "bound": limit.to_json() if limit else None,
            "speedup_p50": sides["gloo"].p50_us / sides["moebius"].p50_us,
            "times_bound_p50": sides["moebius"].p50_us / limit.p50_us if limit else None,
        }
    wires = {
        "moebius": mean_wire([record.wire for record in records]),
        "gloo": gloo_wire(rows, config, message_bytes(config)),
        "per_expert": per_expert_wire(rows, config),
    }
    return {
        "workload": dataclasses.asdict(workload),
        "intermediate": options.intermediate,
        "engine": records[0].engine,
        "heap_bytes": records[0].heap_bytes,
        "method": METHOD,
        "bound_method": BOUND,
        "ops": ops,
        "parts_us": {side: _parts(times[side]) for side in SIDES},
        "check": _check(workload, records),
        "wire_bytes": {name: _wire_json(wire) for name, wire in wires.items()},
        "timeline": {side: _median_round([record.timeline[side] for record in records]) for side in SIDES},
    }


def _op_stats(op: str, ranks: list[Instants]) -> Stats:
    return summarise(slowest_us(ranks, *((MARKS.index(begin), MARKS.index(end)) for begin, end in OP_SPANS[op])))


def _parts(ranks: list[Instants]) -> dict[str, float]:
    """Where a median step goes, averaged over the ranks."""
    names = ("router", "dispatch", "experts", "combine", "sum")  # the spans between neighbouring MARKS
    parts = {}
    for column, name in enumerate(names):
        lengths = [[row[column + 1] - row[column] for row in rows] for rows in zip(*ranks, strict=True)]
        parts[name] = statistics.median(map(statistics.fmean, lengths)) / 1e3
    return parts


def _check(workload: Workload, records: list[RankRecord]) -> dict[str, Any]:
    limit = tolerance(workload.config())
    check: dict[str, Any] = {"tolerance": limit}
    for side in SIDES:
        outcomes = [record.checked[side] for record in records]
        check[side] = {
            "steps": outcomes[0].steps,
            "rank_steps": sum(outcome.steps for outcome in outcomes),
            "wrong_routing": sum(outcome.wrong_routing for outcome in outcomes),
            "wrong_output": sum(outcome.wrong_output for outcome in outcomes),
            "worst_error": max(outcome.worst for outcome in outcomes),
        }
    check["passed"] = all(not check[side]["wrong_routing"] and not check[side]["wrong_output"] for side in SIDES)
    return check


def _wire_json(wire: Wire) -> dict[str, float]:
    return {"dispatch": round(wire.dispatch), "combine": round(wire.combine), "round": round(wire.round)}


def _median_round(timelines: list[list[list[tuple[str, int]]]]) -> list[list[tuple[str, float, float]]]:
    """The round of median length, from [R][rounds] marks: by rank, the (part, begin, end) in microseconds."""
    rounds = list(zip(*timelines, strict=True))
    lengths = [max(marks[-1][1] for marks in one) - min(marks[0][1] for marks in one) for one in rounds]
    chosen = rounds[sorted(range(len(rounds)), key=lengths.__getitem__)[len(rounds) // 2]]
    origin = min(marks[0][1] for marks in chosen)
    return [
        [
            (name, (previous - origin) / 1e3, (end - origin) / 1e3)
            for (_, previous), (name, end) in itertools.pairwise(marks)
        ]
        for marks in chosen
    ]


def print_result(result: dict[str, Any]) -> None:
    """The table, what was checked, and where the report is."""
    ops, check, wire = result["ops"], result["check"], result["wire_bytes"]
    header = ["us", "p50", "p99", "p99.9", "gloo p50", "p99", "p99.9", "speed-up", "bound", "of bound"]
    body = []
    for op in ROWS:
        ours, gloo, bound = ops[op]["moebius"], ops[op]["gloo"], ops[op]["bound"]
        body.append(
            [
                op,
                *(us(ours[name]) for name in ("p50_us", "p99_us", "p999_us")),
                *(us(gloo[name]) for name in ("p50_us", "p99_us", "p999_us")),
                f"{ops[op]['speedup_p50']:.2f}x",
                us(bound["p50_us"]) if bound else "",
                f"{ops[op]['times_bound_p50']:.2f}x" if bound else "",
            ]
        )
    out()
    out(table(header, body))
    samples = ops["round"]["moebius"]["samples"]
    out()
    rare = "" if samples >= MIN_SAMPLES_P999 else f"; p99.9 needs {MIN_SAMPLES_P999}"
    out(
        f"Samples: {samples} steps a side, the slowest rank of each{rare}. "
        "Bound: memcpy of the bytes a round must move."
    )
    for side in SIDES:
        one = check[side]
        wrong = one["wrong_routing"] + one["wrong_output"]
        verdict = "all equal to the layer in one process" if not wrong else f"{wrong} WRONG"
        worst = one["worst_error"] / check["tolerance"] if check["tolerance"] else math.inf
        out(
            f"Checked: {one['steps']} steps on every rank over {side}: {verdict} "
            f"(worst error {worst:.0%} of the tolerance)."
        )
    out(
        f"On the wire, per rank and round: {size(wire['moebius']['round'])}; gloo {size(wire['gloo']['round'])}; "
        f"one message per (token, expert) would be {size(wire['per_expert']['round'])}."
    )
    out(f"Report: {result['report']}")
