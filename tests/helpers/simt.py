"""The CUDA engine on the host executor: its extension, built here, and an `AllToAll` over it."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pybind11
import torch

from moebius import AllToAll, engines, native
from moebius.arguments import Arguments, Place
from moebius.cuda.engine import ALIGNMENT, CudaEngine, Machine
from moebius.cuda.memory import SymmetricMemory
from moebius.heap import rank_and_size
from moebius.wire import shape_of

if TYPE_CHECKING:
    from torch import Tensor

    from moebius import Config, Dispatched, PendingCombine, PendingDispatch
    from moebius.group import VirtualRank
    from moebius.rounds import Round
    from moebius.slots import SlotBuffers

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "simt"
BINDINGS = ("csrc/bindings/cuda.cpp", "csrc/bindings/plain*.cpp", "csrc/bindings/tensors.cpp")
SOURCES = ("csrc/cuda/*.cu", "csrc/cuda/engine.cpp", "csrc/simt/*.cpp", *BINDINGS)
NOT_HERE = {"runtime.cu"}  # CUDA's own; csrc/simt has the other one
HEADERS = ("csrc/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh", "csrc/simt/*.h", "csrc/bindings/*.h")
FLAGS = ("-std=c++17", "-O2", "-g1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-DMOEBIUS_SIMT", "-pthread")


def why_not() -> str | None:
    """Why the executor cannot be had here; None if it can."""
    if not (ROOT / "csrc/simt/world.h").exists():
        return "no csrc/simt"
    if compiler() is None:
        return "no C++ compiler"
    return None


def seed_of_test() -> int:
    """A schedule of its own for every test, the same in every run; `MOEBIUS_TEST_SEED` shifts them all."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    return zlib.crc32(test.encode()) + int(os.environ.get("MOEBIUS_TEST_SEED", "0"))


def compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++")


def newest(*patterns: str) -> float:
    return max((path.stat().st_mtime for pattern in patterns for path in ROOT.glob(pattern)), default=0.0)


@functools.cache
def extension() -> Any:
    """`_simt`, compiled where a source or a header is newer than what is there."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    library = FOLDER / f"_simt{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may come at once
        _build(library)
    spec = importlib.util.spec_from_file_location("_simt", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(library: Path) -> None:
    includes = [f"-I{ROOT / 'csrc'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    headers = newest(*HEADERS)
    sources = sorted(path for pattern in SOURCES for path in ROOT.glob(pattern) if path.name not in NOT_HERE)
    objects = [FOLDER / f"{source.parent.name}-{source.name}.{library.suffixes[0]}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> bool:
        if target.exists() and target.stat().st_mtime > max(source.stat().st_mtime, headers):
            return False
        _run(str(compiler()), *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(target))
        return True

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        is_new = list(workers.map(compile_one, sources, objects))
    if any(is_new) or not library.exists():
        _run(str(compiler()), "-shared", "-pthread", *map(str, objects), "-o", str(library))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-8000:]}"


class Keeping(Arguments):
    """Keeps what the checks made of tensors until it has been read: torch frees memory of the host at once.

    Attributes:
        kept: it, and those tensors.
    """

    kept: list[Any]

    def dispatch(self, *tensors: Any) -> Any:
        checked = super().dispatch(*tensors)
        self.kept.append(checked)
        return checked

    def combine_weights(self, topk_weights: Any, num_tokens: int) -> Tensor | None:
        checked = super().combine_weights(topk_weights, num_tokens)
        self.kept.append(checked)
        return checked


class KeepingEngine(CudaEngine):
    """Keeps what captured rounds hold: torch frees memory of the host at once, where a graph's would stay."""

    def send_dispatch(self, sent: tuple[int, ...], num_tokens: int) -> Round:
        begun = super().send_dispatch(sent, num_tokens)
        if begun.capture:
            vars(self).setdefault("kept", []).append(begun)
        return begun

    def receive_dispatch(self, begun: Round, given: Any, stats: tuple[int, bool, int]) -> SlotBuffers:
        buffers = super().receive_dispatch(begun, given, stats)
        if begun.capture:
            vars(self).setdefault("kept", []).append(buffers)
        return buffers


