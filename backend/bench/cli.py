"""The command line: flags, subcommands, exit codes."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Any, get_args

from moebius.config import Config, Layout
from moebius.errors import ConfigError, MoebiusError

from .console import out
from .cuda.suites import SUITES
from .load_arrivals import PROCESSES
from .load_rank import SIDES
from .ranks import num_cores
from .serve_bench import add_flags
from .workload import BENCH_PAYLOADS, ROUTINGS, Workload

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYOUTS: tuple[str, ...] = get_args(Layout)
ENGINES = ("auto", "cpu")
USAGE_ERROR = 2
CPU_EXPERTS = 64
CPU_SECONDS, GPU_SECONDS = 1.5, 0.2


def _numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def _rates(text: str) -> list[float] | str:
    if text in ("auto", "trace"):
        return text
    rates = [float(item) for item in text.split(",")]
    if not all(0.0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"rates must be above 0 (got {text})")
    return sorted(rates)


def _words(choices: Sequence[str]) -> Any:
    def parse(text: str) -> list[str]:
        for item in text.split(","):
            if item not in choices:
                raise argparse.ArgumentTypeError(f"choose from {', '.join(choices)} (got {item!r})")
        return text.split(",")

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moebius",
        description="One-sided expert-parallel all-to-all: see it run, measure it, plan its memory.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="decode steps of a MoE layer, checked and timed beside gloo, with an HTML report"
    )
    _shape_flags(demo, many=False)
    demo.add_argument(
        "--steps", type=int, default=1200, help="timed steps on each side (default 1200; p99.9 needs 1000)"
    )
    demo.add_argument("--seconds", type=float, default=35.0, help="begin no more steps after so long (default 35)")
    demo.add_argument("--intermediate", type=int, default=128, help="channels inside an expert (default 128)")
    demo.add_argument("--report", type=pathlib.Path, default=pathlib.Path("moebius-report/index.html"), metavar="PATH")
    demo.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="kill everything after so long (default 300)"
    )

    bench = commands.add_parser("bench", help="sweep shapes, moebius and gloo in turn; flags take comma lists")
    _shape_flags(bench, many=True)
    bench.add_argument(
        "--repeat", type=int, default=1, help="interleaved repetitions of the sweep, for the spread (default 1)"
    )
    bench.add_argument(
        "--seconds",
        type=float,
        help=f"of a configuration (default {CPU_SECONDS}); on a GPU of each schedule ({GPU_SECONDS})",
    )
    bench.add_argument("--tiny", action="store_true", help="one small configuration, a few rounds: only to see it work")
    bench.add_argument("--csv", type=pathlib.Path, default=pathlib.Path("moebius-report/bench.csv"), metavar="PATH")
    bench.add_argument(
        "--timeout", type=float, default=120.0, metavar="S", help="kill everything when one configuration takes longer"
    )

    bench.add_argument("--routing-trace", type=pathlib.Path, metavar="FILE", help="recorded routings to replay")
    _gpu_flags(bench)

    _load_flags(commands.add_parser("load", help="decode under open-loop arrivals, beside gloo: latency, SLO, knee"))
    add_flags(commands.add_parser("serve-bench", help="a model served by vLLM, over moebius and gloo in turn"))

    plan = commands.add_parser("plan", help="memory, traffic and its least time on a cluster, EP size by EP size")
    _shape_flags(plan, many=False, experts=256, hidden=7168, tokens=128, payload="fp8_e4m3", any_ranks=True)
    _cluster_flags(plan)

    doctor = commands.add_parser("doctor", help="what runs here, what does not, and why")
    doctor.add_argument("--json", type=pathlib.Path, metavar="PATH")
    return parser


def _gpu_flags(bench: argparse.ArgumentParser) -> None:
    gpu = bench.add_argument_group("on a GPU")
    gpu.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default cpu)")
    gpu.add_argument("--virtual-ranks", type=int, default=0, metavar="R", help="all on one GPU (default 8)")
    gpu.add_argument("--suite", choices=SUITES, help="decode: all that the engine is judged by, in under 8 minutes")
    gpu.add_argument("--sms", type=_numbers, help="multiprocessors of a rank; 0: all, shared out (default 0)")
    gpu.add_argument("--budget", type=float, default=440.0, metavar="S", help="begin no point after so long (440)")
    gpu.add_argument("--out", type=pathlib.Path, metavar="DIR", help="folder of results (default moebius-report/cuda)")


def _cluster_flags(plan: argparse.ArgumentParser) -> None:
    cluster = plan.add_argument_group("the cluster")
    cluster.add_argument("--per-node", type=int, default=8, help="ranks that share NVLink, and no NIC (default 8)")
    cluster.add_argument("--nic-gbps", type=float, default=400.0, help="Gbit/s of each rank's NIC (default 400)")
    cluster.add_argument(
        "--nvlink-gbps", type=float, default=450.0, help="GB/s of a rank's NVLink in one direction (default 450)"
    )
    cluster.add_argument(
        "--routing-trace", type=pathlib.Path, metavar="FILE", help="recorded routing; E and K are its own"
    )


def _load_flags(load: argparse.ArgumentParser) -> None:
    _shape_flags(load, many=False, experts=16, topk=4, hidden=1024, tokens=32)
    load.add_argument("--layers", type=int, default=2, help="N, MoE layers of a step (default 2)")
    load.add_argument("--intermediate", type=int, default=64, help="channels inside an expert (default 64)")
    load.add_argument("--sides", type=_words(SIDES), default=list(SIDES), help="comma list (default moebius,gloo)")
    load.add_argument("--arrivals", choices=PROCESSES, default="poisson", help="(default poisson)")
    load.add_argument("--burstiness", type=float, default=0.25, help="bursty: gamma shape, 1 is Poisson (default 0.25)")
    load.add_argument("--on-ms", type=float, default=50.0, help="on-off: mean length of an on period (default 50)")
    load.add_argument("--off-ms", type=float, default=50.0, help="on-off: mean silence after it (default 50)")
    load.add_argument("--arrival-trace", type=pathlib.Path, metavar="FILE", help="JSON lines: t, prompt, output")
    load.add_argument(
        "--routing-trace", type=pathlib.Path, metavar="FILE", help="recorded routings; E and K are theirs"
    )
    load.add_argument("--output", type=float, default=16.0, help="mean decode steps of a request (default 16)")
    load.add_argument("--rates", type=_rates, help="requests a second: auto, trace, or a comma list (default auto)")
    load.add_argument("--slo-ttft-ms", type=float, default=20.0, help="to the first token (default 20)")
    load.add_argument("--slo-tpot-ms", type=float, default=5.0, help="each further token (default 5)")
    load.add_argument("--seconds", type=float, default=1.5, help="of a rate and side; 4 times at the end (default 1.5)")
    load.add_argument("--tiny", action="store_true", help="one small layer, two rates, a moment: only to see it work")
    load.add_argument("--report", type=pathlib.Path, default=pathlib.Path("moebius-report/load.html"), metavar="PATH")
    load.add_argument("--timeout", type=float, default=120.0, metavar="S", help="kill all when a rate takes longer")


def _shape_flags(
    parser: argparse.ArgumentParser,
    *,
    many: bool,
    experts: int = CPU_EXPERTS,
    topk: int = 8,
    hidden: int = 2048,
    tokens: int = 64,
    payload: str = "bf16",
    any_ranks: bool = False,
) -> None:
    """The flags that all but `doctor` share; comma lists where `many`."""
    number = _numbers if many else int
    ranks = "all powers of two" if any_ranks else "one per core, at least 2"
    parser.add_argument("--ranks", type=_numbers if any_ranks or many else int, help=f"processes (default: {ranks})")
    parser.add_argument(
        "--experts",
        type=int,
        default=None if many else experts,
        help=f"E, over all ranks (default {experts}{'; 256 on a GPU' if many else ''})",
    )
    parser.add_argument(
        "--topk", type=number, default=[topk] if many else topk, help=f"K, experts a token (default {topk})"
    )
    parser.add_argument(
        "--hidden", type=number, default=None if many else hidden, help=f"H, channels (default {hidden})"
    )
    parser.add_argument(
        "--tokens", type=number, default=None if many else tokens, help=f"T, tokens a rank (default {tokens})"
    )
    parser.add_argument("--max-num-tokens", type=int, default=0, help="M, the most a rank may send (default: T)")
    for flag, choices, default in (
        ("--payload", BENCH_PAYLOADS, payload),
        ("--layout", LAYOUTS, "expert_major"),
        ("--routing", ROUTINGS, "uniform"),
    ):
        if many:
            parser.add_argument(flag, type=_words(choices), help=f"of {', '.join(choices)}")
        else:
            parser.add_argument(flag, choices=choices, default=default, help=f"(default {default})")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="(default auto: what runs here)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and routing (default 0)")
    parser.add_argument("--json", type=pathlib.Path, metavar="PATH", help="write everything the table shows, and more")


def _demo(flags: argparse.Namespace) -> int:
    from .demo import DemoOptions, print_result, run

    workload = _workload(flags)
    if flags.steps < 1 or flags.intermediate < 1:
        raise SystemExit("`--steps` and `--intermediate` must be at least 1")
    out(
        f"{workload.ranks} ranks on {num_cores()} cores, "
        f"{workload.tokens} tokens x {workload.hidden} {workload.payload} each, "
        f"top-{workload.topk} of {workload.experts} experts, {workload.layout}, {workload.routing} routing"
    )
    result = run(workload, DemoOptions(flags.steps, flags.seconds, flags.intermediate, flags.report, flags.timeout))
    print_result(result)
    _write_json(flags.json, result)
    return 0 if result["check"]["passed"] else 1


def _bench(flags: argparse.Namespace) -> int:
    if flags.device == "cuda":
        from .cuda.run import CudaOptions
        from .cuda.run import run as run_on_gpu

        flags.seconds = flags.seconds or GPU_SECONDS
        measured = run_on_gpu(CudaOptions.from_flags(vars(flags)))
        _write_json(flags.json, measured)
        return 0 if measured["rows"] and not measured["errors"] else 1
    from .sweep import SweepOptions, run

    if flags.suite or flags.virtual_ranks or flags.sms or flags.out:
        raise ConfigError("`--suite`, `--virtual-ranks`, `--sms` and `--out` belong to `--device cuda`")
    flags.experts, flags.seconds = flags.experts or CPU_EXPERTS, flags.seconds or CPU_SECONDS
    options = SweepOptions.from_flags(vars(flags))
    result = run(options)
    _write_json(flags.json, result)
    return 0


def _serve_bench(flags: argparse.Namespace) -> int:
    from .serve_bench import ServeOptions, print_result, run

    result = run(ServeOptions.from_flags(flags))
    print_result(result)
    _write_json(flags.json, result)
    return 0


def _load(flags: argparse.Namespace) -> int:
    from .load import LoadOptions, run

    result = run(LoadOptions.from_flags(vars(flags)))
    _write_json(flags.json, result)
    return 0


def _plan(flags: argparse.Namespace) -> int:
    from .machine import provenance
    from .plan import Machine, plan_report, print_plan
    from .routing_trace import read_routing_trace

    trace = None
    if flags.routing_trace is not None:
        trace = read_routing_trace(flags.routing_trace)
        flags.experts, flags.topk = trace.num_experts, trace.num_topk
    config: Config = _workload(flags, ranks=1).config()
    report = plan_report(config, flags.ranks, Machine(flags.per_node, flags.nic_gbps, flags.nvlink_gbps, trace))
    print_plan(report)
    _write_json(flags.json, {"kind": "plan", **provenance(), **report})
    return 0


def _doctor(flags: argparse.Namespace) -> int:
    from .doctor import examine, print_findings

    findings = examine()
    print_findings(findings)
    _write_json(flags.json, findings)
    return 0 if findings["works"] else 1


def _workload(flags: argparse.Namespace, ranks: int | None = None) -> Workload:
    return Workload(
        ranks=ranks or flags.ranks or max(num_cores(), 2),
        experts=flags.experts,
        topk=flags.topk,
        hidden=flags.hidden,
        tokens=flags.tokens,
        max_num_tokens=flags.max_num_tokens,
        payload=flags.payload,
        layout=flags.layout,
        routing=flags.routing,
        seed=flags.seed,
    )


def _write_json(path: pathlib.Path | None, content: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    flags = _parser().parse_args(arguments)
    commands = {
        "demo": _demo,
        "bench": _bench,
        "load": _load,
        "serve-bench": _serve_bench,
        "plan": _plan,
        "doctor": _doctor,
    }
    command = commands[flags.command]
    try:
        return command(flags)
    except MoebiusError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return USAGE_ERROR if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
