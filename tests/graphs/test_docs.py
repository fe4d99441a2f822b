"""The code in docs/graphs.md runs as it stands, with a model of its own."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import moebius
from moebius import AllToAll, Config
from moebius.graphs import GraphedStep

DOCS = Path(__file__).resolve().parents[2] / "docs" / "graphs.md"
HIDDEN, EXPERTS, TOPK, TOKENS = 32, 4, 2, 32


class Layer:
    """One expert per unit vector; takes what either example hands to it."""

    def attention(self, x: Tensor, slots: Tensor) -> Tensor:
        return x * (slots >= 0)[:, None]

    def route(self, h: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = h[:, :EXPERTS].softmax(-1).topk(TOPK)
        return weights, ids

    def experts(self, recv: Any, expert_num_tokens: Tensor | None = None) -> Tensor:
        rows: Tensor = recv if expert_num_tokens is not None else recv.x
        return rows / 2


def test_the_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    assert len(blocks) == 2
    config = Config(num_experts=EXPERTS, num_topk=TOPK, hidden=HIDDEN, max_num_tokens=TOKENS, payload="fp32")
    x, slots = torch.randn(5, HIDDEN), torch.arange(5)
    with AllToAll(moebius.virtual_ranks(1)[0], config) as a2a:
        names: dict[str, Any] = {
            "a2a": a2a,
            "model": SimpleNamespace(layers=[Layer(), Layer()]),
            "x": x,
            "slots": slots,
        }
        exec(blocks[0], names)
        assert torch.equal(names["y"], names["step"](x, slots, num_valid_tokens=torch.tensor([5])))
        exec(blocks[1], names)
        graph: GraphedStep[Tensor]
        with GraphedStep(names["step"], a2a, [x]) as graph:
            graph.capture()
            assert torch.equal(graph(x), names["step"](x, num_valid_tokens=torch.tensor([5])))
