"""Cases of the send and receive halves. Each runs on every rank of a world, which all make the same calls."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from tests.deep_ep.cases_combine import combine
from tests.deep_ep.cases_dispatch import dispatch
from tests.deep_ep.oracle import check_combine, check_dispatch, expert_outputs, make_load
from tests.deep_ep.seat import SkipCase

if TYPE_CHECKING:
    from tests.deep_ep.seat import Seat


def finish(seat: Seat, load: Any, result: Any) -> Any:
    """Check a dispatch that is received, and run its experts and combine, by hooks."""
    check_dispatch(seat, load, result)
    combined, _, hook = combine(seat, load, expert_outputs(seat, result), result[2], return_recv_hook=True)
    hook()
    check_combine(seat, load, combined, is_fp8=isinstance(result[0], tuple))


def case_hooks(seat: Seat) -> None:
    for seed, use_fp8 in enumerate((False, True)):
        load = make_load(seat, seed=200 + seed)
        result = dispatch(seat, load, use_fp8=use_fp8, return_recv_hook=True)
        assert callable(result[4])
        assert result[4]() is None
        finish(seat, load, result)


def case_hook_twice(seat: Seat) -> None:
    seat.only_ours()
    stats = torch.zeros(seat.num_local_experts, dtype=torch.int32, device=seat.device)
    load = make_load(seat, seed=202)
    result = dispatch(seat, load, return_recv_hook=True, cumulative_local_expert_recv_stats=stats)
    result[4]()
    result[4]()
    assert torch.equal(stats, result[1])
    outputs = expert_outputs(seat, result)
    combined, _, hook = combine(seat, load, outputs, result[2], return_recv_hook=True)
    hook()
    dispatch(seat, make_load(seat, seed=203))
    hook()
    result[4]()
    check_dispatch(seat, load, result)
    check_combine(seat, load, combined)


def case_send_half_does_not_wait(seat: Seat) -> None:
    seat.only_ours()
    load = make_load(seat, seed=204)
    for _ in range(2):  # builds what it needs, and leaves no round uncombined, which the next send would wait for
        finish(seat, load, dispatch(seat, load))
    if seat.rank == 0:
        time.sleep(0.3)
    begin = time.monotonic()
    result = dispatch(seat, load, return_recv_hook=True)
    took = time.monotonic() - begin
    assert seat.rank == 0 or took < 0.25
    result[4]()
    finish(seat, load, result)


def case_late_hooks_under_skew(seat: Seat) -> None:
    for seed in range(seat.num_ranks + 1):
        load = make_load(seat, seed=210 + seed)
        result = dispatch(seat, load, return_recv_hook=True)
        if seed == seat.rank:
            time.sleep(0.05)
        result[4]()
        combined, _, hook = combine(seat, load, expert_outputs(seat, result), result[2], return_recv_hook=True)
        if (seed + 1) % seat.num_ranks == seat.rank:
            time.sleep(0.05)
        hook()
        check_combine(seat, load, combined)


def case_two_micro_batches(seat: Seat) -> None:
    """One send half open at a time, two results alive: what upstream allows."""
    for seed in range(3):
        first, second = (make_load(seat, seed=220 + 2 * seed + which) for which in range(2))
        result_a = dispatch(seat, first, return_recv_hook=True)
        result_a[4]()
        result_b = dispatch(seat, second, return_recv_hook=True)
        outputs_a = expert_outputs(seat, result_a)
        result_b[4]()
        combined_a, _, hook_a = combine(seat, first, outputs_a, result_a[2], return_recv_hook=True)
        outputs_b = expert_outputs(seat, result_b)
        hook_a()
        combined_b, _, hook_b = combine(seat, second, outputs_b, result_b[2], return_recv_hook=True)
        check_combine(seat, first, combined_a)
        hook_b()
        check_combine(seat, second, combined_b)


def case_two_sends_then_two_receives(seat: Seat) -> None:
    seat.only_ours()
    for seed in range(3):
        first, second = (make_load(seat, seed=230 + 2 * seed + which) for which in range(2))
        result_a = dispatch(seat, first, return_recv_hook=True)
        result_b = dispatch(seat, second, return_recv_hook=True)
        for result in (result_a, result_b) if seed % 2 else (result_b, result_a):
            result[4]()
        check_dispatch(seat, first, result_a)
        check_dispatch(seat, second, result_b)
        combined_a, _, hook_a = combine(seat, first, expert_outputs(seat, result_a), result_a[2], return_recv_hook=True)
        combined_b, _, hook_b = combine(
            seat, second, expert_outputs(seat, result_b), result_b[2], return_recv_hook=True
        )
        for hook in (hook_a, hook_b) if seed % 2 else (hook_b, hook_a):
            hook()
        check_combine(seat, first, combined_a)
        check_combine(seat, second, combined_b)


def case_dispatch_between_combine_halves(seat: Seat) -> None:
    seat.only_ours()
    first, second = make_load(seat, seed=240), make_load(seat, seed=241)
    result_a = dispatch(seat, first)
    combined_a, _, hook_a = combine(seat, first, expert_outputs(seat, result_a), result_a[2], return_recv_hook=True)
    result_b = dispatch(seat, second, return_recv_hook=True)
    hook_a()
    result_b[4]()
    check_combine(seat, first, combined_a)
    finish(seat, second, result_b)


def case_async_finish(seat: Seat) -> None:
    load = make_load(seat, seed=250)
    result = dispatch(seat, load, async_finish=True)
    assert result[4] is None
    check_dispatch(seat, load, result)
    combined, event, hook = combine(seat, load, expert_outputs(seat, result), result[2], async_finish=True)
    assert hook is None
    with event:
        pass
    check_combine(seat, load, combined)


def case_outputs_free_after_combine_send(seat: Seat) -> None:
    load = make_load(seat, seed=251)
    result = dispatch(seat, load)
    outputs = expert_outputs(seat, result)
    combined, _, hook = combine(seat, load, outputs, result[2], return_recv_hook=True)
    outputs.zero_()
    hook()
    check_combine(seat, load, combined)


def case_tokens_free_after_dispatch_send(seat: Seat) -> None:
    load = make_load(seat, seed=252)
    x = load.x[seat.rank].clone()
    load.x[seat.rank] = load.x[seat.rank].clone()
    result = dispatch(seat, load, return_recv_hook=True)
    load.x[seat.rank].zero_()
    load.x[seat.rank] = x
    result[4]()
    check_dispatch(seat, load, result)


def case_no_mask_at_first(seat: Seat) -> None:
    buffer = seat.new_buffer(enable_shrink=True)
    status = torch.full((seat.num_ranks,), 7, dtype=torch.int32, device=seat.device)
    buffer.low_latency_query_mask_buffer(status)
    assert not status.any()
    buffer.low_latency_clean_mask_buffer()
    buffer.destroy()


def case_mask_by_hand(seat: Seat) -> None:
    if seat.num_ranks < 2:
        raise SkipCase("nobody to mask")
    masked = seat.num_ranks - 1
    buffer = seat.new_buffer(enable_shrink=True)
    load = make_load(seat, seed=253)
    dispatch(seat, load, buffer)
    if seat.is_ours and not hasattr(next(iter(buffer._low_latency.exchanges._by_shape.values())), "mask_rank"):
        raise SkipCase("the engine cannot mask a rank by hand yet")
    if seat.rank != masked:  # that rank has left; the others go on without it
        buffer.low_latency_update_mask_buffer(masked, True)
        status = torch.zeros(seat.num_ranks, dtype=torch.int32, device=seat.device)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [int(rank == masked) for rank in range(seat.num_ranks)]
        without = make_load(seat, seed=254)
        without.topk_ids[masked] = torch.full_like(without.topk_ids[masked], -1)
        for ids in without.topk_ids:
            ids[ids // seat.num_local_experts == masked] = -1
        result = dispatch(seat, without, buffer)
        check_dispatch(seat, without, result)
        combined = buffer.low_latency_combine(
            expert_outputs(seat, result), without.topk_ids[seat.rank], without.topk_weights[seat.rank], result[2]
        )[0]
        check_combine(seat, without, combined)
    buffer.destroy()
