"""The demo's result as one HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .console import size, us
from .machine import is_busy
from .page import card, escape, facts, legend, page, section
from .svg import Curve, Span, bars, distribution, lanes, short_us

if TYPE_CHECKING:
    import pathlib

_ROWS = ("dispatch", "combine", "round", "step")
_NAMES = {"moebius": "moebius", "gloo": "gloo layer", "per_expert": "per (token, expert)"}
# Parts of a round in the order they happen; a part's name may occur in both operations.
_HALF_STYLES = {"dispatch send": "d1", "dispatch receive": "d2", "combine send": "c1", "combine receive": "c2"}
_PART_STYLES = {"pack": "g1", "counts": "g4", "all_to_all": "g2", "unpack": "g3", "reduce": "g1", "sum": "g3"}
_STEP_STYLES = {"router": "compute", "dispatch": "d1", "experts": "compute", "combine": "c1", "sum": "compute"}
_GLOO_STEP_STYLES = {**_STEP_STYLES, "dispatch": "g2", "combine": "g1"}


def write_report(result: dict[str, Any], path: pathlib.Path) -> None:
    """Write the page of a demo's result to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(result), encoding="utf-8")


def render(result: dict[str, Any]) -> str:
    """The page as text."""
    one = result["ops"]["round"]
    ratio = one["speedup_p50"]
    title = (
        f"A round in {short_us(one['moebius']['p50_us'])}, {ratio:.1f} times faster than over gloo"
        if ratio >= 1.05
        else f"A round in {short_us(one['moebius']['p50_us'])}; over gloo {short_us(one['gloo']['p50_us'])}"
    )
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(result))}</p>',
        _busy(result),
        _cards(result),
        _latency(result),
        _distributions(result),
        _timeline(result),
        _step(result),
        _wire(result),
        _provenance(result),
    ]
    return page(f"moebius demo: {title}", "\n".join(parts))


def _lead(result: dict[str, Any]) -> str:
    work = result["workload"]
    return (
        f"A mixture-of-experts layer spread over {work['ranks']} processes on {result['machine']['cores']} cores: "
        f"{work['tokens']} tokens a rank of {work['hidden']} channels, top-{work['topk']} of {work['experts']}, "
        f"{work['payload']} payload, {work['layout']} layout, {work['routing']} routing. A round is dispatch and "
        "combine, at the median, called from Python, the scan of the routing included."
    )


def _busy(result: dict[str, Any]) -> str:
    machine = result["machine"]
    if not is_busy(machine):
        return ""
    return (
        f'<p class="busy">The machine had other work before this run began (load {machine["load_1min"]} on '
        f"{machine['cores']} cores). It disturbs every figure here, those of a step most: measure on an idle one.</p>"
    )


def _cards(result: dict[str, Any]) -> str:
    one, check = result["ops"]["round"], result["check"]
    steps = sum(check[side]["steps"] for side in ("moebius", "gloo"))
    verdict = f"{steps} of {steps}" if check["passed"] else "WRONG"
    return (
        '<div class="cards">'
        + card(
            f"{one['speedup_p50']:.1f}x",
            "the speed of the gloo layer, a round at p50",
            "good" if one["speedup_p50"] > 1 else "bad",
        )
        + card(f"{one['times_bound_p50']:.2f}x", "the memcpy bound of the same bytes")
        + card(f"{result['ops']['step']['speedup_p50']:.2f}x", "the speed of the gloo layer, a step with its experts")
        + card(verdict, "steps equal the layer in one process", "good" if check["passed"] else "bad")
        + "</div>"
    )


def _latency(result: dict[str, Any]) -> str:
    rows = []
    for op in _ROWS:
        entry = result["ops"][op]
        ours, gloo, bound = entry["moebius"], entry["gloo"], entry["bound"]
        cells = [f"<td>{op}</td>"]
        cells += [
            f'<td class="main">{us(ours["p50_us"])}</td>',
            f"<td>{us(ours['p99_us'])}</td>",
            f"<td>{us(ours['p999_us'])}</td>",
        ]
        cells += [f"<td>{us(gloo[name])}</td>" for name in ("p50_us", "p99_us", "p999_us")]
        cells += [f'<td class="main">{entry["speedup_p50"]:.2f}x</td>']
        cells += [
            f"<td>{us(bound['p50_us'])}</td><td>{entry['times_bound_p50']:.2f}x</td>" if bound else "<td></td><td></td>"
        ]
        rows.append("<tr>" + "".join(cells) + "</tr>")
    samples = result["ops"]["round"]["moebius"]["samples"]
    rare = " p99.9 needs 1000 samples." if samples < 1000 else ""
    return section(
        "Latency, in microseconds",
        f"{samples} steps a side, alternating in one run; a sample is the slowest rank of a step.{rare}",
        '<div class="scroll"><table><thead><tr><th></th><th colspan="3" class="ours">moebius</th>'
        '<th colspan="3" class="gloo">gloo</th><th></th><th colspan="2">memcpy bound</th></tr>'
        "<tr><th></th><th>p50</th><th>p99</th><th>p99.9</th><th>p50</th><th>p99</th><th>p99.9</th><th>speed-up</th>"
        "<th>p50</th><th>times</th></tr></thead><tbody>" + "".join(rows) + "</tbody></table></div>",
    )


