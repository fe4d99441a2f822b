"""Map the folders to the installed packages and build the extensions; everything else is in pyproject.toml."""

import os
import shutil
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "moebius"
FOLDERS = {PACKAGE: "backend", f"{PACKAGE}.graphs": "graphs"}  # installed name -> folder


def packages() -> list[str]:
    """Every import package, named as it installs (never `backend` or `graphs`)."""
    found = []
    for name, folder in FOLDERS.items():
        found += [name, *(f"{name}.{sub}" for sub in find_packages(str(ROOT / folder)))]
    return found


def files(*patterns: str) -> list[str]:
    """The files that match, relative to the root as setuptools wants them, in a stable order."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def core() -> Pybind11Extension:
    """The CPU engine: a C++17 compiler is all it needs.

    No -march: each SIMD variant selects its own target by pragma, and the one to run is chosen at run time.
    No contraction: a fused multiply-add rounds once where every variant has to round twice.
    """
    return Pybind11Extension(
        f"{PACKAGE}._core",
        [*files("csrc/cpu/**/*.cpp"), "csrc/bindings/core.cpp"],
        include_dirs=["csrc"],
        depends=HEADERS,
        cxx_std=17,
        extra_compile_args=["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"],
        extra_link_args=["-pthread"],
    )


def announce_cuda() -> None:
    """Say in one line why no CUDA extension is built."""
    if os.environ.get("MOEBIUS_SKIP_CUDA_BUILD") == "1":
        reason = "MOEBIUS_SKIP_CUDA_BUILD=1"
    elif shutil.which("nvcc") is None:
        reason = "no nvcc on PATH"
    else:
        reason = "this version has no CUDA sources yet"
    print(f"moebius: CUDA extension skipped ({reason})", file=sys.stderr)


HEADERS = ["setup.py", *files("csrc/**/*.h", "csrc/**/*.inl")]


def needs_recompile(obj: str, src: str) -> bool:
    """Whether the source, any header or this file (the flags) is newer than the object."""
    return max(os.path.getmtime(path) for path in (src, *HEADERS)) > os.path.getmtime(obj)


class BuildExt(build_ext):
    """Build in one place that outlives the build, so that each way of building reuses the objects of the others."""

    def finalize_options(self) -> None:
        """Replace the temporary folder that pip gives to an editable install."""
        super().finalize_options()
        self.build_temp = os.path.join("build", f"objects-{sys.implementation.cache_tag}")

    def run(self) -> None:
        """Refuse a checkout without the engine, announce what is skipped, build."""
        if not files("csrc/cpu/**/*.cpp") or not (ROOT / "csrc/bindings/core.cpp").exists():
            raise SystemExit(
                "moebius: csrc/cpu/*.cpp or csrc/bindings/core.cpp is missing: this is not a whole checkout"
            )
        announce_cuda()
        super().run()


ParallelCompile("MOEBIUS_BUILD_JOBS", needs_recompile=needs_recompile).install()
setup(
    packages=packages(),
    package_dir=FOLDERS,
    package_data={PACKAGE: ["py.typed", "*.pyi"]},
    ext_modules=[core()],
    cmdclass={"build_ext": BuildExt},
)
