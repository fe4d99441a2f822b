"""Calls of the CUDA driver through cuda-bindings, which is imported here and only when needed."""

from __future__ import annotations

import ctypes
from typing import Any

from moebius.errors import CudaError, NativeNotBuiltError


def api() -> Any:
    """The driver's functions.

    Raises:
        NativeNotBuiltError: cuda-bindings is not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise NativeNotBuiltError(
            f"ranks in several processes need cuda-bindings ({error}): pip install 'moebius[cuda]'"
        ) from error
    return driver


def call(name: str, *arguments: Any) -> Any:
    """Call the function and return what it gives beside its result: nothing, one value, or a tuple.

    Raises:
        CudaError: it failed.
        NativeNotBuiltError: cuda-bindings is not installed.
    """
    driver = api()
    error, *values = getattr(driver, name)(*arguments)
    if int(error) != 0:
        told, text = driver.cuGetErrorString(error)
        words = text.decode() if int(told) == 0 and text else f"error {int(error)}"
        raise CudaError(name, int(error), f"{name}: {words}")
    return values[0] if len(values) == 1 else tuple(values) or None


def attribute(device: int, name: str) -> int:
    """An attribute of a device; 0 where the driver, or cuda-bindings, does not know it."""
    which = getattr(api().CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}", None)
    if which is None:
        return 0
    try:
        return int(call("cuDeviceGetAttribute", which, device))
    except CudaError:
        return 0


def bytes_of(struct: Any, num_bytes: int) -> bytes:
    """What is in a structure of the driver's. Its fields have other names from version to version."""
    return ctypes.string_at(int(struct.getPtr()), num_bytes)


def fill(struct: Any, content: bytes) -> Any:
    """The structure, filled."""
    ctypes.memmove(int(struct.getPtr()), content, len(content))
    return struct
