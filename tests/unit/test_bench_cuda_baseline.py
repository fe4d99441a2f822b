"""The exchange in torch that the CUDA engine is measured beside, on the processor."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from moebius.bench.baseline import quantise_fp8
from moebius.bench.cuda.devices import HostDevice
from moebius.bench.cuda.schedules import HALVES
from moebius.bench.cuda.torch_exchange import TorchExchange
from moebius.bench.workload import Workload, route


@pytest.mark.parametrize("layout", ["expert_major", "token_major"])
@pytest.mark.parametrize("payload", ["bf16", "fp32", "fp8_e4m3"])
def test_the_baseline_brings_every_token_home(layout: str, payload: str) -> None:
    work = Workload(ranks=2, experts=8, topk=3, hidden=128, tokens=6, max_num_tokens=6, payload=payload, layout=layout)
    dtype = torch.float32 if payload == "fp32" else torch.bfloat16
    inputs = [[torch.randn(6, 128).to(dtype)] for _ in range(2)]
    routes = [[route(work, rank, 0)] for rank in range(2)]
    routes[0][0][0][2] = -1  # a token that goes nowhere
    shape = (4, 12, 128) if layout == "expert_major" else (12, 128)
    rows = [torch.zeros(shape, dtype=dtype) for _ in range(2)]
    plain = TorchExchange(HostDevice(2), work.config(), inputs, routes, rows)
    for half, lane in itertools.product(HALVES[:2], range(2)):
        plain.step(lane, half, 0)
    for lane in range(2):
        if layout == "token_major":
            _weighted_rows(rows[lane], lane, inputs, routes)
            continue
        tokens = _by_expert(lane, inputs, routes)
        sent = quantise_fp8(tokens)[0] if payload == "fp8_e4m3" else tokens
        assert torch.equal(plain.received(lane, 0).view(torch.uint8), sent.view(torch.uint8))
        rows[lane].view(-1, 128)[: len(tokens)] = tokens  # experts that return their tokens
    for half, lane in itertools.product(HALVES[2:], range(2)):
        plain.step(lane, half, 0)
    for lane in range(2):
        weights = torch.where(routes[lane][0][0] >= 0, routes[lane][0][1], 0.0).sum(1, keepdim=True)
        expected = inputs[lane][0].float() * weights
        # Rounded three times to bf16, weights too: half a unit each of values up to 4.
        torch.testing.assert_close(plain.combined[lane].float(), expected, rtol=0.02, atol=0.02)


def _by_expert(rank: int, inputs: Any, routes: Any) -> torch.Tensor:
    """The tokens of a rank's experts: by expert, then source rank, then token."""
    found = []
    for expert, source in itertools.product(range(4 * rank, 4 * rank + 4), range(2)):
        found.append(inputs[source][0][(routes[source][0][0] == expert).any(1)])
    return torch.cat(found)


def _weighted_rows(target: torch.Tensor, rank: int, inputs: Any, routes: Any) -> None:
    """What rank's experts would return, weighted, in the rows that token_major has them in."""
    for source in range(2):
        ids, weights = routes[source][0]
        here = (ids // 4 == rank) & (ids >= 0)
        weight = torch.where(here, weights, 0.0).sum(1, keepdim=True)
        rows = (inputs[source][0].float() * weight)[here.any(1)]
        target[source * 6 : source * 6 + len(rows)] = rows.to(target.dtype)
