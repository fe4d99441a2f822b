"""`python -m moebius plan`: the memory of a configuration and its traffic on a cluster, EP size by EP size."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from moebius import native
from moebius.config import SCALE_GROUP, Config
from moebius.plan import plan
from moebius.wire import Wire
from moebius.wire import shape_of as wire_shape_of

from . import published
from .console import out, size, table, us
from .topology import HalfLoad, Topology, half_load, traced_visits, uniform_visits

if TYPE_CHECKING:
    from .routing_trace import RoutingTrace

MAX_EP_SIZE = 2048


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


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is planned for, besides the shape.

    Attributes:
        per_node: ranks of a node.
        nic_gbps: Gbit/s of each rank's NIC.
        nvlink_gbps: GB/s of each rank's NVLink in one direction.
        trace: recorded routing; None is uniform routing.
    """

    per_node: int = 8
    nic_gbps: float = 400.0
    nvlink_gbps: float = 450.0
    trace: RoutingTrace | None = None


def plan_report(config: Config, only: list[int] | None = None, machine: Machine | None = None) -> dict[str, object]:
    """Memory and traffic for each EP size.

    Raises:
        ConfigError: an EP size fits neither the experts nor the nodes.
    """
    machine = machine or Machine()
    rows = []
    for ranks in ep_sizes(config, only):
        config.num_local_experts(ranks)
        topology = Topology.of(ranks, machine.per_node, machine.nic_gbps, machine.nvlink_gbps)
        one = plan(config, ranks, topology.per_node)
        rows.append(
            {
                "ranks": ranks,
                "regions": {name.replace(" ", "_"): num_bytes for name, num_bytes in one.regions},
                "heap_bytes": one.heap_bytes,
                "output_bytes": one.output_bytes,
                "deep_ep_v1_bytes": deep_ep_v1_bytes(config, ranks),
                "nodes": topology.num_nodes,
                **traffic_report(config, topology, machine.trace),
            }
        )
    return {
        "config": shape_of(config),
        "cluster": {
            "per_node": machine.per_node,
            "nic_gbit_per_s": machine.nic_gbps,
            "nvlink_gb_per_s": machine.nvlink_gbps,
            "routing": "recorded" if machine.trace else "uniform",
        },
        "estimate": {"nvlink": dataclasses.asdict(published.nvlink()), "nic": dataclasses.asdict(published.nic())},
        "plan": rows,
        "published": [dataclasses.asdict(one) for one in published.same_shape(config)],
        "published_read_in": published.READ_IN,
    }


def traffic_report(config: Config, topology: Topology, trace: RoutingTrace | None) -> dict[str, object]:
    """Ranks and nodes a token goes to, and by half: bytes by link, requests, lower bound and estimate."""
    if trace is None:
        visits = uniform_visits(config.num_experts, config.num_topk, topology)
    else:
        visits = traced_visits(trace.layers, config.num_experts, topology)
    has_weights = config.weights_at == "dispatch"
    layout = native.core().HeapLayout(wire_shape_of(config, topology.num_ranks))
    cell, reply = layout.cell_bytes, (Wire.of(config).reply_bytes, layout.reply_stride)
    tokens, replies = config.max_num_tokens, visits.ranks if has_weights else visits.choices
    loads = {
        "dispatch": half_load(visits.ranks, tokens, topology, (cell, cell), puts=False),
        "combine": half_load(replies, tokens, topology, reply, puts=not has_weights),
    }
    return {
        "ranks_a_token": visits.ranks_a_token,
        "nodes_a_token": visits.nodes_a_token,
        "halves": {half: _half_report(load, topology) for half, load in loads.items()},
    }


def _half_report(load: HalfLoad, topology: Topology) -> dict[str, object]:
    links = (
        (load.nvlink, topology.nvlink_gb_per_s, published.nvlink()),
        (load.nic, topology.nic_gb_per_s, published.nic()),
    )
    # The links work at the same time.
    return {
        "nvlink_bytes": load.nvlink.mean,
        "nvlink_bytes_busiest": load.nvlink.busiest,
        "nic_bytes": load.nic.mean,
        "nic_bytes_busiest": load.nic.busiest,
        "nic_requests": load.requests,
        "bound_us": max(link.busiest / (1e3 * speed) for link, speed, _ in links),
        "estimate_us": max(model.us(link.busiest, speed) for link, speed, model in links),
    }


