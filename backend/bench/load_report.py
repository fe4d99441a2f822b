"""The result of `load` as one HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .console import us
from .machine import is_busy
from .page import card, escape, facts, legend, page, section
from .svg import Curve, Series, Span, bars, chart, distribution, short_us

if TYPE_CHECKING:
    import pathlib

_PART_STYLES = {
    "queueing": "g3",
    "communication": "d1",
    "wait for ranks": "d2",
    "compute": "compute",
    "scheduling": "g4",
}
_SIDE_STYLES = {"moebius": "ours", "gloo": "gloo"}


def write_report(result: dict[str, Any], path: pathlib.Path) -> None:
    """Write the page to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(result), encoding="utf-8")


def render(result: dict[str, Any]) -> str:
    """The page as text."""
    knees = {name: side["knee_per_s"] for name, side in result["sides"].items()}
    held = [f"{name} {_rate(knee)}" if knee else f"{name} at no rate measured" for name, knee in knees.items()]
    title = "The SLO holds up to: " + ", ".join(held) if any(knees.values()) else "The SLO held at no rate measured"
    work = result["workload"]
    routing = "recorded" if work["routing_trace"] else work["routing"]
    lead = (
        f"Continuous-batching decode of {result['layers']} MoE layers over {work['ranks']} processes on "
        f"{result['machine']['cores']} cores: up to {work['tokens']} running requests a rank, "
        f"{work['hidden']} channels, top-{work['topk']} of {work['experts']}, {work['payload']}, {work['layout']}, "
        f"{routing} routing. "
        f"{result['arrivals']['process'].capitalize()} arrivals of {result['arrivals']['mean_output']:.1f} decode "
        "steps on average; latencies count from the scheduled arrival."
    )
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(lead)}</p>',
        _busy(result),
        _cards(result),
        _slo_curves(result),
        _rounds(result),
        _split(result),
        _table(result),
        _provenance(result),
    ]
    return page(f"moebius load: {title}", "\n".join(parts))


