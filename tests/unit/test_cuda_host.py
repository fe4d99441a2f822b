"""The host's side of the CUDA engine that needs no device: errors, the exchange of files, the choice of a way."""

from __future__ import annotations

import os
import threading

import pytest
import torch

import moebius
from moebius import AllToAll, Config, ConfigError, CudaError, NativeNotBuiltError, PeerAccessError, engines, native
from moebius.cuda import files, peers
from moebius.cuda.peers import About
from moebius.faults import error_of
from tests.helpers import gpu, simt

CONFIG = Config(num_experts=4, num_topk=2, hidden=16, max_num_tokens=4)


@pytest.mark.skipif(gpu.why_not() is None, reason="there is a GPU")
def test_without_a_device_the_error_says_what_is_missing() -> None:
    (group,) = moebius.virtual_ranks(1)
    with pytest.raises((CudaError, NativeNotBuiltError, ConfigError), match=r"driver|GPU|make ext|cannot use CUDA"):
        AllToAll(group, CONFIG, "cuda")


@pytest.mark.parametrize("device", ["meta", "no such", 1.5, "mps"])
def test_a_device_that_no_engine_runs_on(device: object) -> None:
    with pytest.raises(ConfigError, match="device"):
        AllToAll(moebius.virtual_ranks(1)[0], CONFIG, device)  # type: ignore[arg-type]


def test_num_sms_is_of_cuda() -> None:
    with pytest.raises(ConfigError, match="num_sms"):
        AllToAll(moebius.virtual_ranks(1)[0], CONFIG, "cpu", num_sms=3)


def test_the_default_device_is_the_cpu_until_it_is_set() -> None:
    assert engines.resolve(None) == torch.device("cpu")
    with AllToAll(moebius.virtual_ranks(1)[0], CONFIG) as a2a:
        assert (a2a.engine, a2a.device) == ("cpu", torch.device("cpu"))
        a2a.check()
        a2a.synchronize()


def test_files_go_to_every_peer_and_to_nobody_else() -> None:
    read, write = os.pipe()
    got: list[int] = []
    with files.FileServer() as server:
        assert server.address.startswith(b"\0")
        server.give(write, 3)
        peers_of_it = [threading.Thread(target=lambda: got.append(files.fetch(server.address))) for _ in range(3)]
        for peer in peers_of_it:
            peer.start()
        for peer in peers_of_it:
            peer.join()
    assert len({*got, write}) == 4
    for number, fd in enumerate(got):
        os.write(fd, bytes([number]))
        os.close(fd)
    os.close(write)
    assert os.read(read, 10) == bytes(range(3))
    os.close(read)
    with pytest.raises(OSError):  # noqa: PT011  # whichever the kernel gives for a socket that is gone
        files.fetch(server.address)


def test_a_server_that_nobody_asks_ends() -> None:
    read, write = os.pipe()
    with files.FileServer() as server:
        server.give(write, 1)
    os.close(read)
    os.close(write)


def about(host: str = "a", ways: tuple[str, ...] = ("vmm", "ipc")) -> About:
    return About("config", host, "cuda:0, some GPU", "uuid", frozenset(ways), b"", "")


@pytest.mark.parametrize(
    ("ranks", "ways"),
    [
        ([about(), about()], ["vmm", "ipc"]),
        ([about(), about(ways=("ipc",))], ["ipc"]),
        ([about(ways=("vmm", "ipc", "fabric"))] * 2, ["vmm", "ipc"]),
        ([about(ways=("vmm", "ipc", "fabric")), about("b", ("ipc", "fabric"))], ["fabric"]),
    ],
)
def test_the_way_is_one_that_every_rank_has(ranks: list[About], ways: list[str]) -> None:
    assert peers.possible_ways(ranks) == ways


def test_hosts_without_a_fabric_are_named() -> None:
    with pytest.raises(PeerAccessError, match=r"ranks 0 \(cuda:0.*and 2 \(cuda:0.*different hosts"):
        peers.possible_ways([about(), about(), about("b", ("vmm", "ipc", "fabric"))])


def test_a_cuda_error_keeps_the_call_and_its_code() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(CudaError("cudaMalloc", 2, "cudaMalloc: out of memory")))
    assert (error.call, error.code, str(error)) == ("cudaMalloc", 2, "cudaMalloc: out of memory")


def test_a_stale_half_is_a_state_error() -> None:
    fault = {"kind": 4, "epoch": 7, "rank": 0, "expected": 7, "observed": 12}
    assert isinstance(error_of(fault, "combine", "send", 4), moebius.StateError)


@pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))
def test_both_makes_of_the_engine_fit_in_a_process() -> None:
    native.core()
    try:
        built = native.cuda()
    except NativeNotBuiltError as error:
        pytest.skip(str(error))
    emulated = simt.extension()
    assert built.Engine is not emulated.Engine
    assert emulated.num_devices() == 1
