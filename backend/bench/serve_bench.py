"""`python -m moebius serve-bench`: a served model over us and over gloo, measured by `vllm bench serve` in turn.

Two servers run from the beginning; the one that is not being measured is halted, so that both have the machine to
themselves and no minutes pass between the runs of a pair. Each pair sends the same requests at the same times to both,
and pairs alternate in who goes first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import statistics
import tempfile
from typing import TYPE_CHECKING, Any

from .console import out
from .machine import provenance
from .serve_server import SIDES, Server, measure
from .timing import percentile, summarise

if TYPE_CHECKING:
    import argparse

METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first, of a request",
    "itl": "time between tokens",
    "e2el": "time of a request",
}
BUNCHED_MS = 0.1
PERCENTILES = (50.0, 90.0, 99.0)
METHOD = (
    "vllm bench serve, random prompts, Poisson arrivals that wait for nobody; both servers run throughout, the one "
    "that is not measured is halted; pairs alternate in who goes first and share the requests and their times"
)


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """What is served, asked and repeated; see `add_flags`."""

    model: str
    ranks: int
    pairs: int
    requests: int
    rate: float
    concurrency: int
    input_len: int
    output_len: int
    dtype: str
    serve: tuple[str, ...]
    report: pathlib.Path
    timeout_s: float

    @classmethod
    def from_flags(cls, flags: argparse.Namespace) -> ServeOptions:
        """Of parsed flags."""
        given = {field.name: getattr(flags, field.name) for field in dataclasses.fields(cls) if field.name != "serve"}
        return cls(**given, serve=tuple(flags.serve.split()))

    def server_options(self) -> list[str]:
        """Of `vllm serve`, the same on both sides."""
        length = self.input_len + self.output_len + 8
        return [
            *("--dtype", self.dtype, "--max-model-len", str(length), "--max-num-seqs", str(self.concurrency)),
            *("--enforce-eager", "--no-enable-prefix-caching", "--api-server-count", "1", *self.serve),
        ]

    def client_options(self, seed: int) -> list[str]:
        """Of `vllm bench serve`."""
        flags = {
            "--dataset-name": "random",
            "--random-input-len": self.input_len,
            "--random-output-len": self.output_len,
            "--num-prompts": self.requests,
            "--request-rate": self.rate,
            "--seed": seed,
            "--num-warmups": 4,
            "--temperature": 0,
        }
        return ["--ignore-eos", *(str(word) for flag in flags.items() for word in flag)]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command's own."""
    parser.add_argument("model", metavar="MODEL", help="a mixture of experts: folder, or name")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks, one a core (default 2)")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each side, in turn (default 5)")
    parser.add_argument("--requests", type=int, default=40, help="of a run (default 40)")
    parser.add_argument("--rate", type=float, default=4.0, help="arrivals a second (default 4)")
    parser.add_argument(
        "--concurrency", type=int, default=8, help="most requests that a rank runs at a time (default 8)"
    )
    parser.add_argument("--input-len", type=int, default=32, help="tokens of a prompt (default 32)")
    parser.add_argument("--output-len", type=int, default=32, help="tokens of an answer (default 32)")
    parser.add_argument("--dtype", default="bfloat16", help="(default bfloat16)")
    parser.add_argument("--serve", default="", metavar='"..."', help="more options of `vllm serve`, for both")
    parser.add_argument(
        "--report", type=pathlib.Path, default=pathlib.Path("moebius-report/serve.html"), metavar="PATH"
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write everything the report shows")
    parser.add_argument(
        "--timeout", dest="timeout_s", type=float, default=300.0, metavar="S", help="of a start or a run (default 300)"
    )


def samples_ms(run: dict[str, Any]) -> dict[str, list[float]]:
    """Milliseconds of each metric, of the requests of one run of `vllm bench serve` that succeeded."""
    found: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for first, between, error in zip(run["ttfts"], run["itls"], run["errors"], strict=True):
        if error:
            continue
        found["ttft"].append(first * 1e3)
        found["e2el"].append((first + sum(between)) * 1e3)
        found["itl"] += [gap * 1e3 for gap in between]
        if between:
            found["tpot"].append(statistics.fmean(between) * 1e3)
    return found


def bunched(samples: dict[str, list[float]]) -> float:
    """Share of tokens that the client read together with the one before: then it is the client that is measured."""
    gaps = samples["itl"]
    return round(sum(gap < BUNCHED_MS for gap in gaps) / max(len(gaps), 1), 3)


def percentiles_ms(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """By metric and percentile."""
    return {
        metric: {f"p{percent:g}": round(percentile(sorted(values), percent), 3) for percent in PERCENTILES}
        for metric, values in samples.items()
    }


def compare(runs: list[dict[str, Any]], metric: str = "tpot") -> dict[str, Any]:
    """The medians of each pair, and gloo's as a multiple of ours.

    A median below `BUNCHED_MS` is of tokens that the client read together: its pair has no ratio (None) and does not
    count, nor is there a `median_ratio` where no pair has one.
    """
    pairs: dict[int, dict[str, float]] = {}
    for run in runs:
        pairs.setdefault(run["pair"], {})[run["side"]] = run["percentiles_ms"][metric]["p50"]
    ratios = [
        None if min(pair.values()) < BUNCHED_MS else round(pair["gloo"] / pair["moebius"], 4) for pair in pairs.values()
    ]
    known = [ratio for ratio in ratios if ratio is not None]
    return {
        "metric": metric,
        "pairs": [{**pair, "ratio": ratio} for pair, ratio in zip(pairs.values(), ratios, strict=True)],
        "median_ratio": round(statistics.median(known), 4) if known else None,
        "pairs_not_worse": sum(ratio >= 1.0 for ratio in known),
        "pairs_compared": len(known),
    }


def times(ratio: float | None) -> str:
    """A ratio, or a dash where there is none."""
    return "-" if ratio is None else f"{ratio:.2f}"


def run(options: ServeOptions) -> dict[str, Any]:
    """Start both servers, measure them in turn, write the report.

    Returns:
        everything the report shows.

    Raises:
        ServeError: a server or a run failed.
    """
    from .serve_report import write_report

    about = provenance()
    runs: list[dict[str, Any]] = []
    pooled = {side: {metric: list[float]() for metric in METRICS} for side in SIDES}
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {}
        for side in SIDES:
            out(f"starting vllm serve over {side}")
            server = Server(side, options.model, options.ranks, options.server_options(), folder)
            servers[side] = stack.enter_context(server)
            server.wait_until_ready(options.timeout_s)
            measure(server, options.model, options.client_options(0), folder, options.timeout_s)  # warms it up
            server.halt()
        for pair in range(options.pairs):
            for side in sorted(SIDES, reverse=pair % 2 == 0):
                load = os.getloadavg()[0]
                servers[side].resume()
                found = measure(
                    servers[side], options.model, options.client_options(pair + 1), folder, options.timeout_s
                )
                servers[side].halt()
                samples = samples_ms(found)
                for metric, values in samples.items():
                    pooled[side][metric] += values
                numbers = percentiles_ms(samples)
                runs.append(
                    {
                        "pair": pair,
                        "side": side,
                        "load_1min": round(load, 2),
                        "bunched": bunched(samples),
                        "completed": found["completed"],
                        "failed": sum(map(bool, found["errors"])),
                        "output_tokens_s": round(found["output_throughput"], 1),
                        "percentiles_ms": numbers,
                    }
                )
                line = "  ".join(f"{metric} {numbers[metric]['p50']:8.2f}" for metric in METRICS)
                out(f"pair {pair + 1} {side:8} median ms: {line}   load {load:.2f}, {bunched(samples):.0%} bunched")
    settings = {**dataclasses.asdict(options), "report": str(options.report)}
    result = {
        "kind": "serve-bench",
        **about,
        "method": METHOD,
        "settings": settings,
        "runs": runs,
        "comparison": {metric: compare(runs, metric) for metric in METRICS},
        "all_runs": {
            side: {metric: summarise([value * 1e3 for value in values]).to_json() for metric, values in metrics.items()}
            for side, metrics in pooled.items()
        },
    }
    write_report(options.report, result)
    return result


def print_result(result: dict[str, Any]) -> None:
    """The figures that matter."""
    for metric, found in result["comparison"].items():
        ratios = ", ".join(times(pair["ratio"]) for pair in found["pairs"])
        out(
            f"median {metric}, gloo's over ours, by pair: {ratios}; in the median pair {times(found['median_ratio'])}; "
            f"ours not worse in {found['pairs_not_worse']} of {found['pairs_compared']}"
        )
    late = max(run["bunched"] for run in result["runs"])
    if late > 0.1:
        out(
            f"the client read up to {late:.0%} of a run's tokens late: measure on an idle machine, or at a lower --rate"
        )
    out(f"report: {result['settings']['report']}")
