"""Device memory that other processes can map: made here, told of in bytes or as a file, and mapped there.

Three ways, in the order in which they are tried: "vmm" (`cuMemCreate`, a file descriptor), "ipc" (`cuIpcGetMemHandle`),
and, between hosts that share an NVLink domain, "fabric" (`cuMemCreate`, 64 bytes). Memory of "vmm" and "fabric" lives
as long as somebody has mapped it; of "ipc" until its owner closes, so there ranks should close together. The calling
thread's current device is the rank's.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from moebius.errors import CudaError

from . import driver

HANDLE_BYTES = 64  # of an IPC or a fabric handle (cuda.h)


@dataclasses.dataclass
class Mapped:
    """Memory of one rank as this one addresses it."""

    address: int
    num_bytes: int
    how: str
    is_mine: bool

    def close(self) -> None:
        """Unmap it, and free it if it is this rank's."""
        if self.how == "ipc":
            driver.call("cuMemFree" if self.is_mine else "cuIpcCloseMemHandle", self.address)
            return
        driver.call("cuMemUnmap", self.address, self.num_bytes)
        driver.call("cuMemAddressFree", self.address, self.num_bytes)


@dataclasses.dataclass
class Made:
    """This rank's memory, and what peers map it by.

    Attributes:
        mapped: here.
        content: bytes of the handle; empty where it is a file.
        fd: the file, -1 where there is none.
    """

    mapped: Mapped
    content: bytes = b""
    fd: int = -1

    def close_fd(self) -> None:
        """Let go of the file: all peers have mapped the memory, or none will."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def ways(ordinal: int) -> set[str]:
    """How memory of the device can travel to another process."""
    has_vmm = driver.attribute(ordinal, "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")
    found = {"ipc"}
    if has_vmm and driver.attribute(ordinal, "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED"):
        found.add("vmm")
    if has_vmm and driver.attribute(ordinal, "HANDLE_TYPE_FABRIC_SUPPORTED"):
        found.add("fabric")
    return found


def make(how: str, ordinal: int, num_bytes: int) -> Made:
    """Zeroed memory on the device.

    Raises:
        CudaError: there is not enough, or it cannot be shared so.
    """
    if how == "ipc":
        address = int(driver.call("cuMemAlloc", num_bytes))
        made = Made(Mapped(address, num_bytes, how, is_mine=True))
        try:
            handle = driver.call("cuIpcGetMemHandle", address)
            made.content = driver.bytes_of(handle, HANDLE_BYTES)
        except CudaError:
            made.mapped.close()
            raise
    else:
        made = _make_vmm(how, ordinal, num_bytes)
    driver.call("cuMemsetD8", made.mapped.address, 0, num_bytes)
    driver.call("cuCtxSynchronize")
    return made


def open_peer(how: str, ordinal: int, num_bytes: int, content: bytes, fd: int) -> Mapped:
    """Map a peer's memory, of `num_bytes` as it was made, for this rank's device.

    Raises:
        CudaError: the device cannot reach it, or the driver does not give it away.
    """
    api = driver.api()
    if how == "ipc":
        flags = api.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
        handle = driver.fill(api.CUipcMemHandle(), content)
        address = int(driver.call("cuIpcOpenMemHandle", handle, flags))
        return Mapped(address, num_bytes, how, is_mine=False)
    handle = driver.fill(api.CUmemFabricHandle(), content)
    told = fd if how == "vmm" else int(handle.getPtr())  # cuda-bindings takes the address of what is no number
    allocation = driver.call("cuMemImportFromShareableHandle", told, _handle_type(how))
    return _map(allocation, how, ordinal, _rounded(how, ordinal, num_bytes), is_mine=False)


def _make_vmm(how: str, ordinal: int, num_bytes: int) -> Made:
    size = _rounded(how, ordinal, num_bytes)
    allocation = driver.call("cuMemCreate", size, _properties(how, ordinal), 0)
    try:
        exported = driver.call("cuMemExportToShareableHandle", allocation, _handle_type(how), 0)
    except CudaError:
        driver.call("cuMemRelease", allocation)
        raise
    made = Made(_map(allocation, how, ordinal, size, is_mine=True))
    if how == "vmm":
        made.fd = int(exported)
    else:
        made.content = exported if isinstance(exported, bytes) else driver.bytes_of(exported, HANDLE_BYTES)
    return made


def _map(allocation: Any, how: str, ordinal: int, size: int, *, is_mine: bool) -> Mapped:
    """Map an allocation, and drop the handle: the mapping keeps the memory."""
    api = driver.api()
    address = 0
    try:
        address = int(driver.call("cuMemAddressReserve", size, 0, 0, 0))
        driver.call("cuMemMap", address, size, 0, allocation, 0)
        try:
            access = api.CUmemAccessDesc()
            access.location = _properties(how, ordinal).location
            access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            driver.call("cuMemSetAccess", address, size, [access], 1)
        except CudaError:
            driver.call("cuMemUnmap", address, size)
            raise
    except CudaError:
        if address:
            driver.call("cuMemAddressFree", address, size)
        raise
    finally:
        driver.call("cuMemRelease", allocation)
    return Mapped(address, size, how, is_mine)


def _rounded(how: str, ordinal: int, num_bytes: int) -> int:
    recommended = driver.api().CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
    unit = int(driver.call("cuMemGetAllocationGranularity", _properties(how, ordinal), recommended))
    return -(-num_bytes // unit) * unit


def _handle_type(how: str) -> Any:
    types = driver.api().CUmemAllocationHandleType
    return types.CU_MEM_HANDLE_TYPE_FABRIC if how == "fabric" else types.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR


def _properties(how: str, ordinal: int) -> Any:
    api = driver.api()
    properties = api.CUmemAllocationProp()
    properties.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = ordinal
    properties.requestedHandleTypes = _handle_type(how)
    return properties
