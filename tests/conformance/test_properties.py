"""What must hold beside equality with the reference: determinism, independence of tokens, the options of the calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius import reference
from moebius.reference import RankInput
from tests.conformance.engines import CONCURRENT, ENGINES, Engine
from tests.conformance.programs import computed, measured, repeated, whole_rounds, with_option
from tests.helpers.cases import MODES, Case
from tests.helpers.compare import assert_same
from tests.helpers.rounds import Result, check_rank, expect, of_rank
from tests.helpers.skew import Skew

engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=lambda engine: engine.name)
concurrent = pytest.mark.parametrize("engine", [ENGINES[name] for name in CONCURRENT], ids=lambda engine: engine.name)
modes = pytest.mark.parametrize("mode", MODES)


def check_rounds(engine: Engine, case: Case, count: int, skew: Skew | None = None, blocking: bool = False) -> None:
    """Some rounds of a case, against the reference."""
    expected = [expect(case, number) for number in range(count)]
    arguments = [(of_rank(expected, rank), blocking) for rank in range(case.num_ranks)]
    results = engine.run(case.config(), case.num_ranks, whole_rounds, arguments, skew)
    for rank, result in enumerate(results):
        assert len(result.combined) == count
        check_rank(case.config(), rank, result, expected)


@concurrent
@modes
@pytest.mark.parametrize("payload", ["bf16", "fp8"])
def test_repetitions_under_skew_are_identical(engine: Engine, mode: str, payload: str) -> None:
    case = Case(num_ranks=3, num_experts=9, num_topk=4, payload=payload, mode=mode, routing="zipf")
    expected = [expect(case, 0)]
    arguments = [(of_rank(expected, rank), 20) for rank in range(case.num_ranks)]
    results: list[list[Result]] = engine.run(case.config(), case.num_ranks, repeated, arguments, Skew(20))
    for rank, repetitions in enumerate(results):
        assert len(repetitions) == 20
        for repetition in repetitions:
            check_rank(case.config(), rank, repetition, expected)
            assert_same(repetition.combined[0], repetitions[0].combined[0], f"rank {rank}, against its first round")


@concurrent
@modes
def test_blocking_calls(engine: Engine, mode: str) -> None:
    check_rounds(engine, Case(num_ranks=3, num_experts=6, mode=mode, routing="ragged"), 4, blocking=True)


@concurrent
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_300_rounds_with_any_tokens(engine: Engine, num_ranks: int) -> None:
    case = Case(num_ranks=num_ranks, num_experts=2 * num_ranks, num_topk=3, max_num_tokens=6, hidden=32, routing="any")
    check_rounds(engine, case, 300, Skew(300, longest_s=5e-4))


def batch_of(size: int, at: int, token: RankInput, case: Case, number: int) -> list[RankInput]:
    """Rank 0 sends `token` as its row `at` among `size`; the other ranks send something, or nothing if it is alone."""
    others = dataclasses.replace(case, routing="full").inputs(number)
    batch = [dataclasses.replace(other, **rows(other, 0)) for other in others] if size == 1 else others
    changed = rows(others[0], size)
    for name, value in tensors(token).items():
        changed[name] = with_row(changed[name], at, value)
    batch[0] = dataclasses.replace(others[0], **changed)
    return batch


def tensors(inputs: RankInput) -> dict[str, Any]:
    return {name: value for name, value in vars(inputs).items() if isinstance(value, Tensor)}


def rows(inputs: RankInput, count: int) -> dict[str, Any]:
    return {name: value[:count] for name, value in tensors(inputs).items()}


def with_row(tensor: Tensor, at: int, row: Tensor) -> Tensor:
    changed = tensor.clone()
    changed[at] = row[0].to(tensor.dtype)
    return changed


@engines
@modes
@pytest.mark.parametrize("payload", ["bf16", "fp8", "fp32"])
def test_a_token_does_not_depend_on_its_batch(engine: Engine, mode: str, payload: str) -> None:
    """Alone, first, last and in the middle of full batches that differ: the same bits come back."""
    case = Case(num_ranks=3, num_experts=9, num_topk=5, max_num_tokens=10, payload=payload, mode=mode, routing="full")
    source = case.inputs(99)[0]
    token = dataclasses.replace(source, **rows(source, 1))
    places = [(1, 0), (10, 0), (10, 9), (10, 4), (4, 2), (1, 0)]
    batches = [batch_of(size, at, token, case, number) for number, (size, at) in enumerate(places)]
    arguments = [([batch[rank] for batch in batches],) for rank in range(case.num_ranks)]
    combined = engine.run(case.config(), case.num_ranks, computed, arguments, None)[0]
    alone = combined[0][0]
    assert alone.float().abs().sum() > 0
    for (size, at), batch in zip(places, combined, strict=True):
        assert_same(batch[at], alone, f"row {at} of {size}, against the token alone")


@engines
@modes
@pytest.mark.parametrize("payload", ["bf16", "fp8", "fp8-ue8m0", "fp8-as-is", "opaque"])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_that_stand_apart(engine: Engine, mode: str, payload: str, padded: bool) -> None:
    """x, the scales and the experts' rows may have any row stride."""
    check_option(engine, Case(num_ranks=2, hidden=512, payload=payload, mode=mode, padded=padded), "strided")


