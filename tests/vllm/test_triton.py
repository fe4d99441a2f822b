"""vLLM's Triton experts for GPUs, interpreted, between our halves on the emulated kernels."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import simt
from tests.vllm import runs
from tests.vllm.marks import needs_vllm

pytestmark = [needs_vllm, pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))]

# In a process of its own: Triton is told to interpret before it is imported.
RUN = """
import sys
import torch
from vllm.platforms import current_platform
from vllm.platforms.cpu import CpuPlatform
type(current_platform).get_device_name = classmethod(lambda cls, device_id=0: "interpreter")
# Or it loads the library for AVX-512, whatever this processor has.
type(current_platform).import_kernels = classmethod(lambda cls: CpuPlatform.import_kernels())
from vllm.v1.worker.workspace import init_workspace_manager
import moebius.vllm.batched
from tests.helpers import simt
from tests.vllm import emulated, test_kernel
from tests.vllm_cuda import experts
assert not current_platform.is_cpu(), "the workspace is then none"

class Workspaces:  # a rank is a process to vLLM, here a thread
    def get_simultaneous(self, *shapes_and_dtypes):
        return [torch.empty(shape, dtype=dtype) for shape, dtype in shapes_and_dtypes]

from vllm.v1.worker import workspace
workspace._manager = Workspaces()
test_kernel.experts_of["batched-triton"] = chosen = experts.triton_experts()
sys.modules[chosen.__module__]._is_capturing_or_compiling = lambda: False
simt.extension().reset(7)
meeting, waits = emulated.Meeting(test_kernel.R), []
test_kernel.check_layer(
    "batched-triton",
    "random",
    lambda group: emulated.EmulatedManager(group, meeting),
    lambda kernel: waits.append(emulated.watch(kernel.prepare_finalize)),
)
assert waits == [[]] * test_kernel.R, waits
print("the layer is right")
"""


def test_triton_experts_between_our_halves(tmp_path: Path) -> None:
    # Under this version vLLM does not take itself for a build for the CPU, which goes without Triton.
    about = tmp_path / "vllm-0.32.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    env = runs.environment(VLLM_PLUGINS="", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    env["PYTHONPATH"] = f"{tmp_path}:{env.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", RUN]
    ran = subprocess.run(command, env=env, cwd=runs.ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines()[-1] == "the layer is right"
