"""The extension over NVSHMEM as built: it loads without a GPU, says why it does not run there, and has the puts."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moebius import AllToAll, Config, CudaError, MoebiusError, native
from tests.helpers.launch import RankPool
from tests.sass import tools
from tests.sass.expected import short_name
from tests.sass.listing import Kernel, kernels
from tests.sass.objects import HOPPER

ARCH = HOPPER[0]
CONFIG = Config(num_experts=4, num_topk=2, hidden=64, max_num_tokens=4)
MOST_REGISTERS = 128  # what 512 threads leave to each (tests/sass/expected.py); more and a kernel does not start


def built() -> Path | None:
    """The extension; None where it was not built."""
    spec = importlib.util.find_spec("moebius._nvshmem")
    return Path(spec.origin) if spec is not None and spec.origin else None


def why_not() -> str | None:
    """Why there is nothing to look at; None if there is."""
    if built() is None:
        return "moebius._nvshmem was not built: no nvcc, or no nvidia-nvshmem"
    try:
        native.nvshmem()
    except MoebiusError as error:
        return str(error)
    return None


pytestmark = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_it_loads_next_to_the_other_engine() -> None:
    over_nvshmem, plain = native.nvshmem(), native.cuda()
    assert over_nvshmem.Engine is not plain.Engine
    assert over_nvshmem.version_built() <= over_nvshmem.version_loaded()


def test_the_host_library_is_not_in_the_package() -> None:
    folder = built()
    assert folder is not None
    assert not list(folder.parent.glob("*nvshmem_host*"))


def test_without_the_host_library_it_does_not_load_but_says_so(tmp_path: Path) -> None:
    """In a process of its own: here the library is loaded by now."""
    program = (
        "import sys, moebius\n"
        "sys.path = [entry for entry in sys.path if not entry.endswith('-packages')]\n"
        "try: moebius.native.nvshmem()\n"
        "except moebius.NativeNotBuiltError as error: print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NVSHMEM_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False, env=environment
    )
    assert (done.returncode, "libnvshmem_host.so.3" in done.stdout) == (0, True), done.stderr


def refusal(group: Any) -> tuple[str, str]:
    try:
        AllToAll(group, CONFIG, "cuda", transport="nvshmem")
    except CudaError as error:
        return type(error).__name__, str(error)
    return "", ""


@without_gpu
def test_it_refuses_with_the_reason_and_the_processes_live_on() -> None:
    with RankPool(2) as pool:
        for _ in range(2):
            for name, text in pool.run(refusal, [(), ()]):
                assert name == "CudaError"
                assert re.search("no NVIDIA driver here|no GPU", text)


@functools.cache
def linked() -> list[Kernel]:
    """The kernels as the device linker left them."""
    cuobjdump, library = str(tools.disassembler("cuobjdump")), str(built())
    only = ["--gpu-architecture", f"sm_{ARCH}", library]
    sass = tools.run([cuobjdump, "--dump-sass", *only])
    known = set(re.findall(r"Function : (\S+)", sass))
    parts = tools.run([cuobjdump, "--dump-resource-usage", *only]).split("Function ")
    resources = "".join(f"Function {text}" for text in parts if text.partition(":")[0] in known)
    return [kernel for kernel in kernels(sass, resources, "") if "_kernel" in kernel.name]


def calls(folder: Path) -> dict[str, set[str]]:
    """The functions that each kernel calls, by the names of both: NVSHMEM and ours are bound when it is loaded."""
    command = [str(tools.disassembler("cuobjdump")), "--extract-elf", f"sm_{ARCH}", str(built())]
    subprocess.run(command, cwd=folder, check=True, timeout=100, capture_output=True)
    found: dict[str, set[str]] = {}
    for cubin in folder.glob("*.cubin"):
        read = subprocess.run(["readelf", "-rW", cubin], capture_output=True, text=True, timeout=100, check=True)
        for section in read.stdout.split("Relocation section ")[1:]:
            if (name := re.match(r"'\.rela\.text\.(\S+)'", section)) is not None:
                found[name[1]] = set(re.findall(r"(\S+) \+ [0-9a-f]+$", section, re.MULTILINE))
    return found


needs_code = pytest.mark.skipif(bool(tools.missing() or shutil.which("readelf") is None), reason="no disassembler")


def reached(found: dict[str, set[str]], name: str) -> set[str]:
    """What a function calls, and what that calls."""
    seen: set[str] = set()
    rest = [name]
    while rest:
        called = set(found.get(rest.pop(), ())) - seen
        seen |= called
        rest += called
    return seen


@needs_code
def test_the_sending_kernels_put_and_all_can_tell_of_a_lost_round(tmp_path: Path) -> None:
    found = calls(tmp_path)
    ours = {short_name(name): " ".join(reached(found, name)) for name in found if "_kernel" in name}
    if not ours:
        pytest.skip(f"not built for sm_{ARCH}")
    for name, called in ours.items():
        assert "put_word" in called, name
        assert ("warp_put_signal" in called) == ("_send_" in name), name
        assert ("network_quiet" in called) == ("_send_" in name), name
    (put,) = (called for name, called in found.items() if "warp_put_signal" in name)
    assert any("nvshmemi_transfer_put_signal" in name for name in put), "one message carries its word with it"


@needs_code
def test_the_linked_kernels_fit_and_read_nothing_back_from_local_memory() -> None:
    """What is spilled is read back; what is only written are arguments of the functions that note a failure."""
    assert all(0 < kernel.registers <= MOST_REGISTERS for kernel in linked())
    assert all(kernel.count(r"LDL\b") == 0 for kernel in linked())
