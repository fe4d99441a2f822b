"""Routing recorded in a live run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.vllm import runs
from tests.vllm.cases import BATCHES
from tests.vllm.marks import needs_vllm

pytestmark = needs_vllm


@pytest.mark.slow
def test_each_rank_records_the_experts_of_its_own_tokens(model: Callable[[str], Path], tmp_path: Path) -> None:
    trace = tmp_path / "traces" / "run.pt"
    runs.generate(
        tmp_path,
        model("qwen3_moe"),
        BATCHES,
        num_ranks=2,
        env={"MOEBIUS_VLLM_TRACE": str(trace)},
        data_parallel_size=2,
        enable_expert_parallel=True,
        all2all_backend="moebius",
    )
    assert sorted(path.name for path in trace.parent.iterdir()) == ["run.rank0.pt", "run.rank1.pt"]
    for rank in range(2):
        found = torch.load(trace.with_name(f"run.rank{rank}.pt"), weights_only=True)
        assert (found["num_experts"], found["num_topk"]) == (8, 2)
        assert list(found["layers"]) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
        # A token for each byte; the last one that is made is not computed with any more.
        num_tokens = sum(len(prompt) + length - 1 for batch in BATCHES for prompt, length in batch[rank])
        for ids in found["layers"].values():
            assert ids.dtype == torch.int16
            assert ids.shape == (num_tokens, 2)
            assert ids.min() >= 0
            assert ids.max() < 8
            assert (ids[:, 0] != ids[:, 1]).all()
