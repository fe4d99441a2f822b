"""The baseline that ours is compared with answers right, too."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vllm import runs
from tests.vllm.cases import BATCHES, compare
from tests.vllm.marks import needs_vllm

pytestmark = needs_vllm


@pytest.mark.slow
@pytest.mark.parametrize("num_tensor_ranks", [1, 2])
def test_answers_over_gloo_equal_those_of_one_process(
    num_tensor_ranks: int,
    model: Callable[[str], Path],
    expected: Callable[[str], dict[str, runs.Answer]],
    tmp_path: Path,
) -> None:
    wanted = expected("qwen3_moe")
    ran = runs.generate(
        tmp_path,
        model("qwen3_moe"),
        BATCHES,
        num_ranks=2 * num_tensor_ranks,
        env={"MOEBIUS_VLLM_GLOO": "1"},
        data_parallel_size=2,
        tensor_parallel_size=num_tensor_ranks,
        enable_expert_parallel=True,
        all2all_backend="allgather_reducescatter",
    )
    compare(ran.answers, wanted)
    assert "Using GlooPrepareAndFinalize" in ran.log
    assert "moebius 0" not in ran.log
