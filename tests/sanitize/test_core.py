"""The C++ core under the sanitizers, with virtual ranks in threads: its own program, built here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "tests/sanitize/core_test.cpp", *sorted((ROOT / "csrc/cpu").rglob("*.cpp"))]
FLAGS = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-pthread", f"-I{ROOT / 'csrc'}"]


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_core_is_clean_under(sanitizer: str, tmp_path: Path) -> None:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "core_test"
    build: list[str | Path] = [
        compiler,
        *FLAGS,
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        *SOURCES,
        "-o",
        program,
    ]
    subprocess.run(build, check=True, timeout=300)
    ran = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert ran.stdout.count(" ok\n") == 15