@engines
@pytest.mark.parametrize("mode", ["expert", "expert-late"])
@pytest.mark.parametrize("payload", ["bf16", "fp8", "fp8-ue8m0", "opaque", "opaque-bare"])
@pytest.mark.parametrize("padded", [False, True])
def test_results_into_given_tensors(engine: Engine, mode: str, payload: str, padded: bool) -> None:
    check_option(engine, Case(num_ranks=2, hidden=512, payload=payload, mode=mode, padded=padded), "into")


def check_option(engine: Engine, case: Case, option: str) -> None:
    expected = [expect(case, number) for number in range(3)]
    arguments = [(of_rank(expected, rank), option) for rank in range(case.num_ranks)]
    results = engine.run(case.config(), case.num_ranks, with_option, arguments, None)
    for rank, result in enumerate(results):
        check_rank(case.config(), rank, result, expected)


@engines
@modes
@pytest.mark.parametrize("valid", [0, 1, 5, 9])
def test_padding_may_hold_anything(engine: Engine, mode: str, valid: int) -> None:
    """Rows past num_valid_tokens: ids that are no expert, NaN, all kept from the wire; zeros come back for them."""
    case = Case(num_ranks=2, mode=mode)
    expected = []
    for number in range(3):
        inputs = [dataclasses.replace(given, num_valid_tokens=valid) for given in case.inputs(number)]
        for given in inputs:
            given.x[valid:] = torch.nan
            given.topk_weights[valid:] = torch.nan
        clean = expect(case, number, inputs)
        for given in inputs:
            given.topk_ids[valid:] = 1 << 20
        expected.append(clean)
    arguments = [(of_rank(expected, rank),) for rank in range(case.num_ranks)]
    results = engine.run(case.config(), case.num_ranks, whole_rounds, arguments, None)
    for rank, result in enumerate(results):
        check_rank(case.config(), rank, result, expected)
        assert not result.combined[0][valid:].any()


@engines
@modes
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_statistics_add_up(engine: Engine, mode: str, dtype: torch.dtype) -> None:
    case = Case(num_ranks=3, num_experts=6, mode=mode, routing="duplicates")
    expected = [expect(case, number) for number in range(3)]
    arguments = [(of_rank(expected, rank), dtype) for rank in range(case.num_ranks)]
    for rank, (result, stats, *waits) in enumerate(
        engine.run(case.config(), case.num_ranks, measured, arguments, None)
    ):
        check_rank(case.config(), rank, result, expected)
        total = torch.ones_like(stats)
        for round_ in expected:
            total = total + round_.dispatched[rank].expert_num_tokens.to(dtype)
        assert_same(stats, total, f"rank {rank}: expert_stats")
        for wait in waits:
            assert (wait >= 0).all(), f"rank {rank}: wait_stats {wait}"


@concurrent
def test_waiting_is_charged_to_the_rank_waited_for(engine: Engine) -> None:
    """Two of three ranks wait for each other's skew: over the rounds some wait is seen, and none for oneself."""
    case = Case(num_ranks=3, num_experts=6, routing="uniform")
    expected = [expect(case, number) for number in range(6)]
    arguments = [(of_rank(expected, rank), torch.int32) for rank in range(case.num_ranks)]
    results = engine.run(case.config(), case.num_ranks, measured, arguments, Skew(5, longest_s=2e-2))
    total = torch.zeros(3, dtype=torch.int64)
    for rank, (_, _, *waits) in enumerate(results):
        for wait in waits:
            assert wait[rank] == 0
            total += wait
    assert total.sum() > 1_000_000, "20 ms delays, and nobody waited a millisecond in nanoseconds"


