"""The only importer of the compiled extensions; says how to build what is missing."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

from . import env
from .errors import ConfigError, NativeNotBuiltError


def core() -> Any:
    """The extension with the layout, shared memory and the CPU engine; `_core.pyi` types what is in it.

    Raises:
        NativeNotBuiltError: it is not there, or does not load.
    """
    try:
        from . import _core
    except ImportError as error:
        raise NativeNotBuiltError(
            f"moebius._core cannot be loaded ({error}); build it with `pip install .`, "
            "or with `make ext` in a checkout (needs g++ and Python's headers)"
        ) from error
    return _core


def cuda() -> Any:
    """The extension with the CUDA engine; `_cuda.pyi` types what is in it. It loads where there is no GPU.

    Raises:
        NativeNotBuiltError: it is not there, or does not load.
    """
    try:
        from . import _cuda
    except ImportError as error:
        raise NativeNotBuiltError(
            f"moebius._cuda cannot be loaded ({error}); it is built where nvcc is on PATH, by `pip install .` or, in a "
            "checkout, `make ext`"
        ) from error
    return _cuda


def nvshmem() -> Any:
    """The extension with the CUDA engine over NVSHMEM; `_nvshmem.pyi` types what it has beside that of `_cuda.pyi`.

    NVSHMEM's host library, which another package brings, is loaded before it, for the whole process. Both load where
    there is no GPU.

    Raises:
        NativeNotBuiltError: one of them is not there, or does not load; says which.
    """
    try:
        ctypes.CDLL(str(_nvshmem_library()), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise NativeNotBuiltError(
            f"NVSHMEM's host library cannot be loaded ({error}); install it anew: pip install --force-reinstall "
            "'moebius[nvshmem-cu13]' (or -cu12, as torch's CUDA)"
        ) from error
    try:
        from . import _nvshmem
    except ImportError as error:
        raise NativeNotBuiltError(
            f"moebius._nvshmem cannot be loaded ({error}); it is built where nvcc and the package nvidia-nvshmem-cu13 "
            "(or -cu12) are, by `pip install --no-build-isolation .` or, in a checkout, `make ext`"
        ) from error
    return _nvshmem


def _nvshmem_library() -> Path:
    home = env.nvshmem_home()
    folders = [Path(home)] if home else []
    folders += [Path(entry) / "nvidia" / "nvshmem" for entry in sys.path if entry]
    for folder in folders:
        library = folder / "lib" / "libnvshmem_host.so.3"
        if library.exists():
            return library
    raise NativeNotBuiltError(
        "NVSHMEM's host library (libnvshmem_host.so.3) is not here: pip install 'moebius[nvshmem-cu13]' (or -cu12, as "
        "torch's CUDA), or set NVSHMEM_HOME"
    )


def simd_level() -> str:
    """The SIMD level that the CPU engine runs at: what `MOEBIUS_SIMD` asks for, else the widest there is.

    Raises:
        ConfigError: the processor lacks the level that is asked for.
        NativeNotBuiltError: the extension is missing.
    """
    levels: list[str] = core().simd_levels()
    wanted = env.simd()
    if wanted is not None and wanted not in levels:
        raise ConfigError(f"`MOEBIUS_SIMD` must be one of {', '.join(levels)} on this processor (got {wanted!r})")
    return wanted or levels[0]
