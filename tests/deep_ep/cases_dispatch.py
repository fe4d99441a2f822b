"""Cases of low_latency_dispatch. Each runs on every rank of a world, which all make the same calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tests.deep_ep.oracle import GROUP, Load, Routing, check_dispatch, make_load
from tests.deep_ep.seat import HIDDEN, MAX_TOKENS

if TYPE_CHECKING:
    from tests.deep_ep.seat import Seat


def dispatch(seat: Seat, load: Load, buffer: Any = None, **options: Any) -> Any:
    buffer = seat.buffer() if buffer is None else buffer
    result = buffer.low_latency_dispatch(
        load.x[seat.rank], load.topk_ids[seat.rank], MAX_TOKENS, seat.num_experts, **{"use_fp8": False} | options
    )
    if not options.get("return_recv_hook"):
        result[3].current_stream_wait() if options.get("async_finish") else None
    return result


def case_bf16_shapes(seat: Seat) -> None:
    load = make_load(seat, seed=1)
    result = dispatch(seat, load)
    assert isinstance(result, tuple)
    received, count, handle, event, hook = result
    assert received.shape == (seat.num_local_experts, seat.num_rows, HIDDEN)
    assert received.dtype == torch.bfloat16
    assert received.is_contiguous()
    assert count.shape == (seat.num_local_experts,)
    assert count.dtype == torch.int32
    assert hook is None
    assert isinstance(event, seat.module.EventOverlap)
    check_dispatch(seat, load, result)
    assert isinstance(handle, tuple)
    src_info, layout_range, max_tokens, hidden, num_experts = handle
    assert src_info.shape == (seat.num_local_experts, seat.num_rows)
    assert src_info.dtype == torch.int32
    assert layout_range.shape == (seat.num_local_experts, seat.num_ranks)
    assert layout_range.dtype == torch.int64
    assert (max_tokens, hidden, num_experts) == (MAX_TOKENS, HIDDEN, seat.num_experts)


def _check_scales(seat: Seat, scales: torch.Tensor, columns: int, dtype: torch.dtype) -> None:
    assert scales.shape == (seat.num_local_experts, seat.num_rows, columns)
    assert scales.dtype == dtype
    assert scales.stride() == (columns * seat.num_rows, 1, seat.num_rows), "scales are stored by column"


def case_fp8(seat: Seat) -> None:
    load = make_load(seat, seed=2)
    result = dispatch(seat, load, use_fp8=True)
    rows, scales = result[0]
    assert rows.dtype == torch.float8_e4m3fn
    assert rows.shape == (seat.num_local_experts, seat.num_rows, HIDDEN)
    assert rows.is_contiguous()
    _check_scales(seat, scales, HIDDEN // GROUP, torch.float32)
    check_dispatch(seat, load, result)


def case_fp8_is_the_default(seat: Seat) -> None:
    load = make_load(seat, seed=3)
    result = seat.buffer().low_latency_dispatch(
        load.x[seat.rank], load.topk_ids[seat.rank], MAX_TOKENS, seat.num_experts
    )
    assert isinstance(result[0], tuple)
    check_dispatch(seat, load, result)


def case_fp8_round_scale(seat: Seat) -> None:
    load = make_load(seat, seed=4)
    result = dispatch(seat, load, use_fp8=True, round_scale=True)
    _, scales = result[0]
    _check_scales(seat, scales, HIDDEN // GROUP, torch.float32)
    check_dispatch(seat, load, result)
    for local_expert, size in enumerate(result[1].tolist()):
        mantissa, _ = torch.frexp(scales[local_expert, :size])
        assert bool((mantissa == 0.5).all()), "a power of two has one bit of mantissa"


def case_fp8_ue8m0(seat: Seat) -> None:
    load = make_load(seat, seed=5)
    packed = dispatch(seat, load, use_fp8=True, round_scale=True, use_ue8m0=True)
    _check_scales(seat, packed[0][1], HIDDEN // GROUP // 4, torch.int32)
    check_dispatch(seat, load, packed)


def case_flags_of_fp8_say_nothing_in_bf16(seat: Seat) -> None:
    load = make_load(seat, seed=6)
    result = dispatch(seat, load, use_fp8=False, round_scale=True, use_ue8m0=True)
    assert isinstance(result[0], torch.Tensor)
    check_dispatch(seat, load, result)


def case_routings(seat: Seat) -> None:
    routings: tuple[Routing, ...] = ("uniform", "holes", "hot", "local", "duplicates", "unrouted")
    for seed, routing in enumerate(routings):
        if routing == "duplicates" and not seat.is_ours:
            continue  # upstream sends such a token twice
        load = make_load(seat, routing, seed=10 + seed)
        check_dispatch(seat, load, dispatch(seat, load))
        check_dispatch(seat, load, dispatch(seat, load, use_fp8=True))


def case_ranks_without_tokens(seat: Seat) -> None:
    for seed, num_tokens in enumerate(
        (
            [0 if rank == 0 else 5 for rank in range(seat.num_ranks)],
            [MAX_TOKENS if rank == 0 else 0 for rank in range(seat.num_ranks)],
            [0] * seat.num_ranks,
            [MAX_TOKENS] * seat.num_ranks,
        )
    ):
        load = make_load(seat, seed=20 + seed, num_tokens=num_tokens)
        result = dispatch(seat, load)
        check_dispatch(seat, load, result)
        if not any(num_tokens):
            assert not result[1].any()


def case_other_topk(seat: Seat) -> None:
    for num_topk in (1, 2, 4):
        load = make_load(seat, seed=30 + num_topk, num_topk=num_topk)
        check_dispatch(seat, load, dispatch(seat, load))


def case_stats_accumulate(seat: Seat) -> None:
    stats = torch.zeros(seat.num_local_experts, dtype=torch.int32, device=seat.device)
    waited = torch.zeros(seat.num_ranks, dtype=torch.int64, device=seat.device)
    total = torch.zeros_like(stats)
    for seed in range(3):
        result = dispatch(
            seat,
            make_load(seat, seed=40 + seed),
            cumulative_local_expert_recv_stats=stats,
            dispatch_wait_recv_cost_stats=waited,
        )
        total += result[1]
        assert torch.equal(stats, total)
    assert bool((waited >= 0).all())


def case_results_outlive_later_calls(seat: Seat) -> None:
    loads = [make_load(seat, "holes", seed=50 + seed) for seed in range(5)]
    results = [dispatch(seat, load, use_fp8=seed % 2 == 1) for seed, load in enumerate(loads)]
    for load, result in zip(loads, results, strict=True):
        check_dispatch(seat, load, result)


def case_many_dispatches_without_combine(seat: Seat) -> None:
    for seed in range(12):
        load = make_load(seat, seed=60 + seed)
        check_dispatch(seat, load, dispatch(seat, load))


def case_clean_between(seat: Seat) -> None:
    for seed in range(2):
        seat.buffer().clean_low_latency_buffer(MAX_TOKENS, HIDDEN, seat.num_experts)
        load = make_load(seat, seed=70 + seed)
        check_dispatch(seat, load, dispatch(seat, load))


def case_int32_ids(seat: Seat) -> None:
    seat.only_ours()
    load = make_load(seat, "holes", seed=80)
    load.topk_ids = [ids.int() for ids in load.topk_ids]
    check_dispatch(seat, load, dispatch(seat, load))


def case_strided_rows(seat: Seat) -> None:
    seat.only_ours()
    load = make_load(seat, seed=81)
    wide = torch.zeros((len(load.x[seat.rank]), HIDDEN + 64), dtype=torch.bfloat16, device=seat.device)
    wide[:, :HIDDEN] = load.x[seat.rank]
    load.x[seat.rank] = wide[:, :HIDDEN]
    check_dispatch(seat, load, dispatch(seat, load))