def _distributions(result: dict[str, Any]) -> str:
    plots = []
    for op in _ROWS:
        entry = result["ops"][op]
        curves = [
            Curve("moebius", "ours", entry["moebius"]["curve_us"]),
            Curve("gloo", "gloo", entry["gloo"]["curve_us"]),
        ]
        bound = entry["bound"]["p50_us"] if entry["bound"] else None
        plots.append(
            f"<div><h3>{op.capitalize()}</h3>{distribution(f'Distribution of {op} latency', curves, bound)}</div>"
        )
    return section(
        "Distribution of the latency",
        "The share of samples (up) that took at most as long (to the right, logarithmic). Steep is steady, left "
        "is fast. The slowest 0.1 % are cut off here.",
        legend([("ours", "moebius"), ("gloo", "gloo"), ("bound", "memcpy bound, median")]),
        f'<div class="plots">{"".join(plots)}</div>',
    )


def _timeline(result: dict[str, Any]) -> str:
    rows = []
    for side, styles in (("moebius", _HALF_STYLES), ("gloo", _PART_STYLES)):
        for rank, spans in enumerate(result["timeline"][side]):
            bars_of_rank = [Span(name, styles[name], begin, end) for name, begin, end in spans]
            rows.append((f"{side}, rank {rank}", bars_of_rank))
    num_ranks = len(result["timeline"]["moebius"])
    halves = [(style, name) for name, style in _HALF_STYLES.items()]
    parts = [("g1", "gloo: pack, reduce"), ("g4", "counts"), ("g2", "all_to_all"), ("g3", "unpack, sum")]
    return section(
        "One round, rank by rank",
        "The round of median length on each side, without the experts between its halves, on one time axis. "
        "In moebius, nothing runs between a send half and its receive half: a decode step computes there.",
        legend(halves + parts),
        f'<div class="figure">{lanes("Time line of a round", rows, num_ranks)}</div>',
        "<h3>moebius alone, enlarged</h3>",
        f'<div class="figure">{lanes("Time line of a round of moebius", rows[:num_ranks], num_ranks)}</div>',
    )


def _step(result: dict[str, Any]) -> str:
    rows = []
    for side, styles in (("moebius", _STEP_STYLES), ("gloo", _GLOO_STEP_STYLES)):
        spans, total = [], 0.0
        for name, length in result["parts_us"][side].items():
            spans.append(Span(f"{name}: {short_us(length)}", styles[name], total, total + length))
            total += length
        rows.append((_NAMES[side], short_us(total), spans))
    return section(
        "Where a step goes",
        "Median of each part, averaged over the ranks; 'experts' holds the shared expert and the wait for the slowest "
        "rank.",
        f'<div class="figure">{bars("Parts of a step", rows)}</div>',
    )


def _wire(result: dict[str, Any]) -> str:
    rows = []
    for name, (first, second) in (
        ("moebius", ("d1", "c1")),
        ("gloo", ("g2", "g1")),
        ("per_expert", ("compute", "compute")),
    ):
        wire = result["wire_bytes"][name]
        spans = [
            Span(f"dispatch: {size(wire['dispatch'])}", first, 0.0, wire["dispatch"]),
            Span(f"combine: {size(wire['combine'])}", second, wire["dispatch"], wire["round"]),
        ]
        rows.append((_NAMES[name], size(wire["round"]), spans))
    return section(
        "Bytes on the wire",
        "What a rank sends to the other ranks in a round, on average. moebius and the gloo layer here send one row per "
        "(token, rank) and sum on the expert's rank; one row per (token, expert) is what DeepEP V1 sends.",
        f'<div class="figure">{bars("Bytes on the wire", rows)}</div>',
    )


def _provenance(result: dict[str, Any]) -> str:
    machine, check = result["machine"], result["check"]
    worst = max(check[side]["worst_error"] for side in ("moebius", "gloo"))
    memory = f", {size(machine['memory_bytes'])} memory" if machine["memory_bytes"] else ""
    return section(
        "How this was measured",
        "",
        facts(
            [
                ("Samples", escape(result["method"])),
                ("Bound", escape(result["bound_method"])),
                (
                    "Baseline",
                    "torch.distributed gloo, written well: one row per (token, rank) with its ids and weights, counts "
                    "first, one all_to_all_single each way, rows summed on the expert's rank, buffers kept.",
                ),
                (
                    "Check",
                    f"Every step against the layer in one process: the same experts exactly, outputs within "
                    f"{check['tolerance']:.4f} of the token's largest term (worst {worst:.5f}). The tolerance "
                    "is three units in the last place: GEMMs of other batch sizes round "
                    "differently, and the sum of each rank is rounded once.",
                ),
                (
                    "Machine",
                    escape(
                        f"{machine['cpu']}, {machine['cores']} cores{memory}, {machine['system']}, "
                        f"load {machine['load_1min']} before"
                    ),
                ),
                (
                    "Versions",
                    escape(
                        f"moebius {machine['moebius']}, torch {machine['torch']}, Python {machine['python']}, "
                        f"commit {result['commit'] or 'unknown'}"
                    ),
                ),
                ("Engine", escape(f"{result['engine']}; symmetric heap of a rank {size(result['heap_bytes'])}")),
                ("Command", f"<code>{escape(result['command'])}</code>"),
            ]
        ),
    )
