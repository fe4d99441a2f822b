"""`python -m moebius plan`: the memory of a configuration, EP size by EP size."""

from __future__ import annotations

from moebius.config import SCALE_GROUP, Config
from moebius.plan import plan

from .console import out, size, table

MAX_EP_SIZE = 1024


def deep_ep_v1_bytes(config: Config, num_ranks: int) -> int:
    """What `deep_ep.Buffer.get_low_latency_rdma_size_hint` of DeepEP V1 answers for the shape.

    Args:
        config: only E, M and H count.
        num_ranks: does not count; there as every other size depends on it.

    Source: csrc/config.hpp of DeepEP 1.2.1, `LowLatencyLayout`: two send buffers, two receive buffers and two signal
        areas that dispatch and combine share, sized for every expert times every token.
    """
    del num_ranks
    experts, tokens, hidden = config.num_experts, config.max_num_tokens, config.hidden
    groups = hidden // SCALE_GROUP
    dispatch_message = 16 + max(2 * hidden, hidden + 4 * groups)
    combine_message = 4 * groups + 2 * hidden
    send = max(tokens * dispatch_message, experts * tokens * combine_message)
    receive = experts * tokens * max(dispatch_message, combine_message)
    signals = -(-4 * experts // 128) * 128
    return (2 * send + 2 * receive + 2 * signals + 128) // 128 * 128


def ep_sizes(config: Config, only: list[int] | None = None) -> list[int]:
    """Powers of two that divide E, or those asked for."""
    if only:
        return only
    sizes, size_now = [], 1
    while size_now <= min(config.num_experts, MAX_EP_SIZE):
        if config.num_experts % size_now == 0:
            sizes.append(size_now)
        size_now *= 2
    return sizes


def plan_report(config: Config, only: list[int] | None = None) -> dict[str, object]:
    """Bytes of every region for each EP size."""
    rows = []
    for ranks in ep_sizes(config, only):
        one = plan(config, ranks)
        rows.append(
            {
                "ranks": ranks,
                "regions": {name.replace(" ", "_"): num_bytes for name, num_bytes in one.regions},
                "heap_bytes": one.heap_bytes,
                "output_bytes": one.output_bytes,
                "deep_ep_v1_bytes": deep_ep_v1_bytes(config, ranks),
            }
        )
    return {"config": shape_of(config), "plan": rows}


def shape_of(config: Config) -> dict[str, object]:
    """The fields of a config that decide its memory."""
    names = ("num_experts", "num_topk", "hidden", "max_num_tokens", "payload", "layout", "weights_at", "depth")
    return {name: getattr(config, name) for name in names} | {"output": config.output_dtype}


def print_plan(report: dict[str, object]) -> None:
    """The table: a row an EP size, a column a region."""
    config, rows = report["config"], report["plan"]
    assert isinstance(config, dict)  # as plan_report made them
    assert isinstance(rows, list)
    out(
        f"Symmetric heap of one rank: E={config['num_experts']} K={config['num_topk']} H={config['hidden']} "
        f"M={config['max_num_tokens']} payload {config['payload']}, output {config['output']}, depth {config['depth']}"
    )
    out()
    regions = list(rows[0]["regions"])
    header = ["ranks", *(name.replace("_", " ") for name in regions), "total", "DeepEP V1", "ratio", "private"]
    body = []
    for row in rows:
        total, theirs = row["heap_bytes"], row["deep_ep_v1_bytes"]
        sizes = [size(row["regions"][name]) for name in regions]
        body.append(
            [str(row["ranks"]), *sizes, size(total), size(theirs), f"{theirs / total:.1f}x", size(row["output_bytes"])]
        )
    out(table(header, body, left=0))
    out()
    out("1 MB = 1 000 000 bytes. DeepEP V1: its low-latency buffer, which depends on E, M and H only. Private: what")
    out(
        "expert_major packs its results into, reserved for itself and touched as far as tokens arrive; DeepEP V1\n"
        "allocates its own at every call."
    )
