"""Map the folders to the installed packages and build the extensions; everything else is in pyproject.toml."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

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
        [*files("csrc/cpu/**/*.cpp"), "csrc/bindings/core.cpp", "csrc/bindings/network.cpp"],
        include_dirs=["csrc"],
        depends=HEADERS,
        cxx_std=17,
        extra_compile_args=["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"],
        extra_link_args=["-pthread"],
    )


def find_nvcc() -> str | None:
    """CUDA's compiler: the one on PATH, or that of `CUDA_HOME`, or where CUDA installs itself."""
    homes = (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda")
    return shutil.which("nvcc") or next((found for home in homes if (found := shutil.which(f"{home}/bin/nvcc"))), None)


NVCC = None if os.environ.get("MOEBIUS_SKIP_CUDA_BUILD") == "1" else find_nvcc()
# SASS alone, so that nothing is compiled on a user's machine; the "a" ones have what only that generation can.
CUDA_ARCHS = re.split(r"[ ,;]+", os.environ.get("MOEBIUS_CUDA_ARCHS", "").strip() or "80 90a 100a")
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "-lineinfo"),
    "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
    *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS),
]


PLAIN = ("csrc/bindings/plain*.cpp", "csrc/bindings/tensors.cpp")


def cuda(nvcc: str) -> Pybind11Extension:
    """The CUDA engine. The runtime is linked statically and the driver not at all: it loads where there is no GPU."""
    # Where it would link from; it may itself be a script, or lie in another folder than the libraries.
    steps = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    ).stderr
    homes = [Path(home) for home in re.findall(r"TOP=(\S+)", steps)]
    folders = [Path(folder) for folder in re.findall(r'-L([^"\s]+)', steps)]
    folders += [home / name for home in homes for name in ("lib64", "lib")]
    return Pybind11Extension(
        f"{PACKAGE}._cuda",
        files("csrc/cuda/*.cu", "csrc/cuda/*.cpp", "csrc/bindings/cuda.cpp", *PLAIN),
        include_dirs=["csrc"],
        library_dirs=[str(folder) for folder in folders if (folder / "libcudart_static.a").exists()],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        depends=HEADERS,
        cxx_std=17,
        extra_compile_args=["-O3", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"],
    )


def find_nvshmem() -> Path | None:
    """NVSHMEM's folder (include, lib): that of `NVSHMEM_HOME`, or of the wheel that this Python has."""
    homes = [Path(home) for home in filter(None, [os.environ.get("NVSHMEM_HOME")])]
    homes += [Path(folder) / "nvidia" / "nvshmem" for folder in sys.path if folder]
    return next((home for home in homes if (home / "lib" / "libnvshmem_device.a").exists()), None)


NVSHMEM = None if NVCC is None or os.environ.get("MOEBIUS_NVSHMEM") == "0" else find_nvshmem()


def nvshmem(nvcc: str, home: Path) -> Pybind11Extension:
    """The CUDA engine over NVSHMEM: the same sources, the network's calls bound by the device linker.

    The host library is linked by name and found by nobody: `moebius.native` loads the wheel's before this extension.
    """
    made = cuda(nvcc)
    made.name = made._full_name = f"{PACKAGE}._nvshmem"
    both_halves = ("csrc/cuda/dispatch.cu", "csrc/cuda/combine.cu")  # csrc/cuda/engine.cpp says why not here
    made.sources = [source for source in made.sources if source not in both_halves] + files("csrc/nvshmem/*.cu")
    made.define_macros.append(("MOEBIUS_NVSHMEM", "1"))
    made.library_dirs.append(str(home / "lib"))
    # -l:name takes the file as it is called; the wheel has no libnvshmem_host.so to be found by -lnvshmem_host.
    made.extra_link_args += ["-l:libnvshmem_host.so.3", "-lnvshmem_device", "-lcudadevrt"]
    # Or the copy of the device library that another extension has (torch's) could take the place of this one's.
    made.extra_link_args += ["-Wl,--exclude-libs,ALL"]
    made.extra_link_args += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]  # once more: those before need them
    return made


