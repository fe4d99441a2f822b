"""The result as one HTML page, in the style of the other reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moebius.bench.console import size, us
from moebius.bench.page import card, escape, facts, legend, page, section
from moebius.bench.svg import Series, chart, short_us

from .schedules import HALVES
from .tables import cell, find_round, goals, gpu_line

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterable, Sequence

_OPS = ("dispatch", "combine", "round")
_TABLE = ("tokens", "op", "p50_us", "p99_us", "moved_bytes", "gbps", "bound_us", "times_bound", "baseline_p50_us",
          "speedup")  # fmt: skip
_HEADERS = {
    "tokens": "T", "op": "", "p50_us": "p50", "p99_us": "p99", "moved_bytes": "moved", "gbps": "GB/s",
    "bound_us": "copy bound", "times_bound": "of bound", "baseline_p50_us": "torch", "speedup": "speed-up",
    "schedule": "schedule", "sms": "SMs", "ranks": "R", "dtype": "dtype",
}  # fmt: skip


def write_report(result: dict[str, Any], path: pathlib.Path) -> None:
    """Write the page to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(result), encoding="utf-8")


def render(result: dict[str, Any]) -> str:
    """The page as text."""
    first = find_round(result["rows"]) if result["rows"] else None
    title = f"The CUDA engine on {result['gpu']['name']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(result, first))}</p>',
        _cards(result),
        *_decode(result),
        _budgets(result),
        _prefill(result),
        _sweep(result),
        _single(result),
        _missing(result),
        _provenance(result),
    ]
    return page(f"moebius bench: {title}", "\n".join(part for part in parts if part))


def _lead(result: dict[str, Any], row: dict[str, Any] | None) -> str:
    if row is None:
        return "Nothing was measured; what stood in the way is listed below."
    return (
        f"{row['ranks']} ranks ({result['ranks_are']}), {row['hidden']} channels, top-{row['topk']} of "
        f"{row['experts']} experts, {row['routing']} routing. Every figure stands beside a device copy of the same "
        "bytes and the same exchange in torch, measured in the same run."
    )


def _cards(result: dict[str, Any]) -> str:
    shown = goals(result)
    cards = [
        card(
            f"{one['value']:.2f}{'x' if one['unit'] == 'x' else ' µs'}",
            f"{one['what']} (at most {one['most']:g})",
            "good" if one["reached"] else "bad",
        )
        for one in shown
    ]
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _shapes(rows: Iterable[dict[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["layout"], row["dtype"]) for row in rows))


def _decode(result: dict[str, Any]) -> list[str]:
    """A section for each layout and payload: charts over T in graphs, then all figures."""
    rows = [row for row in result["rows"] if row["section"] == "decode"]
    sections = []
    for layout, dtype in _shapes(rows):
        own = [row for row in rows if (row["layout"], row["dtype"]) == (layout, dtype)]
        graphs = [row for row in own if row["mode"] == "graph"]
        plots = "".join(_over_tokens(op, [row for row in graphs if row["op"] == op]) for op in _OPS)
        fitted = [
            f"{fit['op']}: {fit['fixed_us']:.1f} µs + {fit['slope_us']:.3f} µs x T"
            for fit in result["fits"]
            if (fit["section"], fit["layout"], fit["dtype"], fit["mode"]) == ("decode", layout, dtype, "graph")
            and fit["op"] in _OPS
        ]
        sections.append(
            section(
                f"Decode, {layout}, {dtype}",
                "In a graph, at the median. " + ("Fitted: " + "; ".join(fitted) + "." if fitted else ""),
                legend([("ours", "moebius"), ("gloo", "torch"), ("bound", "copy of the same bytes")]),
                f'<div class="plots">{plots}</div>',
                _figures([row for row in graphs if row["op"] in _OPS], ("schedule", *_TABLE)),
                "<h3>Half by half</h3>",
                _figures([row for row in graphs if row["op"] in HALVES], _TABLE),
                "<h3>Eager</h3>",
                _figures([row for row in own if row["mode"] == "eager" and row["op"] in _OPS], ("schedule", *_TABLE)),
            )
        )
    return sections


