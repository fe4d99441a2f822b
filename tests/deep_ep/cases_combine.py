"""Cases of low_latency_combine. Each runs on every rank of a world, which all make the same calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tests.deep_ep.cases_dispatch import dispatch
from tests.deep_ep.oracle import (
    GROUP,
    Load,
    Routing,
    check_combine,
    check_dispatch,
    dequantise,
    expert_outputs,
    make_load,
    run_expert,
)
from tests.deep_ep.seat import HIDDEN, MAX_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

    from tests.deep_ep.seat import Seat


def combine(seat: Seat, load: Load, outputs: Tensor, handle: Any, **options: Any) -> Any:
    result = seat.buffer().low_latency_combine(
        outputs, load.topk_ids[seat.rank], load.topk_weights[seat.rank], handle, **options
    )
    if options.get("async_finish"):
        result[1].current_stream_wait()
    return result


def round_trip(seat: Seat, load: Load, *, use_fp8: bool = False, **options: Any) -> Tensor:
    result = dispatch(seat, load, use_fp8=use_fp8)
    combined: Tensor = combine(seat, load, expert_outputs(seat, result), result[2], **options)[0]
    check_combine(seat, load, combined, is_fp8=use_fp8)
    return combined


def case_round_trips(seat: Seat) -> None:
    routings: tuple[Routing, ...] = ("uniform", "holes", "hot", "local", "duplicates", "unrouted")
    for seed, routing in enumerate(routings):
        for use_fp8 in (False, True):
            round_trip(seat, make_load(seat, routing, seed=100 + seed), use_fp8=use_fp8)


def case_round_trip_without_tokens(seat: Seat) -> None:
    for quiet in range(2):
        num_tokens = [0 if rank % 2 == quiet else 7 for rank in range(seat.num_ranks)]
        round_trip(seat, make_load(seat, seed=110 + quiet, num_tokens=num_tokens))


def case_result(seat: Seat) -> None:
    load = make_load(seat, seed=111)
    result = dispatch(seat, load)
    answer = combine(seat, load, expert_outputs(seat, result), result[2])
    assert isinstance(answer, tuple)
    combined, event, hook = answer
    assert combined.is_contiguous()
    assert isinstance(event, seat.module.EventOverlap)
    assert hook is None


def case_one_contribution_is_exact(seat: Seat) -> None:
    load = make_load(seat, "one", seed=112, num_topk=1)
    combined = round_trip(seat, load)
    expected = [run_expert(x, int(ids)) for x, ids in zip(load.x[seat.rank], load.topk_ids[seat.rank], strict=True)]
    assert torch.equal(combined, torch.stack(expected))


def case_fp8_values_travel_on(seat: Seat) -> None:
    # What an expert returns untouched comes home as it was quantised, but for one rounding to bf16.
    load = make_load(seat, "one", seed=113, num_topk=1)
    result = dispatch(seat, load, use_fp8=True)
    outputs = dequantise(result[0]).to(torch.bfloat16)
    combined = combine(seat, load, outputs, result[2])[0]
    x = load.x[seat.rank].float()
    size = x.view(len(x), HIDDEN // GROUP, GROUP).abs().amax(2).repeat_interleave(GROUP, 1)
    assert bool(((combined.float() - x).abs() <= x.abs() * 0.0667 + size * 1e-4).all())


def case_out(seat: Seat) -> None:
    load = make_load(seat, seed=114)
    out = torch.full_like(load.x[seat.rank], float("nan"))
    combined = round_trip(seat, load, out=out)
    assert combined.data_ptr() == out.data_ptr()
    check_combine(seat, load, out)


def case_zero_copy(seat: Seat) -> None:
    for seed in range(3):
        load = make_load(seat, seed=120 + seed)
        result = dispatch(seat, load)
        staging = seat.buffer().get_next_low_latency_combine_buffer(result[2])
        assert staging.shape == (seat.num_local_experts, seat.num_rows, HIDDEN)
        assert staging.dtype == torch.bfloat16
        expert_outputs(seat, result, out=staging)
        unused = torch.zeros((seat.num_local_experts, seat.num_rows, HIDDEN), dtype=torch.bfloat16, device=seat.device)
        combined = combine(seat, load, unused, result[2], zero_copy=True)[0]
        check_combine(seat, load, combined)


def case_logfmt(seat: Seat) -> None:
    load = make_load(seat, seed=125)
    result = dispatch(seat, load)
    combined = combine(seat, load, expert_outputs(seat, result), result[2], use_logfmt=True)[0]
    check_combine(seat, load, combined, is_fp8=True)


def case_wait_stats(seat: Seat) -> None:
    load = make_load(seat, seed=126)
    result = dispatch(seat, load)
    waited = torch.zeros(seat.num_ranks, dtype=torch.int64, device=seat.device)
    combine(seat, load, expert_outputs(seat, result), result[2], combine_wait_recv_cost_stats=waited)
    assert bool((waited >= 0).all())


def case_combine_a_handle_again(seat: Seat) -> None:
    load = make_load(seat, "holes", seed=127)
    result = dispatch(seat, load, use_fp8=True)
    outputs = expert_outputs(seat, result)
    first = combine(seat, load, outputs, result[2])[0]
    second = combine(seat, load, outputs, result[2])[0]
    check_combine(seat, load, first, is_fp8=True)
    assert torch.equal(first, second)
    other = make_load(seat, seed=128)
    round_trip(seat, other)
    assert torch.equal(combine(seat, load, outputs, result[2])[0], first)


def case_combine_late_and_out_of_order(seat: Seat) -> None:
    loads = [make_load(seat, seed=130 + seed) for seed in range(4)]
    results = [dispatch(seat, load) for load in loads]
    for at in (2, 0, 3, 1):
        check_dispatch(seat, loads[at], results[at])
        combined = combine(seat, loads[at], expert_outputs(seat, results[at]), results[at][2])[0]
        check_combine(seat, loads[at], combined)


def case_ids_overwritten_after_dispatch(seat: Seat) -> None:
    load = make_load(seat, seed=140)
    ids = load.topk_ids[seat.rank].clone()
    result = seat.buffer().low_latency_dispatch(load.x[seat.rank], ids, MAX_TOKENS, seat.num_experts, use_fp8=False)
    ids.fill_(-1)
    combined = combine(seat, load, expert_outputs(seat, result), result[2])[0]
    check_combine(seat, load, combined)


def case_choices_dropped_at_combine(seat: Seat) -> None:
    load = make_load(seat, seed=141)
    result = dispatch(seat, load)
    outputs = expert_outputs(seat, result)
    load.topk_ids[seat.rank][:, 1] = -1
    check_combine(seat, load, combine(seat, load, outputs, result[2])[0])


def case_formats_and_topk_mixed(seat: Seat) -> None:
    for seed in range(6):
        load = make_load(seat, seed=150 + seed, num_topk=(4, 2)[seed % 2])
        round_trip(seat, load, use_fp8=seed % 3 == 0)


def case_repeats_bit_for_bit(seat: Seat) -> None:
    load = make_load(seat, seed=160)
    first = round_trip(seat, load)
    for _ in range(3):
        assert torch.equal(round_trip(seat, load), first)


def case_odd_hidden(seat: Seat) -> None:
    seat.only_ours()
    for hidden, use_fp8 in ((8, False), (1000, False), (128, True), (640, True)):
        load = make_load(seat, seed=170, hidden=hidden)
        round_trip(seat, load, use_fp8=use_fp8)