class SimtAllToAll(AllToAll):
    """`AllToAll` of a virtual rank, its kernels run by the host executor on a stream of its own.

    Its tensors are on the CPU. Nothing runs before somebody synchronises.

    Attributes:
        stream: of this rank, an address.
    """

    num_sms: int = 2  # of the executor's few
    per_node: int | None = None  # ranks that reach each other directly; None: all
    stream: int

    def __init__(self, group: VirtualRank, config: Config, num_sms: int | None = None) -> None:
        super().__init__(group, config, num_sms=num_sms)
        place = Place(-1, ALIGNMENT, reads_late=True)
        self._arguments = self._keeping = Keeping(config, self.wire, self.num_ranks, place)
        self._keeping.kept = []

    def synchronize(self) -> None:
        try:
            super().synchronize()
        finally:
            self._keeping.kept.clear()

    def dispatch(self, *tensors: Any, **options: Any) -> Dispatched:
        self._keeping.kept.append((tensors, options))
        return super().dispatch(*tensors, **options)

    def dispatch_send(self, *tensors: Any, **options: Any) -> PendingDispatch:
        self._keeping.kept.append((tensors, options))
        return super().dispatch_send(*tensors, **options)

    def combine(self, *tensors: Any, **options: Any) -> Tensor:
        home = super().combine(*tensors, **options)
        self._keeping.kept.append((tensors, options, home))
        return home

    def combine_send(self, *tensors: Any, **options: Any) -> PendingCombine:
        pending = super().combine_send(*tensors, **options)
        self._keeping.kept.append((tensors, options, pending))  # which keeps what it is received into
        return pending

    def _receive_combine(self, begun: Round, *rest: Any) -> Tensor:
        home = super()._receive_combine(begun, *rest)
        if begun.capture:
            vars(self._engine).setdefault("kept", []).append(home)
        return home

    def _make_engine(  # type: ignore[override]
        self, group: VirtualRank, config: Config, device: Any, num_sms: int | None, transport: str
    ) -> engines.Engine:
        simt = extension()
        rank, num_ranks = rank_and_size(group)
        per_node = self.per_node or num_ranks
        shape = shape_of(config, num_ranks, has_outbox=per_node < num_ranks)
        num_bytes = native.core().HeapLayout(shape).total

        def make() -> list[Any]:
            heaps = [simt.Memory(0, num_bytes) for _ in range(num_ranks)]
            for owner, heap in enumerate(heaps):
                simt.register_memory(owner, heap.address, num_bytes)
                weakref.finalize(heap, simt.unregister_memory, heap.address).atexit = False
                simt.register_symmetric(owner, heap.address, num_bytes)
            return heaps

        heaps = group.share(repr(config), make)
        self.stream = stream = simt.new_stream(rank)
        place = Place(-1, ALIGNMENT, reads_late=True)
        machine = Machine(simt, torch.device("cpu"), 0, place, lambda: stream)
        addresses = [heap.address if peer // per_node == rank // per_node else 0 for peer, heap in enumerate(heaps)]
        memory = SymmetricMemory(rank, addresses, num_bytes, "virtual", heaps)
        engine = KeepingEngine(config, machine, memory, num_sms or self.num_sms)
        weakref.finalize(engine, free_stream, stream).atexit = False
        return engine

    def begin_capture(self) -> None:
        """Halves from now on are recorded, not run."""
        extension().begin_capture(self.stream)

    def end_capture(self) -> Any:
        """What was recorded; `replay(stream)` runs it."""
        return extension().end_capture(self.stream)


def free_stream(stream: int) -> None:
    """Or every later step of the executor looks at it too. What a test left on it unfinished stays there."""
    if extension().is_idle(stream):
        extension().free_stream(stream)


def in_nodes_of(per_node: int) -> type[SimtAllToAll]:
    """An `AllToAll` whose rank reaches those of its node directly, and the others over the executor's network."""
    return type(f"SimtAllToAllInNodesOf{per_node}", (SimtAllToAll,), {"per_node": per_node})