def _over_tokens(op: str, rows: list[dict[str, Any]]) -> str:
    def points(name: str) -> list[tuple[float, float]]:
        return [(float(row["tokens"]), row[name]) for row in rows if row[name]]

    names = {"p50_us": ("moebius", "ours"), "baseline_p50_us": ("torch", "gloo"), "bound_us": ("copy bound", "copy")}
    series = [Series(name, style, points(column)) for column, (name, style) in names.items()]
    if not points("p50_us"):
        return ""
    return f"<div><h3>{op}</h3>{chart(f'{op} over tokens', series, 'tokens of a rank, T')}</div>"


def _figures(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(_HEADERS[name])}</th>" for name in columns)
    body = []
    for row in rows:
        cells = []
        for name in columns:
            main = ' class="main"' if name in ("p50_us", "times_bound") else ""
            cells.append(f"<td{main}>{escape(_value(name, row[name]))}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _value(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name == "moved_bytes":
        return size(value)
    return f"{value:.2f}x" if name in ("times_bound", "speedup") else cell(value)


def _budgets(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["section"] == "sms" and row["op"] in HALVES]
    if not rows:
        return ""
    plots = []
    for ranks, op in dict.fromkeys((row["ranks"], row["op"]) for row in rows):
        own = [row for row in rows if (row["ranks"], row["op"]) == (ranks, op)]
        series = [
            Series(dtype, style, [(float(row["sms"]), row["p50_us"]) for row in own if row["dtype"] == dtype])
            for dtype, style in (("bf16", "ours"), ("fp8_e4m3", "gloo"))
        ]
        label = f"{op}, {ranks} rank{'s' if ranks > 1 else ''}"
        plots.append(f"<div><h3>{label}</h3>{chart(label, series, 'multiprocessors of a rank')}</div>")
    columns = ("ranks", "dtype", "sms", *_TABLE)
    return section(
        "Budget of multiprocessors",
        "In a graph, T=128, a join after each half, so that none waits inside. With more multiprocessors a rank than "
        "the device has over the ranks, the ranks' kernels take turns.",
        legend([("ours", "bf16"), ("gloo", "fp8_e4m3")]),
        f'<div class="plots">{"".join(plots)}</div>',
        _figures(rows, columns),
    )


def _prefill(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["section"] == "prefill" and row["op"] in _OPS]
    note = "token_major, eager behind a gate: the device's time, without the host's."
    return section("Prefill", note, _figures(rows, ("dtype", "schedule", *_TABLE))) if rows else ""


def _sweep(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["section"] == "sweep"]
    return section("Sweep", "", _figures(rows, ("ranks", "dtype", "sms", "schedule", *_TABLE))) if rows else ""


def _single(result: dict[str, Any]) -> str:
    entries = []
    for dtype, halves in result.get("host_us", {}).items():
        text = ", ".join(f"{name} {us(one['p50_us'])}" for name, one in halves.items())
        entries.append((f"Host time, {dtype}", escape(f"{text} (µs, median of {halves['round']['samples']} rounds)")))
    for ranks, frame in result.get("frame_us", {}).items():
        entries.append((f"Frame of {ranks}", "-" if frame is None else short_us(frame)))
    profile = result.get("profile")
    if profile:
        state = "no kernel of ours in any" if profile["clean"] else "KERNELS OF OURS IN SOME, or none was seen"
        entries.append(("Hook form", f"{len(profile['gaps'])} gaps with the caller's kernels in a profile: {state}"))
    note = (
        "One rank, eager: host time of the calls of a round while the device is busy. A frame is what a stamped figure "
        "holds besides ours: a fork, an empty kernel a rank, a join."
    )
    return section("Host and hooks", note, facts(entries)) if entries else ""


def _missing(result: dict[str, Any]) -> str:
    lists = [("Not measured", result["errors"]), ("Out of time", result["skipped"])]
    entries = [(name, "<br>".join(map(escape, found))) for name, found in lists if found]
    return section("Missing", "", facts(entries)) if entries else ""


def _provenance(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return section(
        "How this was measured",
        "",
        facts(
            [
                ("Method", escape(result["method"])),
                ("Device", escape(gpu_line(result))),
                ("Host", escape(f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}")),
                ("Versions", escape(f"moebius {machine['moebius']}, Python {machine['python']}")),
                ("Command", f"<code>{escape(result['command'])}</code>"),
            ]
        ),
    )
