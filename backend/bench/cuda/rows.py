"""The rows of a result: what was measured, beside its bound and its baseline. Pure: from samples to columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moebius.bench.timing import summarise

from .fit import two_terms
from .schedules import HALVES, OPS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .hbm import CopyBound
    from .measure import Measured
    from .suites import Point

COLUMNS = (
    "section", "op", "ranks", "tokens", "hidden", "topk", "dtype", "layout", "routing", "mode", "schedule", "sms",
    "p50_us", "p99_us", "samples", "moved_bytes", "gbps", "bound_us", "times_bound", "stream_us", "baseline_p50_us",
    "speedup",
)  # fmt: skip


def slowest(processes: list[Measured]) -> dict[tuple[str, str, str, str], list[float]]:
    """Samples of several processes as one: that of the slowest, sample by sample."""
    first = processes[0].samples
    keys = [key for key in first if all(key in one.samples for one in processes)]
    return {key: [max(values) for values in zip(*(one.samples[key] for one in processes), strict=True)] for key in keys}


def point_rows(point: Point, processes: list[Measured], bound: CopyBound | None) -> list[dict[str, Any]]:
    """A row for each schedule and op of ours.

    Args:
        point: what was measured.
        processes: what each found; one for virtual ranks.
        bound: of the device; None leaves its columns empty.
    """
    samples = slowest(processes)
    moved = {name: max(one.bytes[name] for one in processes) for name in processes[0].bytes}
    rows = []
    for (side, mode, schedule, op), values in samples.items():
        if side != "moebius":
            continue
        stats = summarise(values)
        plain = _baseline_us(samples, mode, op)
        bytes_of = moved[op]
        bound_us = bound.same_bytes_us(bytes_of) if bound and bytes_of else None
        one = point.workload
        rows.append(
            {
                "section": point.section,
                "op": op,
                "ranks": one.ranks,
                "tokens": one.tokens,
                "hidden": one.hidden,
                "topk": one.topk,
                "dtype": one.payload,
                "layout": one.layout,
                "routing": "trace" if one.routing_trace else one.routing,
                "mode": mode,
                "schedule": schedule,
                "sms": processes[0].sms,
                "p50_us": stats.p50_us,
                "p99_us": stats.p99_us,
                "samples": stats.samples,
                "moved_bytes": bytes_of,
                "gbps": round(bytes_of / stats.p50_us / 1e3, 1) if stats.p50_us else None,
                "bound_us": bound_us,
                "times_bound": round(stats.p50_us / bound_us, 3) if bound_us else None,
                "stream_us": round(bound.stream_us(bytes_of), 3) if bound else None,
                "baseline_p50_us": plain,
                "speedup": round(plain / stats.p50_us, 3) if plain and stats.p50_us else None,
                "experts": one.experts,
                "max_num_tokens": one.max_num_tokens or one.tokens,
                "seed": one.seed,
                "percentiles_us": stats.percentiles,
                "mean_us": stats.mean_us,
            }
        )
    return rows


def _baseline_us(samples: dict[tuple[str, str, str, str], list[float]], mode: str, op: str) -> float | None:
    """Median of torch's time for an op: its halves added, round by round; of the round the lockstep if that is less."""
    if op == "round":
        both = (_plain_us(samples, mode, "lockstep", ("round",)), _plain_us(samples, mode, "by_half", HALVES))
        return min((one for one in both if one is not None), default=None)
    return _plain_us(samples, mode, "by_half", OPS.get(op, (op,)))


def _plain_us(
    samples: dict[tuple[str, str, str, str], list[float]], mode: str, schedule: str, halves: Sequence[str]
) -> float | None:
    found = [samples.get(("torch", mode, schedule, half)) for half in halves]
    whole = [values for values in found if values]
    if len(whole) < len(halves):
        return None
    return summarise(sum(values) for values in zip(*whole, strict=True)).p50_us


def fits(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """A fixed cost and a slope for each op, mode and shape whose number of tokens varies."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    names = ("section", "op", "ranks", "hidden", "topk", "dtype", "layout", "routing", "mode", "schedule", "sms")
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    found = []
    for key, group in groups.items():
        fit = two_terms([row["tokens"] for row in group], [row["p50_us"] for row in group])
        if fit is None:
            continue
        entry: dict[str, Any] = dict(zip(names, key, strict=True)) | {
            "tokens": sorted(row["tokens"] for row in group),
            "fixed_us": fit.fixed_us,
            "slope_us": fit.slope_us,
            "worst": fit.worst,
        }
        bounds = [row["bound_us"] for row in group]
        limit = two_terms([row["tokens"] for row in group], bounds) if all(bounds) else None
        found.append(entry | {"bound_slope_us": limit.slope_us if limit else None})
    return found


def find(rows: Iterable[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
    """The first row with these values."""
    return next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)
