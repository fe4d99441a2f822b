"""`python -m moebius bench --device cuda`: points within a time, printed and written to a folder."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import pathlib
from time import monotonic
from typing import TYPE_CHECKING, Any

from moebius.bench.console import Progress, out, us
from moebius.bench.machine import provenance
from moebius.bench.routing_trace import replayed
from moebius.bench.workload import Workload
from moebius.errors import ConfigError
from moebius.group import virtual_ranks

from . import gpu
from .devices import CudaDevice
from .hbm import CopyBound
from .measure import Bench, Measured
from .processes import GpuPool
from .report import write_report
from .rows import COLUMNS, find, fits, point_rows
from .suites import Point, decode_suite, smoke_suite, sweep_points
from .tables import METHOD, print_result
from .trace import profile_hooks

if TYPE_CHECKING:
    from collections.abc import Callable

    from .devices import Device

RESERVE_S = 15.0  # of the budget, for the profile and the writing
HOST_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class CudaOptions:
    """What the flags of `bench --device cuda` say.

    Attributes:
        base: R, E, K, H, routing and seed of every point.
        suite: "decode", "smoke", or "" for the lists.
        lists: without a suite: values of each field of a workload.
        sms: without a suite: budgets of a rank; 0 for all, shared out.
        is_virtual: all ranks in this process on one GPU; else a process and a GPU each.
        seconds: of each schedule of a point.
        budget_s: after which no further point is begun.
        folder: where the results go.
    """

    base: Workload
    suite: str
    lists: dict[str, list[Any]]
    sms: list[int]
    is_virtual: bool
    seconds: float
    budget_s: float
    folder: pathlib.Path

    @classmethod
    def from_flags(cls, flags: dict[str, Any]) -> CudaOptions:
        """Fill in what is not given.

        Raises:
            ConfigError: flags that exclude each other, or an impossible shape.
        """
        suite = "smoke" if flags["tiny"] else flags["suite"] or ""
        if flags["virtual_ranks"] and flags["ranks"]:
            raise ConfigError("`--virtual-ranks` (one GPU) and `--ranks` (a GPU each) exclude each other")
        if flags["ranks"] and len(flags["ranks"]) > 1:
            raise ConfigError(f"`--ranks` takes one number with `--device cuda` (got {flags['ranks']})")
        ranks = flags["virtual_ranks"] or (flags["ranks"] or [8])[0]
        small = suite == "smoke"
        trace, recorded = replayed(flags["routing_trace"])
        shape = {
            "ranks": min(ranks, 2) if small else ranks,
            "experts": 8 if small else flags["experts"] or 256,
            "topk": 2 if small else flags["topk"][0],
            "hidden": 256 if small else (flags["hidden"] or [7168])[0],
            "tokens": 8 if small else 128,
            "routing": (flags["routing"] or ["uniform"])[0],
            "seed": flags["seed"],
            "max_num_tokens": 0 if suite else flags["max_num_tokens"],
        }
        base = Workload(routing_trace=trace, **(shape | recorded))
        lists = {
            "hidden": flags["hidden"] or [base.hidden],
            "topk": [base.topk] if recorded else flags["topk"],
            "layout": flags["layout"] or ["expert_major"],
            "payload": flags["payload"] or ["bf16", "fp8_e4m3"],
            "routing": flags["routing"] or ["uniform"],
            "tokens": flags["tokens"] or [1, 128],
        }
        folder = flags["out"] or pathlib.Path("moebius-report/cuda")
        options = cls(
            base, suite, lists, flags["sms"] or [0], not flags["ranks"], flags["seconds"], flags["budget"], folder
        )
        for point in options.points(on_device=128):
            point.workload.config()  # refuse an impossible one before anything runs
        return options

    def points(self, on_device: int) -> list[Point]:
        """What to measure on a device of so many multiprocessors."""
        suites = {"decode": decode_suite, "smoke": smoke_suite}
        if self.suite:
            return suites[self.suite](self.base, on_device, self.base.ranks if self.is_virtual else 1)
        return sweep_points(self.base, self.lists, self.sms)


@dataclasses.dataclass
class _Found:
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)


def run(options: CudaOptions, make_device: Callable[[int], Device] = CudaDevice) -> dict[str, Any]:
    """Measure, print and write.

    Args:
        options: what.
        make_device: the device with so many lanes; another one lets the flow run without a GPU.

    Returns:
        Everything that was found, as written to `results.json`.

    Raises:
        NoDeviceError: no GPU, or fewer than `--ranks`.
    """
    begin = monotonic()
    first = make_device(1)
    origin, about = provenance(), gpu.describe(first)
    bound = CopyBound(first)
    options.folder.mkdir(parents=True, exist_ok=True)
    found, extra = _Found(), dict[str, Any]()
    watch = gpu.Watch(first.where.index or 0, gpu.state if first.is_cuda else lambda _: {})

    def content() -> dict[str, Any]:
        return {
            "kind": "bench-cuda",
            **origin,
            "gpu": about | {"meanwhile": watch.seen, "stream_gbps": bound.stream_gbps},
            "suite": options.suite or "sweep",
            "ranks_are": "virtual ranks on streams of one GPU" if options.is_virtual else "processes, a GPU each",
            "method": METHOD,
            "columns": list(COLUMNS),
            "rows": found.rows,
            "fits": fits(found.rows),
            **extra,
            "errors": found.errors,
            "skipped": found.skipped,
            "seconds": round(monotonic() - begin, 1),
        }

    deadline = begin + options.budget_s - RESERVE_S
    # What a summary needs comes before the many points; a run that is cut short still has it.
    if options.is_virtual:
        extra |= _single_rank(options, make_device, found)
    points = options.points(first.num_sms)
    progress = Progress("bench")
    done = 0
    for ranks, group in itertools.groupby(points, key=lambda point: point.workload.ranks):
        bench = _virtual(options, make_device, ranks) if options.is_virtual else GpuPool(ranks, options.seconds)
        try:
            if isinstance(bench, Bench):
                extra.setdefault("frame_us", {})[str(ranks)] = _median_or_error(bench, found)
            for point in group:
                done += 1
                if monotonic() > deadline:
                    found.skipped.append(point.name)
                    continue
                measured = _measure(bench, point)
                watch.look()  # right after work, so that the clocks are those of the work
                found.errors += [error for one in measured for error in one.errors]
                found.rows += point_rows(point, measured, bound) if all(one.bytes for one in measured) else []
                progress.show(done / len(points), _note(point, found.rows))
                _write_json(options.folder / "results.json", content())
        finally:
            bench.close()
    progress.done()
    if options.is_virtual:
        extra |= _profile(options, make_device, found)
    result = content()
    _write_json(options.folder / "results.json", result)
    _write_csv(options.folder / "results.csv", result["rows"])
    write_report(result, options.folder / "index.html")
    print_result(result)
    out(f"Written: {options.folder}/ (index.html, results.json, results.csv)")
    return result


def _virtual(options: CudaOptions, make_device: Callable[[int], Device], ranks: int) -> Bench:
    return Bench(make_device(ranks), lambda: virtual_ranks(ranks), options.seconds)


def _measure(bench: Bench | GpuPool, point: Point) -> list[Measured]:
    return [bench.measure(point)] if isinstance(bench, Bench) else bench.measure(point)


def _single_rank(options: CudaOptions, make_device: Callable[[int], Device], found: _Found) -> dict[str, Any]:
    """Host time of the calls of one rank, which no other can hold up."""
    extra: dict[str, Any] = {}
    for payload in ("bf16", "fp8_e4m3"):
        bench = _virtual(options, make_device, 1)
        try:
            point = _point_of_one(options, payload)
            extra.setdefault("torch_launch_us", round(bench.launch_us(), 3))
            times = bench.host_us(point)
            extra.setdefault("host_us", {})[payload] = {
                name: {"p50_us": _percentile(values, 0.5), "p99_us": _percentile(values, 0.99), "samples": len(values)}
                for name, values in times.items()
            }
        except (RuntimeError, ValueError, OSError) as error:
            found.errors.append(f"host {payload}: {type(error).__name__}: {str(error).splitlines()[0]}")
        finally:
            bench.close()
    return extra


def _profile(options: CudaOptions, make_device: Callable[[int], Device], found: _Found) -> dict[str, Any]:
    """What runs between the halves, seen by torch's profiler. After all that is timed: it stays in the process."""
    bench = _virtual(options, make_device, 1)
    try:
        with bench.world(_point_of_one(options, "bf16")) as world:
            return {"profile": profile_hooks(world, options.folder / "hook-trace.json")}
    except (RuntimeError, ValueError, OSError) as error:
        found.errors.append(f"profile: {type(error).__name__}: {str(error).splitlines()[0]}")
        return {}
    finally:
        bench.close()


def _point_of_one(options: CudaOptions, payload: str) -> Point:
    tokens = min(HOST_TOKENS, options.base.tokens)
    return Point(
        "host",
        dataclasses.replace(options.base, ranks=1, payload=payload, tokens=tokens, max_num_tokens=tokens),
    )


def _percentile(values: list[float], share: float) -> float:
    return round(sorted(values)[min(int(share * len(values)), len(values) - 1)], 3)


def _median_or_error(bench: Bench, found: _Found) -> float | None:
    try:
        return _percentile(bench.frame_us(), 0.5)
    except RuntimeError as error:
        found.errors.append(f"frame: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None


def _note(point: Point, rows: list[dict[str, Any]]) -> str:
    one = find(rows[-20:], tokens=point.workload.tokens, dtype=point.workload.payload, op="round")
    return f"{point.name}: " + (f"round {us(one['p50_us'])} us" if one else "no figure")


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_csv(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
