"""Offline runs over several processes answer as one process does."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import runs
from tests.vllm.cases import BATCHES, compare, on_one_rank
from tests.vllm.marks import needs_vllm

pytestmark = needs_vllm
OURS: dict[str, Any] = {"enable_expert_parallel": True, "all2all_backend": "moebius"}


@dataclasses.dataclass
class Mode:
    """One way to run.

    Attributes:
        name: of the test.
        form: format, as in MOEBIUS_VLLM_FORMAT; "" for the default.
        dp: data-parallel ranks.
        tp: tensor-parallel ranks of each.
        prepares: class that vLLM must say it uses.
        experts: likewise.
        kind: of model.
        is_compiled: torch.compile instead of eager.
    """

    name: str
    form: str
    dp: int
    tp: int
    prepares: str
    experts: str
    kind: str = "qwen3_moe"
    is_compiled: bool = False


STANDARD = ("MoebiusStandardPrepareAndFinalize", "CPUUnquantizedExperts")
BATCHED = ("MoebiusBatchedPrepareAndFinalize", "MoebiusBatchedCPUExperts")
MODES = [
    Mode("dp2-ep-standard", "", 2, 1, *STANDARD),
    Mode("dp2-ep-batched", "batched", 2, 1, *BATCHED),
    # The layer is one operator to the compiler: what is in it, and so the format, is no matter to it.
    Mode("dp2-ep-compiled", "batched", 2, 1, *BATCHED, is_compiled=True),
    Mode("dp2-tp2-ep-batched", "batched", 2, 2, *BATCHED),
    Mode("dp2-tp2-ep-standard", "standard", 2, 2, *STANDARD),
    Mode("tp2-ep", "", 1, 2, "MoebiusLocalPrepareAndFinalize", "CPUUnquantizedExperts"),
    Mode("mixtral-dp2-ep", "standard", 2, 1, *STANDARD, kind="mixtral"),
    Mode("shared-experts-dp2-ep", "batched", 2, 1, *BATCHED, kind="qwen2_moe"),
]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_answers_equal_those_of_one_process(
    mode: Mode, model: Callable[[str], Path], expected: Callable[[str], dict[str, runs.Answer]], tmp_path: Path
) -> None:
    wanted = expected(mode.kind)
    before = runs.segments()
    ran = runs.generate(
        tmp_path,
        model(mode.kind),
        BATCHES if mode.dp > 1 else on_one_rank(BATCHES),
        num_ranks=mode.dp * mode.tp,
        env={"MOEBIUS_VLLM_FORMAT": mode.form},
        data_parallel_size=mode.dp,
        tensor_parallel_size=mode.tp,
        enforce_eager=not mode.is_compiled,
        **OURS,
    )
    compare(ran.answers, wanted)
    assert f"Using {mode.prepares}" in ran.log
    assert f"Using {mode.experts} MoE backend" in ran.log
    assert ("saved AOT compiled function" in ran.log) == mode.is_compiled
    if mode.dp > 1:
        form = mode.form or "standard"
        line = f"of vLLM {version()}: {mode.dp * mode.tp} ranks, {form} format"
        assert ran.log.count(line) == mode.dp * mode.tp, "each process says once that we are active"
    assert runs.segments() - before == set()


def version() -> str:
    import vllm

    return str(vllm.__version__)
