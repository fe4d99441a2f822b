"""The report of `serve-bench`: one HTML file that loads nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .machine import is_busy
from .page import card, escape, facts, legend, page, section
from .serve_bench import METRICS, PERCENTILES, times
from .svg import Curve, distribution

if TYPE_CHECKING:
    import pathlib


def write_report(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Write it, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(build(result), encoding="utf-8")


def build(result: dict[str, Any]) -> str:
    """The document."""
    asked, tpot = result["settings"], result["comparison"]["tpot"]
    ratio = tpot["median_ratio"]
    if ratio is None:
        verdict = "The client did not keep up: no time per token was measured"
    elif ratio >= 1:
        verdict = f"A token of a served model comes {ratio:.2f} times faster than over gloo"
    else:
        verdict = f"A token of a served model comes {1 / ratio:.2f} times slower than over gloo"
    body = (
        f"<h1>{verdict}</h1>"
        f'<p class="lead">vLLM with {asked["ranks"]} data-parallel ranks and expert parallelism on '
        f"{result['machine']['cores']} cores, over moebius and over an all-gather and reduce-scatter of gloo: "
        f"{asked['requests']} requests a run at {asked['rate']:g} a second, {asked['input_len']} tokens in, "
        f"{asked['output_len']} out. The figure is the median time per output token in the median of "
        f"{len(tpot['pairs'])} pairs of runs.</p>"
    )
    return page("moebius: a served model", body + _busy(result) + _cards(result) + "".join(_sections(result)))


def _busy(result: dict[str, Any]) -> str:
    machine = result["machine"]
    late = max(run["bunched"] for run in result["runs"])
    told = ""
    if late > 0.1:
        told = (
            f'<p class="busy">The client read up to {late:.0%} of the tokens of a run together with the ones before: '
            "it did not get the time to read them as they came. Times between tokens (ITL) are not the server's then; "
            "an answer that was read all at once has a TPOT of about 0 and all its time in its TTFT. The time of a "
            "request (E2EL) is not concerned.</p>"
        )
    if not is_busy(machine):
        return told
    return told + (
        f'<p class="busy">The machine had other work before this run began (load {machine["load_1min"]} on '
        f"{machine['cores']} cores). It disturbs every figure here: measure on an idle one.</p>"
    )


def _cards(result: dict[str, Any]) -> str:
    tpot, runs = result["comparison"]["tpot"], result["runs"]
    failed = sum(run["failed"] for run in runs)
    lowest = min((pair["ratio"] for pair in tpot["pairs"] if pair["ratio"] is not None), default=None)
    return (
        '<div class="cards">'
        + card(f"{times(tpot['median_ratio'])}x", "gloo's time per output token over ours, median pair", _good(tpot))
        + card(f"{times(lowest)}x", "likewise, in the worst pair for us")
        + card(f"{tpot['pairs_not_worse']} of {tpot['pairs_compared']}", "pairs in which ours is not worse")
        + card(
            f"{sum(run['completed'] for run in runs)}",
            f"requests answered, {failed} failed",
            "bad" if failed else "good",
        )
        + "</div>"
    )


def _good(found: dict[str, Any]) -> str:
    return "good" if (found["median_ratio"] or 0.0) >= 1 else "bad"


def _sections(result: dict[str, Any]) -> list[str]:
    rows = []
    for run in result["runs"]:
        cells = [
            f"<td>{_ms(run['percentiles_ms'][metric][f'p{percent:g}'])}</td>"
            for metric in METRICS
            for percent in PERCENTILES
        ]
        name = f"{run['pair'] + 1}, {run['side']}"
        state = f"<td>{run['bunched']:.0%}</td><td>{run['load_1min']:.1f}</td>"
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}{state}</tr>")
    ratios = []
    for metric, meaning in METRICS.items():
        found = result["comparison"][metric]
        cells = [f"<td>{times(pair['ratio'])}</td>" for pair in found["pairs"]]
        ratios.append(
            f"<tr><td>{metric.upper()}, {escape(meaning)}</td>{''.join(cells)}"
            f'<td class="main">{times(found["median_ratio"])}</td></tr>'
        )
    pairs = "".join(f"<th>pair {pair + 1}</th>" for pair in range(len(result["comparison"]["tpot"]["pairs"])))
    plots = []
    for metric in METRICS:
        curves = [
            Curve(side, style, result["all_runs"][side][metric]["curve_us"])
            for side, style in (("moebius", "ours"), ("gloo", "gloo"))
        ]
        plots.append(f"<div><h3>{metric.upper()}</h3>{distribution(f'Distribution of {metric}', curves, None)}</div>")
    return [
        section(
            "Pair by pair",
            "The median of each run, gloo's as a multiple of ours: above 1, ours is faster. A dash: half of a run's "
            "tokens were read together.",
            f'<div class="scroll"><table><thead><tr><th></th>{pairs}<th>median pair</th></tr></thead>'
            f"<tbody>{''.join(ratios)}</tbody></table></div>",
        ),
        section(
            "Distributions",
            "The share of samples of all runs (up) that took at most as long (to the right, logarithmic).",
            legend([("ours", "moebius"), ("gloo", "gloo")]),
            f'<div class="plots">{"".join(plots)}</div>',
        ),
        section(
            "Every run, in milliseconds",
            "In the order in which they ran. Bunched is the share of tokens that the client read together with the one "
            "before; load is the machine's load average before the run, the previous runs in it.",
            f'<div class="scroll"><table class="tight"><thead>{_HEAD}</thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>",
        ),
        _provenance(result),
    ]


_HEAD = (
    "<tr><th></th>"
    + "".join(f'<th colspan="{len(PERCENTILES)}">{metric.upper()}</th>' for metric in METRICS)
    + "<th></th><th></th></tr><tr><th>pair, side</th>"
    + "".join(f"<th>p{percent:g}</th>" for percent in PERCENTILES) * len(METRICS)
    + "<th>bunched</th><th>load</th></tr>"
)


def _ms(value: float) -> str:
    """Milliseconds, three digits that matter."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _provenance(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return section(
        "How this was measured",
        "",
        facts(
            [
                ("Runs", escape(result["method"])),
                (
                    "Baseline",
                    "vLLM's allgather_reducescatter with the two collectives that it lacks on the CPU, over gloo: one "
                    "all-gather of padded rows, ids and weights in them, and one all-to-all of results that are added "
                    "on arrival. The same C++ experts on the same rows as ours.",
                ),
                (
                    "Machine",
                    escape(
                        f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}, "
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
                ("Command", f"<code>{escape(result['command'])}</code>"),
            ]
        ),
    )
