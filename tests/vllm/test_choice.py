"""vLLM's objects are its own until we are chosen, and what is replaced then is what the table says."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moebius.vllm import points
from tests.vllm import runs
from tests.vllm.marks import needs_vllm

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def touched(model: Callable[[str], Path]) -> dict[str, list[str]]:
    env = runs.environment(VLLM_PLUGINS="", VLLM_LOGGING_LEVEL="ERROR")
    command = [sys.executable, "-m", "tests.vllm.touched", str(model("qwen3_moe"))]
    ran = subprocess.run(command, env=env, cwd=runs.ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    told: dict[str, list[str]] = json.loads(ran.stdout.splitlines()[-1])
    return told


def test_loading_the_plugin_adds_the_name_and_nothing_else(touched: dict[str, list[str]]) -> None:
    config = "vllm.config.parallel.ParallelConfig"
    assert set(touched["registered"]) <= {
        "vllm.config.parallel.All2AllBackend",
        f"{config}.__init__",  # pydantic's, generated anew
    }


def test_another_backend_leaves_every_object_as_it_was(touched: dict[str, list[str]]) -> None:
    assert touched["another chosen"] == []


def test_what_is_replaced_once_chosen_is_what_the_table_says(touched: dict[str, list[str]]) -> None:
    at_load = {"All2AllBackend", "ParallelConfig.all2all_backend"}
    wanted = {point.name for point in points.POINTS if point.is_patched} - at_load
    found = set()
    for name in touched["ours chosen"] + touched["group made"]:
        *_, owner, last = name.split(".")
        found.add(f"{owner}.{last}" if owner[0].isupper() else last)
    # The class of the platform inherits what the table names by its base; the pickling is inherited from `object`.
    platform = "CpuPlatform.get_device_communicator_cls"
    assert found - {platform} == wanted - {"Platform.get_device_communicator_cls"} | {"ParallelConfig.__reduce_ex__"}
    assert platform in found


def test_a_pickled_configuration_installs_us_where_it_is_unpickled() -> None:
    made = (
        "import sys, pickle; from vllm.config import ParallelConfig; import moebius.vllm; moebius.vllm.register();"
        "sys.stdout.buffer.write(pickle.dumps(ParallelConfig(all2all_backend={!r})))"
    )
    read = (
        "import sys, pickle; config = pickle.load(sys.stdin.buffer); from vllm.platforms import current_platform as p;"
        "print(config.all2all_backend, config.tensor_parallel_size, p.get_device_communicator_cls(),"
        "'moebius.vllm' in sys.modules)"
    )
    env = runs.environment(VLLM_PLUGINS="", VLLM_LOGGING_LEVEL="ERROR")
    found = {}
    for backend in ("moebius", "deepep_low_latency"):
        command = [sys.executable, "-c", made.format(backend)]
        pickled = subprocess.run(command, env=env, cwd=runs.ROOT, capture_output=True, timeout=120, check=True).stdout
        command = [sys.executable, "-c", read]
        ran = subprocess.run(
            command, env=env, cwd=runs.ROOT, input=pickled, capture_output=True, timeout=120, check=True
        )
        found[backend] = ran.stdout.decode().splitlines()[-1].split()
    assert found["moebius"] == ["moebius", "1", "moebius.vllm.communicator.MoebiusCommunicator", "True"]
    assert found["deepep_low_latency"][0::3] == ["deepep_low_latency", "False"]
    assert "moebius" not in found["deepep_low_latency"][2]


def test_the_command_line_offers_the_name() -> None:
    vllm = Path(sys.executable).with_name("vllm")
    env = runs.environment(VLLM_LOGGING_LEVEL="ERROR")
    command = [sys.executable, str(vllm), "serve", "--all2all-backend", "no-such-thing"]
    ran = subprocess.run(command, env=env, cwd=runs.ROOT, capture_output=True, text=True, timeout=180, check=False)
    assert ran.returncode != 0
    assert "invalid choice" in ran.stderr
    assert "moebius" in ran.stderr


def test_vllm_refuses_to_start_where_a_point_has_moved(tmp_path: Path) -> None:
    """What a user of a future version sees: the error itself, from where the configuration is made."""
    code = (
        "import dataclasses; from vllm.config import ParallelConfig; from moebius.vllm import points, register;"
        "register(); points.POINTS = (*points.POINTS, points.Point('config/parallel.py', 'Gone.attr', 'a test'));"
        "ParallelConfig(all2all_backend='allgather_reducescatter'); print('others still work');"
        "ParallelConfig(all2all_backend='moebius')"
    )
    env = runs.environment(VLLM_PLUGINS="", VLLM_LOGGING_LEVEL="ERROR")
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, env=env, cwd=runs.ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert "others still work" in ran.stdout
    last = ran.stderr.strip().splitlines()[-1]
    assert "VersionError: vLLM 0." in last
    assert "vllm.config.parallel.Gone.attr (a test): there is no class Gone" in last


OVERLAPPING = """
from moebius.vllm import register
register()
from vllm.config import DeviceConfig, ParallelConfig, VllmConfig
from vllm.platforms import current_platform
type(current_platform).check_and_update_config = classmethod(lambda cls, config: None)
parallel = ParallelConfig(
    all2all_backend={!r}, data_parallel_size=2, data_parallel_rank=0, enable_expert_parallel=True, enable_dbo=True
)
assert parallel.use_ubatching
try:
    VllmConfig(parallel_config=parallel, device_config=DeviceConfig(device="cpu"))
except Exception as error:
    print(str(error))  # 0.30 misses a model, later on
print(parallel.all2all_backend)
"""


def test_overlapping_micro_batches_is_accepted() -> None:
    """vLLM asserts it by the backend's name; its CPU platform would turn it off before."""
    env = runs.environment(VLLM_PLUGINS="", VLLM_LOGGING_LEVEL="ERROR")
    said = {}
    for backend in ("moebius", "allgather_reducescatter"):
        command = [sys.executable, "-c", OVERLAPPING.format(backend)]
        ran = subprocess.run(command, env=env, cwd=runs.ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert ran.returncode == 0, ran.stderr[-2000:]
        assert ran.stdout.splitlines()[-1] == backend
        said[backend] = ran.stdout
    refusal = "Microbatching currently only supports"
    assert refusal not in said["moebius"]
    assert refusal in said["allgather_reducescatter"]