def _rate(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"


def _busy(result: dict[str, Any]) -> str:
    machine = result["machine"]
    if not is_busy(machine):
        return ""
    return (
        f'<p class="busy">The machine had other work before this run began (load {machine["load_1min"]} on '
        f"{machine['cores']} cores). It disturbs every figure here, the tails most: measure on an idle one.</p>"
    )


def _cards(result: dict[str, Any]) -> str:
    cards = []
    for name, side in result["sides"].items():
        knee, steady = side["knee_per_s"], side["steady"]
        cards.append(card(_rate(knee) if knee else "none", f"{name}: highest rate within the SLO"))
        ratio = steady["p999_over_p50"]
        label = f"{name}: p99.9 / p50 of a round at 70 % of {'its knee' if knee else 'the lowest rate'}"
        cards.append(card(f"{ratio:.1f}" if ratio else "-", label + ("" if ratio else " (needs 1000 rounds)")))
    return f'<div class="cards">{"".join(cards)}</div>'


def _slo_curves(result: dict[str, Any]) -> str:
    plots = []
    for name, title, limit in (
        ("ttft", "Time to first token", result["slo"]["ttft_ms"]),
        ("tpot", "Time per further token", result["slo"]["tpot_ms"]),
    ):
        series = [
            Series(
                side, _SIDE_STYLES[side], [(p["rate"], p[name]["p99_us"]) for p in of["points"] if p[name]["p99_us"]]
            )
            for side, of in result["sides"].items()
        ]
        svg = chart(
            f"p99 of {title} over the offered load", series, "offered requests/s", 1e3 * limit, f"SLO {limit:g} ms"
        )
        plots.append(f"<div><h3>{title}, p99</h3>{svg}</div>")
    return section(
        "Latency against the offered load",
        "Both axes are logarithmic. The knee is the highest rate whose p99 time to first token is below the dashed "
        "line and of whose tokens at least 95 % are served. Cut off, a request counts with the time it had waited.",
        legend([(_SIDE_STYLES[side], side) for side in result["sides"]]),
        f'<div class="plots">{"".join(plots)}</div>',
    )


def _rounds(result: dict[str, Any]) -> str:
    steady = {name: side["steady"] for name, side in result["sides"].items()}
    plots = []
    for op in ("round", "step"):
        taken = [(name, one[op]["curve_us"]) for name, one in steady.items() if one[op]["samples"]]
        curves = [Curve(name, _SIDE_STYLES[name], curve) for name, curve in taken]
        plot = distribution(f"Distribution of a {op}", curves, None) if curves else ""
        plots.append(f"<div><h3>Share of {op}s that took at most so long</h3>{plot}</div>")
    rows = []
    for name, one in steady.items():
        for op, title in (("round", "round"), ("step", "step"), ("skew", "rank skew"), ("queue", "queueing")):
            cells = "".join(f"<td>{us(one[op][key])}</td>" for key in _PERCENTILES)
            rows.append(f"<tr><td>{name}, {title}</td>{cells}<td>{one[op]['samples']}</td></tr>")
    head = "".join(f"<th>{name}</th>" for name in ("", "p50", "p90", "p99", "p99.9", "max", "samples"))
    rates = ", ".join(f"{name} {_rate(one['rate'])}" for name, one in steady.items())
    without = [name for name, side in result["sides"].items() if not side["knee_per_s"]]
    note = f" No rate held the SLO for {' and '.join(without)}: 70 % of the lowest rate instead." if without else ""
    return section(
        "At 70 % of each side's knee",
        f"In microseconds, at {rates}. A round is dispatch and combine of one layer, from the last rank's call to the "
        "last return; rank skew is from the first rank's call of dispatch to the last's; queueing is from the "
        "scheduled arrival to the request's first step. p99.9 needs 1000 samples." + note,
        legend([(_SIDE_STYLES[side], side) for side in steady]),
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>',
        f'<div class="plots">{"".join(plots)}</div>',
    )


_PERCENTILES = ("p50_us", "p90_us", "p99_us", "p999_us", "max_us")


def _split(result: dict[str, Any]) -> str:
    rows = []
    for name, side in result["sides"].items():
        spans, total = [], 0.0
        for part, length in side["steady"]["parts_us"].items():
            if length > 0.0:
                spans.append(Span(f"{part}: {short_us(length)}", _PART_STYLES[part], total, total + length))
                total += length
        rows.append((name, short_us(total), spans))
    return section(
        "Where the time of a request goes, at 70 % of each side's knee",
        "Mean over the requests, from scheduled arrival to last token. Waiting for ranks that call dispatch or combine "
        "later is told apart from communication; scheduling is what lies between the steps.",
        legend([(style, name) for name, style in _PART_STYLES.items()]),
        f'<div class="figure">{bars("Parts of a request", rows)}</div>',
    )


def _table(result: dict[str, Any]) -> str:
    rows = []
    for name, side in result["sides"].items():
        for point in side["points"]:
            share = point["good_share"]
            cells = [f"{point['rate']:g}", name, *(_ms(point[op][key]) for op, key in _COLUMNS)]
            cells += [us(point["round"][key]) for key in ("p50_us", "p99_us")]
            cells += [f"{point['mean_batch']:.1f}", f"{point['throughput_share']:.0%}", f"{point['goodput_per_s']:.0f}"]
            cells += ["-" if share is None else f"{share:.0%}", str(point["unfinished"])]
            rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return section(
        "Every rate",
        "Batch is the mean number of requests in a step, over all ranks; served is tokens made over tokens offered; "
        "goodput counts the requests that met both limits.",
        '<div class="scroll"><table><thead>' + _HEAD
        + f"</thead><tbody>{''.join(rows)}</tbody></table></div>",
    )  # fmt: skip


_HEAD = (
    '<tr><th></th><th></th><th colspan="2">TTFT, ms</th><th colspan="2">TPOT, ms</th><th colspan="2">queueing, ms</th>'
    '<th colspan="2">round, µs</th><th colspan="5"></th></tr><tr><th>offered/s</th><th></th>'
    + 4 * "<th>p50</th><th>p99</th>"
    + "<th>batch</th><th>served</th><th>goodput/s</th><th>in SLO</th><th>cut off</th></tr>"
)
_COLUMNS = (("ttft", "p50_us"), ("ttft", "p99_us"), ("tpot", "p50_us"), ("tpot", "p99_us"), ("queue", "p50_us"),
            ("queue", "p99_us"))  # fmt: skip


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e3:.3g}"


def _provenance(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return section(
        "How this was measured",
        "",
        facts(
            [
                ("Load", escape(result["method"])),
                ("Machine", escape(f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_1min']} before")),
                (
                    "Versions",
                    escape(
                        f"moebius {machine['moebius']}, torch {machine['torch']}, Python {machine['python']}, "
                        f"commit {result['commit'] or 'unknown'}, engine {result['engine']}"
                    ),
                ),
                ("Command", f"<code>{escape(result['command'])}</code>"),
            ]
        ),
    )
