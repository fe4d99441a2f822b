"""The result as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moebius.bench.console import out, table, us

from .rows import find

if TYPE_CHECKING:
    from collections.abc import Iterable

METHOD = (
    "Rounds without experts. All ranks' sends are launched before any receive, from one thread, without a host "
    "synchronisation or an allocation of ours in between. graph: rounds in one CUDA graph, medians over its "
    "replays, each behind a short gate; eager: launches behind a gate kernel, so that the host is not in it. "
    "chained: one fork, all rounds back to back on each rank's stream, one join, over the number of rounds; of "
    "dispatch alone, each waits for all ranks' next one but depth besides. "
    "by_op, by_half: CUDA events at a join after each operation, or half, of all ranks; a fork and a join (frame) "
    "are in each figure. lockstep: a join after every half, the round as a whole. No half is timed in a loop of "
    "its own, which the protocol does not allow. moved_bytes: read plus written by all ranks on the device, "
    "counted from the routing. bound: a device copy that moves as many, out of uncached memory; stream: those "
    "bytes at the rate of a large copy. baseline: torch on the same streams, its indices given (index, quantise, "
    "copy, reduce)."
)
SHOWN = ("tokens", "dtype", "layout", "mode", "op", "p50_us", "p99_us", "bound_us", "times_bound", "baseline_p50_us",
         "speedup", "gbps")  # fmt: skip
GOAL_TIMES_BOUND, GOAL_FIXED_US, GOAL_HOST_US = 1.5, 25.0, 15.0  # what the engine is to reach at least


def goals(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that the engine is judged by, beside what they are to be; absent ones are left out.

    Returns:
        what, value, most, unit, reached.
    """
    rows, found = result["rows"], []
    for dtype in ("bf16", "fp8_e4m3"):
        found += _times_bound(dtype, [row for row in rows if row["section"] == "decode" and row["tokens"] == 128
                                      and row["layout"] == "expert_major" and row["mode"] == "graph"])  # fmt: skip
    for dtype in ("bf16", "fp8_e4m3"):
        row = find_round(rows, section="decode", tokens=1, dtype=dtype, layout="expert_major", mode="graph")
        if row:
            found.append(_goal(f"round in a graph, T=1, {dtype}", row["p50_us"], GOAL_FIXED_US, "us"))
    for dtype, halves in result.get("host_us", {}).items():
        found.append(_goal(f"host time of a round's two calls, {dtype}", halves["round"]["p50_us"], GOAL_HOST_US, "us"))
    return found


