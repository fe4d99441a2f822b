"""What the wheel and the sdist hold, built from a clean copy of the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.tree import ROOT, checkout_files

ENVIRONMENT = {**os.environ, "MOEBIUS_SKIP_CUDA_BUILD": "1"}


def run(*command: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def clean_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout without anything built but the objects, which are current or will be compiled again."""
    copy = tmp_path_factory.mktemp("checkout")
    for path in checkout_files():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, copy / path)
    for objects in (ROOT / "build").glob("objects-*"):
        shutil.copytree(objects, copy / "build" / objects.name)
    return copy


@pytest.fixture(scope="module")
def wheel_names(clean_copy: Path) -> set[str]:
    run("-m", "pip", "wheel", "-q", "--no-index", "--no-build-isolation", "--no-deps", "-w", "out", ".", cwd=clean_copy)
    (wheel,) = (clean_copy / "out").glob("moebius-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def sdist_names(clean_copy: Path) -> set[str]:
    run("setup.py", "-q", "sdist", "-d", "out", cwd=clean_copy)
    (sdist,) = (clean_copy / "out").glob("moebius-*.tar.gz")
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


def test_the_wheel_has_one_top_level_package(wheel_names: set[str]) -> None:
    top = {name.split("/")[0] for name in wheel_names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"moebius"}


def test_the_wheel_has_every_module_of_both_folders(wheel_names: set[str]) -> None:
    installed = {"backend": "moebius", "graphs": "moebius/graphs"}
    for path in checkout_files():
        folder = path.parts[0]
        if folder in installed and path.suffix in (".py", ".pyi", ".typed"):
            assert path.as_posix().replace(folder, installed[folder], 1) in wheel_names


def test_the_wheel_has_the_extension_and_its_types(wheel_names: set[str]) -> None:
    assert "moebius/py.typed" in wheel_names
    assert "moebius/_core.pyi" in wheel_names
    extensions = [name for name in wheel_names if name.endswith(".so")]
    assert len(extensions) == 1
    assert extensions[0].startswith("moebius/_core.")


def test_the_sdist_can_build_the_extension(sdist_names: set[str]) -> None:
    sources = {path.as_posix() for path in checkout_files() if path.parts[0] == "csrc"}
    assert sources
    assert sources | {"setup.py", "pyproject.toml", "LICENSE"} <= sdist_names
