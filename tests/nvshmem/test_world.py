"""Who may meet in NVSHMEM's world, what is said to the others, and whose memory is used again; over a fake of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

import moebius
from moebius import AllToAll, Config, ConfigError, CudaError, PeerAccessError, heap, native
from moebius.arguments import Place
from moebius.cuda import engine
from moebius.errors import NativeNotBuiltError, StateError, VersionError
from moebius.nvshmem import memory, world
from tests.nvshmem.fake import FakeNvshmem

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = torch.device("cuda", 0)
CONFIG = Config(num_experts=4, num_topk=2, hidden=1024, max_num_tokens=16)


class Group:
    """A process group of two as seen by rank 0; the other answers what `other` makes of rank 0's words."""

    def __init__(self) -> None:
        self.members = [0, 1]
        self.other: Callable[[Any], Any] = lambda value: value

    def gather(self, _: Any, value: Any) -> list[Any]:
        return [value, self.other(value)]


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    made = Group()
    monkeypatch.setattr(world, "_world", None)
    monkeypatch.setattr(world, "_finalize_at_exit", lambda *_: None)
    monkeypatch.setattr(heap, "gather", made.gather)
    monkeypatch.setattr(heap, "rank_and_size", lambda group: (0, 2))
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: group.members)
    # What torch would ask a driver for.
    monkeypatch.setattr(torch.cuda, "device", torch.device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda *sizes, **more: None)
    return made


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvshmem:
    return install(monkeypatch, FakeNvshmem())


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeNvshmem) -> FakeNvshmem:
    def of_device(device: torch.device, extension: Any = None) -> engine.Machine:
        extension.num_devices()
        return engine.Machine(extension, device, device.index, Place(), lambda: 0)

    monkeypatch.setattr(native, "nvshmem", lambda: fake)
    monkeypatch.setattr(engine.Machine, "of_device", of_device)
    return fake


def test_it_is_initialised_once(group: Any, fake: FakeNvshmem) -> None:
    first = world.join(group, DEVICE)
    assert world.join(group, DEVICE) is first
    assert fake.calls == ["make_unique_id", "init", "allocate"]
    assert not first.has_remote


def test_without_a_gpu_nothing_of_it_is_called(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, FakeNvshmem(num_devices=0))
    with pytest.raises(CudaError, match="no NVIDIA driver"):
        world.join(group, DEVICE)
    assert fake.calls == []


def test_a_rank_that_cannot_is_named_by_the_others(group: Any, fake: FakeNvshmem) -> None:
    group.other = lambda told: told._replace(error="no NVIDIA driver here")
    with pytest.raises(PeerAccessError, match="rank 1 cannot use NVSHMEM: no NVIDIA driver here"):
        world.join(group, DEVICE)
    assert "init" not in fake.calls


@pytest.mark.parametrize("loaded", [(3, 4, 4), (4, 0, 0), (2, 11, 0)])
def test_another_generation_or_an_older_library_is_refused(
    group: Any, fake: FakeNvshmem, loaded: tuple[int, int, int]
) -> None:
    fake.loaded = loaded
    with pytest.raises(VersionError, match=r"built against NVSHMEM 3\.4\.5"):
        world.join(group, DEVICE)
    assert "init" not in fake.calls


def test_a_later_library_will_do(group: Any, fake: FakeNvshmem) -> None:
    fake.loaded = (3, 8, 0)
    world.join(group, DEVICE)


def test_ranks_with_different_libraries_are_refused(group: Any, fake: FakeNvshmem) -> None:
    group.other = lambda told: told._replace(version=(3, 8, 0))
    with pytest.raises(VersionError, match=r"rank 0 has 3\.4\.5 \(rank 1 got 3\.8\.0\)"):
        world.join(group, DEVICE)


def test_another_group_or_device_is_refused(group: Any, fake: FakeNvshmem) -> None:
    world.join(group, DEVICE)
    group.members = [1, 0]
    with pytest.raises(ConfigError, match="NVSHMEM was initialised among them"):
        world.join(group, DEVICE)
    group.members = [0, 1]
    with pytest.raises(ConfigError, match="where NVSHMEM was initialised"):
        world.join(group, torch.device("cuda", 1))


