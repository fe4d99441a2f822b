"""NVSHMEM's extension as the Python side sees it, between threads that stand for processes."""

from __future__ import annotations

from typing import Any

from moebius.errors import CudaError


class FakeNvshmem:
    """One rank's extension. Addresses are the numbers of allocations; `far` ranks have none here.

    Attributes:
        calls: names of what was called, in order.
    """

    def __init__(self, *, num_devices: int = 1, far: frozenset[int] = frozenset(), room: int = 1 << 24) -> None:
        self.calls: list[str] = []
        self.far = far
        self.built: tuple[int, int, int] = (3, 4, 5)
        self.loaded: tuple[int, int, int] = (3, 4, 5)
        self.keeps_order = True
        self.live: dict[int, int] = {}
        self._num_devices = num_devices
        self._room = room
        self._next = 0x1000

    def _call(self, name: str) -> None:
        assert self._num_devices, f"{name} would end the process: there is no GPU"
        self.calls.append(name)

    def num_devices(self) -> int:
        if not self._num_devices:
            raise CudaError("cudaGetDeviceCount", 35, "no NVIDIA driver here (libcuda.so.1)")
        return self._num_devices

    def version_built(self) -> tuple[int, int, int]:
        return self.built

    def version_loaded(self) -> tuple[int, int, int]:
        return self.loaded

    def make_unique_id(self) -> bytes:
        self._call("make_unique_id")
        return b"unique"

    def init(self, rank: int, num_ranks: int, unique_id: bytes) -> None:
        assert 0 <= rank < num_ranks
        assert unique_id == b"unique"
        self._call("init")

    def allocate(self, num_bytes: int) -> int:
        self._call("allocate")
        if sum(self.live.values()) + num_bytes > self._room:
            raise CudaError("nvshmem_align", 2, "no bytes left in the symmetric heap: raise NVSHMEM_SYMMETRIC_SIZE")
        self._next += 0x1000
        self.live[self._next] = num_bytes
        return self._next

    def release(self, address: int) -> None:
        self._call("release")
        del self.live[address]

    def zero(self, address: int, num_bytes: int) -> None:
        assert self.live[address] == num_bytes
        self._call("zero")

    def peer(self, address: int, rank: int) -> int:
        assert address in self.live
        return 0 if rank in self.far else address + (rank << 32)

    def quiet(self) -> None:
        self._call("quiet")

    def finalize(self) -> None:
        self._call("finalize")

    def keeps_network_order(self) -> bool:
        return self.keeps_order

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the extension has no {name}")
