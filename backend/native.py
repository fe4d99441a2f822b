"""The only importer of the compiled extensions; says how to build what is missing."""

from __future__ import annotations

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