def test_a_process_that_was_restarted_is_noticed(group: Any, fake: FakeNvshmem) -> None:
    world.join(group, DEVICE)
    group.other = lambda told: told._replace(has_world=False)
    with pytest.raises(StateError, match="start all processes anew"):
        world.join(group, DEVICE)


def test_virtual_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="virtual ranks"):
        world.join(moebius.virtual_ranks(1)[0], DEVICE)


def test_remote_ranks_have_an_outbox_and_no_address(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvshmem(far=frozenset({1})))
    _, far = memory.allocate(group, CONFIG, DEVICE)
    assert far.addresses[0] != 0
    assert far.addresses[1] == 0
    monkeypatch.setattr(world, "_world", None)
    install(monkeypatch, FakeNvshmem())
    _, near = memory.allocate(group, CONFIG, DEVICE)
    assert all(near.addresses)
    assert near.num_bytes < far.num_bytes
    near.close()
    _, forced = memory.allocate(group, CONFIG, DEVICE, frozenset({1}))
    assert (forced.addresses[1], forced.num_bytes) == (0, far.num_bytes)


def test_a_gpu_that_reorders_what_the_network_writes_is_refused(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, FakeNvshmem(far=frozenset({1})))
    fake.keeps_order = False
    with pytest.raises(PeerAccessError, match="does not keep the order"):
        world.join(group, DEVICE)


def test_memory_is_used_again_or_freed_by_all_together(group: Any, fake: FakeNvshmem) -> None:
    for _ in range(20):
        _, made = memory.allocate(group, CONFIG, DEVICE)
        made.close()
    assert fake.calls.count("allocate") == 2  # that which tells who is in reach, and one heap
    assert fake.calls.count("zero") == 20
    larger = Config(num_experts=4, num_topk=2, hidden=2048, max_num_tokens=16)
    _, made = memory.allocate(group, larger, DEVICE)
    assert len(fake.live) == 1, "what nobody uses is freed before more is taken"


def test_memory_that_another_rank_still_uses_is_left_alone(group: Any, fake: FakeNvshmem) -> None:
    _, made = memory.allocate(group, CONFIG, DEVICE)
    made.close()
    group.other = lambda told: told._replace(free=frozenset()) if isinstance(told, world.Offer) else told
    num_released = fake.calls.count("release")
    _, other = memory.allocate(group, CONFIG, DEVICE)
    assert other.addresses[0] != made.addresses[0]
    assert fake.calls.count("release") == num_released


def test_too_little_memory_is_everybodys_failure(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvshmem(room=8192))
    with pytest.raises(PeerAccessError, match="NVSHMEM_SYMMETRIC_SIZE"):
        memory.allocate(group, CONFIG, DEVICE)


def test_ranks_must_agree_on_their_config(group: Any, fake: FakeNvshmem) -> None:
    group.other = lambda told: told._replace(fingerprint="else") if isinstance(told, world.Offer) else told
    with pytest.raises(ConfigError, match="must agree on their config"):
        memory.allocate(group, CONFIG, DEVICE)


def test_the_transport_is_checked() -> None:
    (rank,) = moebius.virtual_ranks(1)
    with pytest.raises(ConfigError, match="belongs to CUDA devices"):
        AllToAll(rank, CONFIG, "cpu", transport="nvshmem")
    with pytest.raises(ConfigError, match="must be one of auto, direct, nvshmem"):
        AllToAll(rank, CONFIG, "cuda", transport="pigeon")


def test_without_the_host_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delenv("NVSHMEM_HOME", raising=False)
    with pytest.raises(NativeNotBuiltError, match=r"pip install 'moebius\[nvshmem-cu13\]'"):
        native.nvshmem()
    folder = tmp_path / "nvidia" / "nvshmem" / "lib"
    folder.mkdir(parents=True)
    (folder / "libnvshmem_host.so.3").write_bytes(b"no library")
    with pytest.raises(NativeNotBuiltError, match="cannot be loaded"):
        native.nvshmem()
