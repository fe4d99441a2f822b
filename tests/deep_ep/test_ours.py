"""What only moebius.deep_ep promises: typed errors, installation, virtual ranks in one thread."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

import moebius
from moebius import deep_ep, errors
from tests.deep_ep.oracle import check_combine, check_dispatch, expert_outputs, make_load
from tests.deep_ep.seat import HIDDEN, MAX_TOKENS, Seat

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("only_ours")


def seats(num_ranks: int) -> list[Seat]:
    return [
        Seat(deep_ep, group, rank, num_ranks, torch.device("cpu"), is_ours=True)
        for rank, group in enumerate(moebius.virtual_ranks(num_ranks))
    ]


@pytest.fixture
def seat() -> Iterator[Seat]:
    """A world of one rank, where every call completes by itself."""
    alone = seats(1)[0]
    yield alone
    alone.buffer().destroy()


def send(seat: Seat, load: Any, **options: Any) -> Any:
    return seat.buffer().low_latency_dispatch(
        load.x[seat.rank], load.topk_ids[seat.rank], MAX_TOKENS, seat.num_experts, **{"use_fp8": False} | options
    )


def test_one_thread_drives_all_ranks_by_hooks() -> None:
    world = seats(4)
    for seed in range(3):
        load = make_load(world[0], seed=seed)
        results = [send(seat, load, return_recv_hook=True) for seat in world]
        for seat, result in zip(world, results, strict=True):
            result[4]()
            check_dispatch(seat, load, result)
        answers = [
            seat.buffer().low_latency_combine(
                expert_outputs(seat, result),
                load.topk_ids[seat.rank],
                load.topk_weights[seat.rank],
                result[2],
                return_recv_hook=True,
            )
            for seat, result in zip(world, results, strict=True)
        ]
        for seat, (combined, _, hook) in zip(world, answers, strict=True):
            hook()
            check_combine(seat, load, combined)


@pytest.mark.parametrize(
    ("keyword", "dialect"),
    [("use_nvfp4", "NVFP4"), ("overlap", "overlap"), ("do_expand", "V2"), ("use_ue8m0_for_sf", "hybrid"), ("typo", "")],
)
def test_unknown_keyword_of_a_call(seat: Seat, keyword: str, dialect: str) -> None:
    load = make_load(seat)
    with pytest.raises(errors.UnknownKeywordError, match="supported: x, topk_idx, num_max_dispatch") as raised:
        send(seat, load, **{keyword: True})
    assert f"`{keyword}`" in str(raised.value)
    assert dialect in str(raised.value)
    assert isinstance(raised.value, TypeError)
    with pytest.raises(errors.UnknownKeywordError, match="supported: x, topk_idx, topk_weights, handle"):
        seat.buffer().low_latency_combine(load.x[0], load.topk_ids[0], load.topk_weights[0], (), **{keyword: True})


def test_unknown_keyword_of_the_constructor() -> None:
    with pytest.raises(errors.UnknownKeywordError, match="supported: group, num_nvl_bytes"):
        deep_ep.Buffer(moebius.virtual_ranks(1)[0], num_bytes=1)  # type: ignore[call-arg]


def test_wrong_groups() -> None:
    with pytest.raises(errors.UnsupportedError, match="mpi4py"):
        deep_ep.Buffer(None, comm=object())
    with pytest.raises(errors.ConfigError, match="`group`"):
        deep_ep.Buffer("group")


@pytest.mark.parametrize("name", ["get_dispatch_layout", "dispatch", "combine", "internode_dispatch"])
def test_normal_mode_says_what_is_covered(seat: Seat, name: str) -> None:
    with pytest.raises(errors.UnsupportedError, match="low_latency_dispatch"):
        getattr(seat.buffer(), name)(torch.zeros(1), topk_idx=None)


def test_exclusive_flags(seat: Seat) -> None:
    load = make_load(seat)
    with pytest.raises(errors.ConfigError, match="async_finish"):
        send(seat, load, async_finish=True, return_recv_hook=True)
    with pytest.raises(errors.ConfigError, match="round_scale"):
        send(seat, load, use_fp8=True, use_ue8m0=True)
    result = send(seat, load)
    outputs = expert_outputs(seat, result)
    arguments = (outputs, load.topk_ids[0], load.topk_weights[0], result[2])
    with pytest.raises(errors.ConfigError, match="use_logfmt"):
        seat.buffer().low_latency_combine(*arguments, use_logfmt=True, zero_copy=True)
    with pytest.raises(errors.ConfigError, match="async_finish"):
        seat.buffer().low_latency_combine(*arguments, async_finish=True, return_recv_hook=True)
    with pytest.raises(errors.StateError, match="get_next_low_latency_combine_buffer"):
        seat.buffer().low_latency_combine(*arguments, zero_copy=True)
    check_combine(seat, load, seat.buffer().low_latency_combine(*arguments)[0])


def test_wrong_tensors(seat: Seat) -> None:
    load = make_load(seat)
    x, ids, weights = load.x[0], load.topk_ids[0], load.topk_weights[0]
    dispatch = seat.buffer().low_latency_dispatch
    for wrong_x, wrong_ids in ((x.float(), ids), (x[0], ids), (x, ids[:-1]), (x, ids.float()), (x, ids[0])):
        with pytest.raises(errors.ShapeError):
            dispatch(wrong_x, wrong_ids, MAX_TOKENS, seat.num_experts)
    with pytest.raises(errors.ShapeError):
        dispatch(x, ids, 4, seat.num_experts)  # more tokens than that
    for wrong in (-2, seat.num_experts):
        with pytest.raises(errors.RoutingError):
            dispatch(x, ids.clone().fill_(wrong), MAX_TOKENS, seat.num_experts)
    result = send(seat, load)
    outputs = expert_outputs(seat, result)
    combine = seat.buffer().low_latency_combine
    for arguments in (
        (outputs.float(), ids, weights),
        (outputs[:, :-1], ids, weights),
        (outputs, ids[:, :-1], weights),
        (outputs, ids, weights.double()),
        (outputs, ids, weights[:-1]),
    ):
        with pytest.raises(errors.ShapeError):
            combine(*arguments, result[2])
    with pytest.raises(errors.ShapeError):
        combine(outputs, ids, weights, result[2], out=torch.empty_like(x)[:-1])
    with pytest.raises(errors.RoutingError, match="named at dispatch"):
        combine(outputs, (ids + 1) % seat.num_experts, weights, result[2])
    check_combine(seat, load, combine(outputs, ids, weights, result[2])[0])
    exchange = next(iter(seat.buffer()._low_latency.exchanges._by_shape.values()))
    begun = exchange.epoch
    for options in ({"out": x[:-1]}, {"combine_wait_recv_cost_stats": torch.zeros(1)}, {"topk_weights": weights[1:]}):
        with pytest.raises(errors.ShapeError):
            combine(**{"x": outputs, "topk_idx": ids, "topk_weights": weights, "handle": result[2]} | options)
    assert exchange.epoch == begun, "a handle is not sent again for a call that is rejected"


def test_handles_of_others(seat: Seat) -> None:
    load = make_load(seat)
    src_info, *rest = send(seat, load)[2]
    outputs = torch.zeros((seat.num_local_experts, seat.num_rows, HIDDEN), dtype=torch.bfloat16)
    for handle in ((src_info.clone(), *rest), (), None, (src_info,)):
        with pytest.raises(errors.StateError, match="handle"):
            seat.buffer().low_latency_combine(outputs, load.topk_ids[0], load.topk_weights[0], handle)


def test_combine_before_the_hook(seat: Seat) -> None:
    load = make_load(seat)
    result = send(seat, load, return_recv_hook=True)
    outputs = torch.zeros((seat.num_local_experts, seat.num_rows, HIDDEN), dtype=torch.bfloat16)
    with pytest.raises(errors.StateError, match="hook"):
        seat.buffer().low_latency_combine(outputs, load.topk_ids[0], load.topk_weights[0], result[2])
    result[4]()
    check_dispatch(seat, load, result)


def test_a_third_send_before_the_first_receive(seat: Seat) -> None:
    load = make_load(seat)
    pending = [send(seat, load, return_recv_hook=True) for _ in range(2)]
    with pytest.raises(errors.StateError):
        send(seat, load, return_recv_hook=True)
    for result in pending:
        result[4]()
        check_dispatch(seat, load, result)
    check_dispatch(seat, load, send(seat, load))


def test_handles_are_forgotten(seat: Seat) -> None:
    load = make_load(seat)
    for _ in range(5):
        send(seat, load)
    assert len(seat.buffer()._low_latency.handles._by_src_info) <= 1


def test_duplicates_appear_once(seat: Seat) -> None:
    load = make_load(seat, "duplicates")
    result = send(seat, load)
    expected = [int((load.topk_ids[0] == expert).any(1).sum()) for expert in range(seat.num_local_experts)]
    assert result[1].tolist() == expected


def test_prepare_builds_for_the_shapes_last_asked() -> None:
    world = seats(2)
    for seat in world:
        seat.buffer().prepare(4, use_fp8=False)
    load = make_load(world[0])
    results = [send(seat, load, return_recv_hook=True) for seat in world]
    for seat, result in zip(world, results, strict=True):
        assert len(seat.buffer()._low_latency.exchanges._by_shape) == 1
        result[4]()
        check_dispatch(seat, load, result)


def test_destroyed(seat: Seat) -> None:
    buffer = seat.new_buffer()
    assert buffer.runtime.is_available()
    buffer.destroy()
    buffer.destroy()
    assert not buffer.runtime.is_available()
    load = make_load(seat)
    with pytest.raises(errors.StateError, match="destroyed"):
        buffer.low_latency_dispatch(load.x[0], load.topk_ids[0], MAX_TOKENS, seat.num_experts)


def test_needs_low_latency_mode() -> None:
    buffer = deep_ep.Buffer(moebius.virtual_ranks(1)[0])
    with pytest.raises(errors.StateError, match="low_latency_mode"):
        buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, 8)


def test_attributes() -> None:
    buffer = deep_ep.Buffer(moebius.virtual_ranks(3)[2], 16, 64, low_latency_mode=True)
    assert (buffer.rank, buffer.group_size, buffer.low_latency_mode) == (2, 3, True)
    assert buffer.runtime.get_num_rdma_ranks() == 3
    buffer.get_comm_stream()
    scratch = buffer.get_local_buffer_tensor(torch.int32, torch.Size((2, 4)), use_rdma_buffer=True)
    assert (scratch.shape, scratch.dtype) == ((2, 4), torch.int32)
    assert buffer.get_local_buffer_tensor(torch.int64, offset=8).numel() == 1
    with pytest.raises(errors.ShapeError):
        buffer.get_local_buffer_tensor(torch.int32, torch.Size((17,)), use_rdma_buffer=True)


def test_a_rank_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_ep.Buffer, "timeout_s", 0.2)
    world = seats(2)
    here, there = (seat.new_buffer(enable_shrink=True) for seat in world)
    load = make_load(world[0])
    for buffer in (here, there):  # both build; the second then stays away
        buffer.prepare(4, use_fp8=False)
    with pytest.raises(errors.PeerTimeoutError) as raised:
        here.low_latency_dispatch(load.x[0], load.topk_ids[0], MAX_TOKENS, world[0].num_experts, use_fp8=False)
    assert (raised.value.rank, raised.value.op) == (1, "dispatch")
    status = torch.zeros(2, dtype=torch.int32)
    here.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0, 1]

    # What was routed there is lost, the rest comes back.
    result = here.low_latency_dispatch(
        load.x[0], load.topk_ids[0], MAX_TOKENS, world[0].num_experts, use_fp8=False, return_recv_hook=True
    )
    result[4]()
    combined = here.low_latency_combine(
        expert_outputs(world[0], result), load.topk_ids[0], load.topk_weights[0], result[2]
    )[0]
    load.topk_ids[0][load.topk_ids[0] >= world[0].num_local_experts] = -1
    check_combine(world[0], load, combined)
    here.low_latency_clean_mask_buffer()
    here.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0, 0]


def test_masks_need_enable_shrink(seat: Seat) -> None:
    status = torch.zeros(1, dtype=torch.int32)
    for name, arguments in (("query", (status,)), ("update", (0, True)), ("clean", ())):
        with pytest.raises(errors.StateError, match="enable_shrink"):
            getattr(seat.buffer(), f"low_latency_{name}_mask_buffer")(*arguments)


def test_size_hint_is_a_fraction_of_upstreams() -> None:
    assert deep_ep.Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256) < 0.1 * 1.9e9
    with pytest.raises(errors.ConfigError):
        deep_ep.Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 255)


def test_num_sms_must_be_even() -> None:
    with pytest.raises(errors.ConfigError, match="even"):
        deep_ep.Buffer.set_num_sms(3)


@pytest.fixture
def clean_modules() -> Iterator[None]:
    names = ("deep_ep", "deep_ep.buffer", "deep_ep.utils")
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield
    deep_ep.uninstall()
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(before)


@pytest.mark.usefixtures("clean_modules")
def test_install() -> None:
    deep_ep.install()
    deep_ep.install()
    module: Any = __import__("deep_ep")
    assert module is deep_ep
    utils: Any = __import__("deep_ep.utils", fromlist=["EventOverlap"])
    assert utils.EventOverlap is deep_ep.EventOverlap
    buffer: Any = __import__("deep_ep.buffer", fromlist=["Buffer"])
    assert buffer.Buffer is deep_ep.Buffer
    from importlib.util import find_spec

    assert find_spec("deep_ep") is not None  # how vLLM asks whether it is there
    deep_ep.uninstall()
    assert "deep_ep" not in sys.modules
    deep_ep.uninstall()


@pytest.mark.usefixtures("clean_modules")
def test_install_beside_a_real_one() -> None:
    real, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    real.__file__ = "/somewhere/deep_ep/__init__.py"
    sys.modules["deep_ep"], sys.modules["deep_ep.utils"] = real, utils
    with pytest.raises(errors.StateError, match="/somewhere/deep_ep"):
        deep_ep.install()
    assert sys.modules["deep_ep"] is real
    deep_ep.install(force=True)
    assert sys.modules["deep_ep"] is deep_ep
    deep_ep.uninstall()
    assert sys.modules["deep_ep"] is real
    assert sys.modules["deep_ep.utils"] is utils