def run_nvcc(*arguments: str, to: str) -> None:
    """Make the object `to`.

    Raises:
        CompileError: nvcc failed. (SystemExit would hang the pool of threads.)
    """
    try:
        subprocess.run([str(NVCC), *arguments, "-o", to], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"nvcc failed on {to} ({error})") from error


def compile_with_nvcc(compiler: Any) -> None:
    """Make a setuptools compiler hand the .cu files to nvcc."""
    compiler.src_extensions.append(".cu")
    compile_one = compiler._compile

    def _compile(obj: str, src: str, ext: str, cc_args: list[str], postargs: list[str], pp_opts: list[str]) -> None:
        if ext != ".cu":
            compile_one(obj, src, ext, cc_args, postargs, pp_opts)
            return
        flags = NVCC_FLAGS
        if "-DMOEBIUS_NVSHMEM=1" in pp_opts:
            flags = [*flags, "-DMOEBIUS_NVSHMEM=1", "-rdc=true", "-isystem", str(NVSHMEM and NVSHMEM / "include")]
        if src.startswith("csrc/nvshmem/"):  # NVSHMEM's own functions have stacks
            flags = [flag for flag in flags if "warn-on" not in flag]
        run_nvcc(*flags, "-Icsrc", "-c", src, to=obj)

    compiler._compile = _compile


def link_for_device(objects: list[str], to: str) -> None:
    """Bind the kernels of relocatable objects to NVSHMEM's device library."""
    archs = [flag for flag in NVCC_FLAGS if flag.startswith("-gencode")]
    library = f"-L{NVSHMEM and NVSHMEM / 'lib'}"
    run_nvcc("-dlink", "-Xcompiler=-fPIC", *archs, *objects, library, "-lnvshmem_device", to=to)


def announce_cuda() -> None:
    """Say in one line what is built of CUDA, or why nothing is."""
    if NVCC is not None:
        line = f"for {', '.join(f'sm_{arch}' for arch in CUDA_ARCHS)} with {NVCC}"
    elif os.environ.get("MOEBIUS_SKIP_CUDA_BUILD") == "1":
        line = "skipped (MOEBIUS_SKIP_CUDA_BUILD=1)"
    else:
        line = "skipped (no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda)"
    print(f"moebius: CUDA extension {line}", file=sys.stderr)
    if NVSHMEM is not None:
        line = f"against {NVSHMEM}"
    elif NVCC is None:
        line = "skipped (no CUDA extension)"
    elif os.environ.get("MOEBIUS_NVSHMEM") == "0":
        line = "skipped (MOEBIUS_NVSHMEM=0)"
    else:
        line = "skipped (no NVSHMEM: pip install nvidia-nvshmem-cu13, or set NVSHMEM_HOME)"
    print(f"moebius: NVSHMEM extension {line}", file=sys.stderr)


HEADERS = ["setup.py", *files("csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.inl")]


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

    def build_extensions(self) -> None:
        """Add nvcc to the compiler."""
        if NVCC is not None:
            compile_with_nvcc(self.compiler)
        super().build_extensions()

    def build_extension(self, ext: Any) -> None:
        """Keep the relocatable objects apart from the others of the same sources, and link them for the device."""
        if ext.name != f"{PACKAGE}._nvshmem":
            super().build_extension(ext)
            return
        place, self.build_temp = self.build_temp, f"{self.build_temp}-nvshmem"
        link, compiler = self.compiler.link_shared_object, self.compiler

        def link_both(objects: list[str], *rest: Any, **more: Any) -> None:
            linked = os.path.join(self.build_temp, "linked.o")
            link_for_device(objects, to=linked)
            link([*objects, linked], *rest, **more)

        compiler.link_shared_object = link_both
        try:
            super().build_extension(ext)
        finally:
            self.build_temp, compiler.link_shared_object = place, link


ParallelCompile("MOEBIUS_BUILD_JOBS", needs_recompile=needs_recompile).install()
setup(
    packages=packages(),
    package_dir=FOLDERS,
    package_data={PACKAGE: ["py.typed", "*.pyi"]},
    ext_modules=[
        core(),
        *([cuda(NVCC)] if NVCC is not None else []),
        *([nvshmem(NVCC, NVSHMEM)] if NVCC is not None and NVSHMEM is not None else []),
    ],
    cmdclass={"build_ext": BuildExt},
)