SWEEPS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def every_pattern(dtype: torch.dtype) -> Tensor:
    """[512, 128]: every 16-bit pattern of the dtype, neighbours together; for fp32 the bf16 ones with noise below."""
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    if dtype != torch.float32:
        return patterns.to(torch.int16).view(dtype).reshape(512, 128)
    noise = torch.randint(1 << 16, patterns.shape, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    return ((patterns << 16) | noise).view(dtype).reshape(512, 128)


def beside_powers(dtype: torch.dtype) -> Tensor:
    """[64, 128]: groups whose maximum over 448 is a power of two, or the closest to one from either side."""
    rows = torch.zeros(64, 128, dtype=dtype)
    for row in range(64):
        away = row % 8 - 4
        largest = torch.tensor(448.0 * 2.0 ** (row // 8 - 4), dtype=dtype)
        bits = largest.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])
        rows[row] = (bits + away).view(dtype)
    return rows


@pytest.mark.parametrize("simd", ["avx512", "avx2", "scalar"])
@pytest.mark.parametrize("scale_format", ["fp32", "pow2", "ue8m0"])
@pytest.mark.parametrize("dtype", SWEEPS.values(), ids=SWEEPS)
def test_every_value_quantised(
    monkeypatch: pytest.MonkeyPatch, simd: str, scale_format: str, dtype: torch.dtype
) -> None:
    """NaN, infinities, subnormals, zeros of both signs and all between, in groups alike and in groups mixed."""
    use_simd(monkeypatch, simd)
    ordered = every_pattern(dtype)
    mixed = ordered.flatten()[torch.randperm(ordered.numel(), generator=torch.Generator().manual_seed(2))]
    finite = torch.where(mixed.isfinite() & (mixed.abs() < 100), mixed, torch.zeros_like(mixed))
    x = torch.cat([ordered, mixed.reshape(512, 128), finite.reshape(512, 128), beside_powers(dtype)]).reshape(-1, 512)
    payload = {"fp32": "fp8", "pow2": "fp8-pow2", "ue8m0": "fp8-ue8m0"}[scale_format]
    case = Case(num_ranks=1, num_experts=1, num_topk=1, hidden=512, max_num_tokens=len(x), payload=payload)
    inputs = [RankInput(x, torch.zeros(len(x), 1, dtype=torch.int64), torch.ones(len(x), 1))]
    expected = [expect(case, 0, inputs)]
    results = ENGINES["cpu-single"].run(case.config(), 1, whole_rounds, [(of_rank(expected, 0),)], None)
    want = expected[0].dispatched[0]
    assert_same(results[0].received[0].x, want.x, "x", any_nan=True)
    assert want.scales is not None
    assert_same(results[0].received[0].scales, want.scales, "scales")


@pytest.mark.parametrize("simd", ["avx512", "avx2", "scalar"])
@pytest.mark.parametrize("payload", ["bf16", "fp16", "fp32", "fp32-to-bf16"])
@modes
def test_every_value_combined(monkeypatch: pytest.MonkeyPatch, simd: str, payload: str, mode: str) -> None:
    """Experts' rows and weights of every kind: overflow to infinity, infinity less infinity, subnormals, NaN."""
    use_simd(monkeypatch, simd)
    case = Case(num_ranks=2, num_experts=4, num_topk=3, hidden=136, max_num_tokens=40, payload=payload, mode=mode)
    numbers = case.generator("special")
    expected = expect(case, 0)
    for given in expected.inputs:
        given.topk_weights[::3] = special(given.topk_weights[::3].shape, torch.float32, numbers)
    for rank, rows_out in enumerate(expected.expert_out):
        expected.expert_out[rank] = special(rows_out.shape, rows_out.dtype, numbers)
    expected.combined[:] = reference.combine(case.config(), expected.inputs, expected.dispatched, expected.expert_out)
    assert any(bool(rows_back.isnan().any()) for rows_back in expected.combined)
    arguments = [(of_rank([expected], rank),) for rank in range(2)]
    results = ENGINES["cpu-single"].run(case.config(), 2, whole_rounds, arguments, None)
    for rank, result in enumerate(results):
        assert_same(result.combined[0], expected.combined[rank], f"rank {rank}: combined", any_nan=True)


def special(shape: tuple[int, ...], dtype: torch.dtype, numbers: torch.Generator) -> Tensor:
    """Any bit pattern, and every other time a usual value."""
    width = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limit = 1 << (8 * dtype.itemsize - 1)
    patterns = torch.randint(-limit, limit, shape, generator=numbers, dtype=torch.int64).to(width).view(dtype)
    usual = torch.randn(shape, generator=numbers).to(dtype)
    return torch.where(torch.rand(shape, generator=numbers) < 0.1, patterns, usual)


def use_simd(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    from moebius import _core

    if level not in _core.simd_levels():
        pytest.skip(f"this processor or build has no {level}")
    monkeypatch.setenv("MOEBIUS_SIMD", level)
