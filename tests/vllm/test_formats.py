"""A layer's format is the one that its experts take."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.vllm import runs
from tests.vllm.marks import needs_vllm

pytestmark = needs_vllm

# What differs from a layer that all experts take. Batched experts for the CPU are ours, and refuse clamping.
CASES: dict[str, dict[str, Any]] = {
    "batched": {},
    "standard": {"prefers": "standard"},
    "no batched ones": {"clamps": True},
    "none at all": {"activation": "relu2"},
    "fixed by the environment": {"clamps": True, "format": "batched"},
    "another backend": {"backend": "allgather_reducescatter"},
}
# In a process of its own, as what is installed stays. `prefers` stands in for the platform.
SETTLE = """
import json, logging, os, sys
logging.basicConfig(level=logging.INFO)
import torch
from moebius import virtual_ranks
from moebius.vllm import layers, patches, register
from tests.vllm.test_kernel import K, Manager, moe_config
register()
from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
ParallelConfig(all2all_backend="moebius")
patches.install_in_layers()
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

def settle(name, prefers="batched", clamps=False, activation="silu", format="", backend="moebius"):
    patches.prefers_batched_format = lambda: prefers == "batched"
    os.environ["MOEBIUS_VLLM_FORMAT"] = format
    config = moe_config(0, torch.float32, K)
    config.swiglu_limit = 7.0 if clamps else None
    config.activation = MoEActivation(activation)
    config.moe_parallel_config.all2all_backend = backend
    try:
        method = RoutedExperts._get_quant_method(None, name, None, config)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    wanted = method.experts_cls.activation_format()
    told = {"wanted": wanted.name, "is_batched": config.moe_parallel_config.use_batched_activation_format}
    if backend == "moebius":
        made = layers.make_prepare_finalize(config, None, {"all2all_manager": Manager(virtual_ranks(1)[0])})
        told |= {"made": type(made).__name__, "agree": made.activation_format == wanted}
    return told

with set_current_vllm_config(VllmConfig()):
    print(json.dumps({name: settle(name, **case) for name, case in json.loads(sys.argv[1]).items()}))
"""


@pytest.fixture(scope="module")
def settled() -> tuple[dict[str, dict[str, object]], str]:
    """What became of each case, and what was logged."""
    ran = subprocess.run(
        [sys.executable, "-c", SETTLE, json.dumps(CASES)],
        env=runs.environment(VLLM_PLUGINS="", MOEBIUS_VLLM_FORMAT=""),
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1]), ran.stderr


@pytest.mark.parametrize("prefers", ["batched", "standard"])
def test_the_preferred_format_where_there_are_experts_of_it(
    prefers: str, settled: tuple[dict[str, dict[str, object]], str]
) -> None:
    told = settled[0][prefers]
    assert told["agree"] is True
    assert told["is_batched"] is (prefers == "batched")
    assert told["made"] == f"Moebius{prefers.capitalize()}PrepareAndFinalize"
    assert f"moebius: {prefers} has no" not in settled[1]


def test_the_other_format_where_there_are_none(settled: tuple[dict[str, dict[str, object]], str]) -> None:
    assert settled[0]["no batched ones"] == {
        "wanted": "Standard",
        "is_batched": False,
        "made": "MoebiusStandardPrepareAndFinalize",
        "agree": True,
    }
    said = "moebius: no batched ones has no batched experts (No Unquantized MoE backend supports the deployment"
    line = next(line for line in settled[1].splitlines() if said in line)
    assert line.endswith("): standard format")


@pytest.mark.parametrize("case", ["none at all", "fixed by the environment"])
def test_vllm_s_own_refusal_where_there_are_none(case: str, settled: tuple[dict[str, dict[str, object]], str]) -> None:
    told = settled[0][case]
    assert str(told["error"]).startswith("NotImplementedError: No Unquantized MoE backend supports")
    assert f"moebius: {case} has no" not in settled[1]


def test_another_backend_is_asked_once(settled: tuple[dict[str, dict[str, object]], str]) -> None:
    assert settled[0]["another backend"] == {"wanted": "Standard", "is_batched": False}