def shape_of(config: Config) -> dict[str, object]:
    """The fields of a config that decide its memory."""
    names = ("num_experts", "num_topk", "hidden", "max_num_tokens", "payload", "layout", "weights_at", "depth")
    return {name: getattr(config, name) for name in names} | {"output": config.output_dtype}


def print_plan(report: dict[str, Any]) -> None:
    """The tables: memory and traffic, a row an EP size; what peers publish, a column an EP size."""
    config = report["config"]
    out(
        f"E={config['num_experts']} K={config['num_topk']} H={config['hidden']} M={config['max_num_tokens']} "
        f"payload {config['payload']}, output {config['output']}, depth {config['depth']}"
    )
    out()
    _print_memory(report["plan"])
    out()
    _print_traffic(report)
    out()
    _print_published(report)


def _print_memory(rows: list[dict[str, Any]]) -> None:
    regions = list(dict.fromkeys(name for row in rows for name in row["regions"]))
    header = ["ranks", *(name.replace("_", " ") for name in regions), "total", "DeepEP V1", "ratio", "private"]
    body = []
    for row in rows:
        total, theirs = row["heap_bytes"], row["deep_ep_v1_bytes"]
        sizes = [size(row["regions"][name]) if name in row["regions"] else "-" for name in regions]
        body.append(
            [str(row["ranks"]), *sizes, size(total), size(theirs), f"{theirs / total:.1f}x", size(row["output_bytes"])]
        )
    out("Symmetric heap of one rank")
    out(table(header, body, left=0))
    out("1 MB = 1 000 000 bytes. DeepEP V1: its low-latency buffer, which depends on E, M and H only. Private: what")
    out("expert_major packs its results into, reserved for itself and touched as far as tokens arrive; DeepEP V1")
    out("allocates its own at every call. The outbox is there with more than one node.")


def _print_traffic(report: dict[str, Any]) -> None:
    planned = report["cluster"]
    header = ["ranks", "nodes", "ranks a token", "nodes a token", "half", "NVLink", "NIC", "requests", "bound us"]
    body = []
    for row in report["plan"]:
        for half, load in row["halves"].items():
            at = [str(row["ranks"]), str(row["nodes"]), f"{row['ranks_a_token']:.2f}", f"{row['nodes_a_token']:.2f}"]
            body.append(
                [
                    *(at if half == "dispatch" else [""] * len(at)),
                    half,
                    size(load["nvlink_bytes"]),
                    size(load["nic_bytes"]),
                    f"{load['nic_requests']:.0f}",
                    us(load["bound_us"]),
                    us(load["estimate_us"]),
                ]
            )
    out(
        f"Traffic of one rank in one direction, {planned['routing']} routing, M tokens a rank, {planned['per_node']} "
        f"ranks a node: NVLink {planned['nvlink_gb_per_s']:g} GB/s, NIC {planned['nic_gbit_per_s']:g} Gbit/s each"
    )
    out(table([*header, "estimate us"], body, left=0))
    out("Bound: bytes of the busiest rank over the nominal bandwidth, the slower link. Requests: puts over the NIC.")
    out("Estimate: fixed time + bytes / reached bandwidth, with what OTHERS' kernels published, for lack of our own:")
    for link, origin in report["estimate"].items():
        out(
            f"  {link}: {origin['fixed_us']:.1f} us + bytes at {origin['efficiency']:.0%} of nominal; "
            f"{origin['origin']}; worst point {origin['worst']:.0%} off"
        )


def _print_published(report: dict[str, Any]) -> None:
    sizes = [row["ranks"] for row in report["plan"]]
    rows = [one for one in report["published"] if any(ranks in one["times_us"] for ranks in sizes)]
    if not rows:
        out(
            f"No figure of a peer for this shape and payload: peers publish {published.TOKENS} tokens x "
            f"{published.HIDDEN}, top-{published.TOPK}."
        )
        return
    sizes = [ranks for ranks in sizes if any(ranks in one["times_us"] for one in rows)]
    body = []
    for one in rows:
        times = [one["times_us"].get(ranks) for ranks in sizes]
        cells = ["-" if pair is None else " / ".join(us(time) for time in pair) for pair in times]
        body.append([one["source"], one["system"], *cells])
    out(
        f"Published by peers for this shape, dispatch / combine in us, as read in {report['published_read_in']}; "
        "not ours:"
    )
    out(table(["source", "system", *(f"EP{ranks}" for ranks in sizes)], body, left=2))