def _times_bound(dtype: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Dispatch and combine in a chain, without the forks and joins of ranks that share a GPU."""
    dispatch = find(rows, dtype=dtype, schedule="chained", op="dispatch")
    both = find(rows, dtype=dtype, schedule="chained", op="round")
    combine = find(rows, dtype=dtype, schedule="by_op", op="combine")
    if not (dispatch and both and combine and dispatch["bound_us"] and combine["bound_us"]):
        return []
    rest = (both["p50_us"] - dispatch["p50_us"]) / combine["bound_us"]
    return [
        _goal(f"dispatch, T=128, {dtype}, in a chain: times the bound", dispatch["times_bound"], GOAL_TIMES_BOUND, "x"),
        _goal(f"combine, T=128, {dtype}, the round less that: times the bound", rest, GOAL_TIMES_BOUND, "x"),
    ]


def _goal(what: str, value: float, most: float, unit: str) -> dict[str, Any]:
    return {"what": what, "value": value, "most": most, "unit": unit, "reached": value <= most}


def find_round(rows: Iterable[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    """The row of a round: chained, or in lockstep where it could not be."""
    rows = list(rows)
    return find(rows, op="round", schedule="chained", **wanted) or find(rows, op="round", schedule="lockstep", **wanted)


def gpu_line(result: dict[str, Any]) -> str:
    """The device in a line."""
    gpu, machine = result["gpu"], result["machine"]
    before, clocks = gpu.get("before") or {}, ""
    if before:
        seen = [int(one["sm_clock_mhz"]) for one in gpu["meanwhile"] if one.get("sm_clock_mhz", "").isdigit()]
        clocks = f", driver {before['driver']}, SM clock {before['sm_clock_mhz']} MHz before"
        clocks += f", {min(seen)} to {max(seen)} meanwhile" if seen else ""
        clocks += f" (at most {before['most_sm_clock_mhz']}), memory {before['memory_clock_mhz']} MHz"
    return (
        f"{gpu['name']}, {gpu['sms']} SMs{clocks}; a large copy moves {gpu['stream_gbps']:.0f} GB/s; "
        f"torch {machine['torch']} (CUDA {gpu['torch_cuda']}), commit {result['commit'] or 'unknown'}"
    )


def cell(value: object) -> str:
    """A value of a column as text."""
    if value is None:
        return "-"
    return us(value) if isinstance(value, float) else str(value)


def _ratio(name: str, value: object) -> str:
    return f"{value:.2f}x" if name in ("times_bound", "speedup") and isinstance(value, float) else cell(value)


def print_result(result: dict[str, Any]) -> None:
    """Tables of every section, the fits, what the engine is judged by, and what went wrong."""
    out()
    out(gpu_line(result))
    out(f"{result['ranks_are']}; suite {result['suite']}, {result['seconds']} s")
    for section in dict.fromkeys(row["section"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["section"] == section and row["op"] in _ops(section)]
        columns = ("ranks", "sms", "schedule", *SHOWN) if section != "decode" else ("schedule", *SHOWN)
        out()
        out(section)
        out(table(columns, [[_ratio(name, row[name]) for name in columns] for row in rows]))
    _print_fits(result["fits"])
    _print_single(result)
    summary = goals(result)
    if summary:
        out()
        header = ("figure", "measured", "at most", "")
        body = [[one["what"], f"{one['value']:.2f} {one['unit']}", f"{one['most']:g} {one['unit']}",
                 "reached" if one["reached"] else "NOT REACHED"] for one in summary]  # fmt: skip
        out(table(header, body))
    for name, entries in (("Not measured", result["errors"]), ("Out of time", result["skipped"])):
        if entries:
            out()
            out(f"{name}:")
            for entry in entries:
                out(f"  {entry}")
    out()
    out(result["method"])


def _ops(section: str) -> tuple[str, ...]:
    halves = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv")
    return ("dispatch", "combine", "round", *halves) if section != "decode" else ("dispatch", "combine", "round")


def _print_fits(fits: list[dict[str, Any]]) -> None:
    shown = [fit for fit in fits if fit["op"] in ("dispatch", "combine", "round") and fit["mode"] == "graph"]
    if not shown:
        return
    out()
    out("fixed cost and slope (time = fixed + slope x tokens of a rank)")
    columns = ("dtype", "layout", "op", "schedule", "fixed_us", "slope_us", "bound_slope_us", "worst")
    body = []
    for fit in shown:
        values = [str(fit[name]) for name in columns[:4]]
        slope = "-" if fit["bound_slope_us"] is None else f"{fit['bound_slope_us']:.4f}"
        body.append([*values, f"{fit['fixed_us']:.2f}", f"{fit['slope_us']:.4f}", slope, f"{fit['worst']:.0%}"])
    out(table(columns, body, left=4))


def _print_single(result: dict[str, Any]) -> None:
    if "torch_launch_us" in result:
        out()
        out(f"host time of torch's smallest call with a kernel: {us(result['torch_launch_us'])} us")
    for dtype, halves in result.get("host_us", {}).items():
        parts = ", ".join(f"{name} {us(one['p50_us'])}" for name, one in halves.items())
        out()
        out(f"host time of the calls, {dtype}, one rank, eager, us: {parts}")
    for ranks, frame in result.get("frame_us", {}).items():
        out(f"frame of {ranks} ranks (a fork, an empty kernel each, a join): {us(frame)} us")
    profile = result.get("profile")
    if profile:
        worst = max((gap["overlap_us"] for gap in profile["gaps"]), default=0.0)
        state = "none of ours ran in them" if profile["clean"] else f"ours ran into them for up to {worst} us"
        out(f"hook form: {len(profile['gaps'])} gaps with the caller's kernels in the profile, {state}")
