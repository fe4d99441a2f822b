"""Recorded routings: read, refused by name, sampled as neighbours."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moebius import ConfigError
from moebius.bench.routing_trace import read_routing_trace
from moebius.bench.workload import Workload, generator, route


def save(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def layer(num_tokens: int, first: int = 0) -> torch.Tensor:
    """Token i goes to (i + first) % 16, and every third one has no second choice."""
    token = torch.arange(num_tokens)
    return torch.stack([(token + first) % 16, torch.where(token % 3 == 0, -1, (token + first + 5) % 16)], 1).short()


def test_neighbours_stay_neighbours(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pt", {"num_experts": 16, "num_topk": 2, "layers": {"a": layer(32), "b": layer(32, 3)}})
    trace = read_routing_trace(path)
    assert (trace.num_experts, trace.num_topk, len(trace.layers)) == (16, 2, 2)
    ids, weights = trace.sample(0, 40, generator(1))
    assert ids.dtype == torch.int32
    assert ids.shape == (40, 2)
    assert torch.equal((ids[1:, 0] - ids[:-1, 0]) % 16, torch.ones(39, dtype=torch.int32))
    assert torch.allclose(weights.sum(1), torch.ones(40))
    assert bool((weights[ids < 0] == 0).all())
    other, _ = trace.sample(3, 40, generator(1))
    assert torch.equal(other[:, 0], (ids[:, 0] + 3) % 16)


def test_other_forms_of_the_file(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    steps = layer(12).view(3, 4, 2)
    trace = read_routing_trace(save(tmp_path / "t.pt", steps))
    assert (trace.num_experts, trace.num_topk) == (16, 2)
    assert trace.layers[0].shape == (12, 2)
    np.savez(tmp_path / "r.npz", a=steps.numpy(), num_experts=np.int64(32))
    assert read_routing_trace(tmp_path / "r.npz").num_experts == 32


def test_a_benchmark_takes_its_routing_from_it(tmp_path: Path) -> None:
    path = save(tmp_path / "r.pt", {"num_experts": 16, "num_topk": 2, "layers": {"a": layer(32)}})
    workload = Workload(ranks=2, experts=16, topk=2, tokens=5, routing_trace=path)
    workload.config()
    ids, _ = route(workload, 0, 0)
    assert torch.equal((ids[1:, 0] - ids[:-1, 0]) % 16, torch.ones(4, dtype=torch.int32))
    with pytest.raises(ConfigError, match="top-2 of 16 experts"):
        Workload(ranks=2, experts=32, topk=2, routing_trace=path).config()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_experts": 4, "layers": {"a": layer(32)}}, "below 4"),
        ({"layers": {"a": layer(4), "b": torch.zeros(4, 3, dtype=torch.int16)}}, "same top-k"),
        ({"layers": {"a": torch.full((4, 2), -1)}}, "routes no token"),
        ({"layers": {"a": torch.zeros(4, 2)}}, "integer tensor"),
        ({"layers": {}}, "no routing trace"),
        ([1, 2], "no routing trace"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_routing_trace(save(tmp_path / "r.pt", content))


def test_what_is_no_file_of_torch_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.pt").write_text("text")
    with pytest.raises(ConfigError, match="no routing trace"):
        read_routing_trace(tmp_path / "r.pt")
    with pytest.raises(ConfigError, match="cannot read"):
        read_routing_trace(tmp_path / "none.pt")
