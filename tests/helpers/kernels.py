"""Builds the program of tests/simt/kernels, from csrc as it is or with files of it replaced, and runs it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "kernels"
CSRC = ROOT / "csrc"
PROGRAM = ROOT / "tests" / "simt" / "kernels"
# How a changed kernel is compiled: with all that it calls in it. Of an inline function that several objects have, the
# linker takes one for all, so that other kernels would have the change, or none.
DEVICE = "simt/device.h"
ALONE = {
    "MOEBIUS_DEVICE inline": "MOEBIUS_DEVICE inline __attribute__((always_inline))",
    "MOEBIUS_COLD inline": "MOEBIUS_COLD static inline",
}
KERNELS = ("dispatch_send", "dispatch_recv", "combine_send", "combine_recv", "dispatch", "combine")
FLAGS = ("-std=c++17", "-g1", "-ffp-contract=off", "-pthread", "-DMOEBIUS_SIMT", "-Wno-unknown-pragmas")
OPTIMISED = ("-O2",)
PLANTED = ("-O0", "-g0")  # a changed kernel runs for a few seeds: compiling it takes longer
SANITIZED = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


def compiler() -> str | None:
    """The C++ compiler, None where there is none."""
    return os.environ.get("CXX") or shutil.which("g++")


def includes_of(source: str, texts: Mapping[str, str]) -> set[str]:
    """The files below csrc that a source depends on, itself not among them."""
    found: set[str] = set()
    open_ = [source]
    while open_:
        for name in INCLUDE.findall(texts[open_.pop()]):
            beside = f"{Path(source).parent}/{name}"
            path = name if name in texts else beside
            if path in texts and path not in found:
                found.add(path)
                open_.append(path)
    return found


def sources() -> dict[str, str]:
    """What csrc and the program consist of: path below csrc, or of the program below tests/simt, and text."""
    texts = {str(path.relative_to(CSRC)): path.read_text() for path in CSRC.rglob("*") if path.suffix in SUFFIXES}
    return texts | {path.name: path.read_text() for path in PROGRAM.iterdir() if path.suffix in SUFFIXES}


SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".inl"}


def units(texts: Mapping[str, str]) -> list[str]:
    """The files that are compiled."""
    parts = [f"cuda/{kernel}.cu" for kernel in KERNELS] + ["cuda/engine.cpp"]
    parts += [path for path in texts if path.startswith(("simt/", "cpu/")) and path.endswith(".cpp")]
    return sorted(parts + [path for path in texts if "/" not in path and path.endswith(".cpp")])


class Built:
    """A program, and what it was built from.

    Attributes:
        program: its path.
        objects: of each unit.
    """

    def __init__(self, options: Sequence[str]) -> None:
        """Compile what is not there yet, with as many processes as there are cores.

        Args:
            options: of the compiler, beside the usual.
        """
        self.options = tuple(options)
        self.texts = sources()
        FOLDER.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as workers:
            made = workers.map(lambda unit: self._compile(unit, {}, self.options), units(self.texts))
            self.objects = dict(zip(units(self.texts), made, strict=True))
        self.program = self._link(self.objects)

    def with_changed(self, file: str, text: str, kernels: Sequence[str] = ()) -> Path:
        """The program with one file of csrc replaced by `text` in the kernels that include it, or in those named."""
        named = [f"cuda/{kernel}.cu" for kernel in kernels or KERNELS]
        planted = [unit for unit in named if file == unit or file in includes_of(unit, self.texts)]
        assert planted, f"{file} is no part of {kernels}"
        device = self.texts[DEVICE]
        for before, after in ALONE.items():
            assert device.count(before) == 1, before
            device = device.replace(before, after)
        changed = {file: text, DEVICE: device}
        return self._link(self.objects | {unit: self._compile(unit, changed, PLANTED) for unit in planted})

    def _compile(self, unit: str, changed: Mapping[str, str], options: Sequence[str]) -> Path:
        texts = {**self.texts, **changed}
        digest = hashlib.sha256(repr((FLAGS, options, compiler(), unit)).encode())
        for path in [unit, *sorted(includes_of(unit, texts))]:
            digest.update(texts[path].encode())
        target = FOLDER / f"{digest.hexdigest()[:24]}.o"
        if target.exists():
            return target
        folders = [CSRC, PROGRAM]
        overlay = target.with_suffix(".csrc")
        for path, text in changed.items():
            (overlay / path).parent.mkdir(parents=True, exist_ok=True)
            (overlay / path).write_text(text)
            folders.insert(0, overlay)
        source = next(folder / unit for folder in folders if (folder / unit).exists())
        language = ["-x", "c++"] if unit.endswith(".cu") else []
        partial = target.with_suffix(f".{os.getpid()}.o")
        command = [*FLAGS, *options, *(f"-I{folder}" for folder in folders), *language]
        _run([*command, "-c", str(source), "-o", str(partial)])
        shutil.rmtree(overlay, ignore_errors=True)
        return partial.rename(target)

    def _link(self, objects: Mapping[str, Path]) -> Path:
        digest = hashlib.sha256(repr([path.name for path in objects.values()]).encode())
        program = FOLDER / f"kernels-{digest.hexdigest()[:24]}"
        if not program.exists():
            partial = program.with_suffix(f".{os.getpid()}")
            _run([*FLAGS, *self.options, *map(str, objects.values()), "-o", str(partial)])
            partial.rename(program)
        return program


def _run(arguments: Sequence[str]) -> None:
    command = ["nice", "-n", "5", str(compiler()), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


def run(program: Path, case: str, first_seed: int, num_seeds: int, timeout_s: float = 500) -> tuple[bool, str]:
    """Whether all seeds are right, and what the program says; one that hangs or crashes is not."""
    command = [str(program), case, str(first_seed), str(num_seeds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return False, f"{' '.join(command)}: no end after {timeout_s} s"
    said = done.stdout + done.stderr
    if done.returncode < 0 or (done.returncode != 0 and "WRONG" not in said):
        said += f"\n{' '.join(command)}: exit status {done.returncode}"
    return done.returncode == 0, said
