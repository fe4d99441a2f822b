"""One compile per file and architecture, kept in build/sass until a source, a flag or the compiler changes."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import os
from pathlib import Path

from tests.sass import tools
from tests.sass.listing import Kernel, kernels
from tests.sass.tools import ROOT

HOPPER = ("90a", "100a")
ARCHS = ("80", *HOPPER)
# As setup.py builds, which `test_the_flags_are_those_of_the_build` holds them to; -v only makes ptxas report.
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage")
REPORT = ("-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-Icsrc")
FOLDER = ROOT / "build" / "sass"


@dataclasses.dataclass(frozen=True)
class Object:
    """What came of a file for an architecture: nvcc's words, and the kernels unless it failed."""

    source: Path
    arch: str
    failed: bool
    log: str
    kernels: list[Kernel]


@functools.cache
def _headers_digest() -> bytes:
    digest = hashlib.sha256()
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".inl")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.digest()


def _key(source: Path, arch: str, extra: tuple[str, ...]) -> str:
    digest = hashlib.sha256(_headers_digest() + source.read_bytes())
    digest.update(" ".join((*FLAGS, *REPORT, *extra, arch, tools.nvcc_version())).encode())
    return digest.hexdigest()[:16]


def build(source: Path, arch: str, extra: tuple[str, ...] = ()) -> Object:
    """Compile and disassemble, or take what is kept.

    Args:
        source: a .cu file of the repository.
        arch: as in sm_90a.
        extra: more flags.
    """
    stem = f"{source.stem}.{arch}"
    path = FOLDER / f"{stem}.{_key(source, arch, extra)}.o"
    texts = {kind: path.with_suffix(f".{kind}") for kind in ("log", "sass", "resources")}
    failure = path.with_suffix(".failed")
    if not texts["resources"].exists() and not failure.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        for old in FOLDER.glob(f"{stem}.????????????????.*"):
            old.unlink(missing_ok=True)
        target = path.with_suffix(f".{os.getpid()}.o")  # not seen by another run before it is whole
        command = [str(tools.nvcc()), *FLAGS, *REPORT, *extra, f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        code, log = tools.compile_once([*command, "-c", str(source.relative_to(ROOT)), "-o", str(target)])
        texts["log"].write_text(log)
        if code != 0:
            failure.touch()
        else:
            os.replace(target, path)
            cuobjdump = str(tools.disassembler("cuobjdump"))
            texts["sass"].write_text(tools.run([cuobjdump, "--dump-sass", str(path)]))
            texts["resources"].write_text(tools.run([cuobjdump, "--dump-resource-usage", str(path)]))
    log = texts["log"].read_text()
    if failure.exists():
        return Object(source, arch, True, log, [])
    return Object(source, arch, False, log, kernels(texts["sass"].read_text(), texts["resources"].read_text(), log))


@functools.cache
def build_all(sources: tuple[Path, ...]) -> dict[tuple[str, str], Object]:
    """Every file for every architecture, a compiler a core; by (name of the file, architecture)."""
    jobs = list(itertools.product(sources, ARCHS))
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = list(pool.map(lambda job: build(*job), jobs))
    return {(one.source.stem, one.arch): one for one in made}
