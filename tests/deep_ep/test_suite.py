"""That the surface suite fails where it should: on ours with one thing broken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from moebius import deep_ep
from tests.deep_ep.worlds import SKIPPED, run_threads

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("only_ours")


def _without(keyword: str) -> Callable[..., Any]:
    def change(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        options.pop(keyword, None)
        return call(*arguments, **options)

    return change


def _dense_scales(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    received, *rest = call(*arguments, **options)
    return (received[0], received[1].contiguous()) if isinstance(received, tuple) else received, *rest


def _wrong_begin(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    result = call(*arguments, **options)
    result[2][1].add_(1 << 32)
    return result


def _one_count_for_all() -> Callable[..., Any]:
    shared = torch.zeros(4, dtype=torch.int32)

    def change(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        received, count, *rest = call(*arguments, **options)
        return received, shared.copy_(count), *rest

    return change


def _even_weights(call: Callable[..., Any], x: Any, ids: Any, weights: Any, *rest: Any, **options: Any) -> Any:
    return call(x, ids, torch.ones_like(weights), *rest, **options)


@pytest.mark.parametrize(
    ("method", "change", "case"),
    [
        ("low_latency_dispatch", _dense_scales, "fp8"),
        ("low_latency_dispatch", _dense_scales, "fp8_ue8m0"),
        ("low_latency_dispatch", _without("use_fp8"), "bf16_shapes"),
        ("low_latency_dispatch", _without("cumulative_local_expert_recv_stats"), "stats_accumulate"),
        ("low_latency_dispatch", _wrong_begin, "routings"),
        ("low_latency_dispatch", _one_count_for_all(), "results_outlive_later_calls"),
        ("low_latency_dispatch", _without("round_scale"), "fp8_round_scale"),
        ("low_latency_dispatch", _without("return_recv_hook"), "hooks"),
        ("low_latency_combine", _even_weights, "round_trips"),
        ("low_latency_combine", _without("out"), "out"),
        ("low_latency_combine", _without("zero_copy"), "zero_copy"),
    ],
)
def test_finds(method: str, change: Callable[..., Any], case: str) -> None:
    original = getattr(deep_ep.Buffer, method)

    def changed(self: deep_ep.Buffer, *arguments: Any, **options: Any) -> Any:
        return change(lambda *args, **kwargs: original(self, *args, **kwargs), *arguments, **options)

    broken = type("Buffer", (deep_ep.Buffer,), {method: changed})
    subject = SimpleNamespace(Buffer=broken, EventOverlap=deep_ep.EventOverlap)
    found = run_threads(1, subject, [case])[case]
    assert found
    assert not found.startswith(SKIPPED)
