"""The reference against closed forms and against arithmetic done another way."""

from __future__ import annotations

import bisect
import math
import struct

import pytest
import torch
from torch import Tensor

from moebius import Config, reference
from moebius.reference import RankInput
from tests.helpers.cases import MODES, Case
from tests.helpers.compare import assert_same
from tests.helpers.rounds import expect


def as_f32(value: float) -> float:
    """Round a Python float to fp32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


# Every finite e4m3 magnitude in order, from the format's definition: code -> value.
MAGNITUDES: list[float] = [
    (code & 7) / 8 * 2.0**-6 if code < 8 else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3) - 7) for code in range(127)
]


def nearest_e4m3(value: float) -> int:
    """The code of the nearest e4m3 value, ties to the even code, saturating."""
    if math.isnan(value):
        return 0x7F
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    size = min(abs(value), MAGNITUDES[-1])
    above = bisect.bisect_left(MAGNITUDES, size)
    if above == 0 or MAGNITUDES[above] == size:
        return sign | above
    low, high = size - MAGNITUDES[above - 1], MAGNITUDES[above] - size
    return sign | (above if high < low or (high == low and above % 2 == 0) else above - 1)


def quantised_by_hand(row: list[float], scale_format: str) -> tuple[list[int], float]:
    """Codes and scale of one group, value by value."""
    amax = as_f32(max([1e-4, *(abs(value) for value in row if not math.isnan(value))]))
    scale = as_f32(amax / 448.0)
    inverse = as_f32(448.0 / amax)
    if scale_format != "fp32":
        mantissa, exponent = math.frexp(scale)
        scale = math.ldexp(1.0, exponent - (mantissa == 0.5))
        inverse = 1.0 / scale
    return [nearest_e4m3(as_f32(value * inverse)) for value in row], scale


@pytest.mark.parametrize("scale_format", ["fp32", "pow2", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantise_by_hand(scale_format: str, dtype: torch.dtype) -> None:
    numbers = torch.Generator().manual_seed(3)
    x = torch.randn(12, 512, generator=numbers) * 2.0 ** torch.randint(-12, 12, (12, 1), generator=numbers)
    x[3] = 0.0
    x[4] = 1e-6
    x[5, ::7] = -0.0
    x[6, 17] = torch.nan
    x[7, :128] = 448.0
    x[8, :128] = torch.arange(128) / 16  # ties
    x[8, 0] = 448.0
    x[9, :128] = torch.tensor([3.9375, 0.59765625, -0.1845703125, -1.1953125]).repeat(32)  # not reciprocal times 448
    x = x.to(dtype)
    quantized, scales = reference.quantize_fp8(x, scale_format)  # type: ignore[arg-type]
    assert scales.dtype == (torch.int32 if scale_format == "ue8m0" else torch.float32)
    assert scales.shape == (12, 1 if scale_format == "ue8m0" else 4)
    plain = reference.unpack_ue8m0(scales) if scale_format == "ue8m0" else scales
    codes = quantized.view(torch.uint8)
    for token in range(12):
        for group in range(4):
            at = slice(128 * group, 128 * (group + 1))
            want, scale = quantised_by_hand(x[token, at].tolist(), scale_format)
            assert plain[token, group].item() == scale
            got = codes[token, at]
            is_nan = (got & 0x7F) == 0x7F
            assert is_nan.tolist() == x[token, at].isnan().tolist()
            assert_same(got[~is_nan], torch.tensor(want, dtype=torch.uint8)[~is_nan], f"codes[{token}, {group}]")


def test_quantise_closed_form() -> None:
    """Values that the scale makes exact come back exact, and the packed scales are the exponents."""
    x = torch.zeros(1, 512)
    x[0, :4] = torch.tensor([448.0, -224.0, 3.0, 0.5])
    x[0, 128:130] = torch.tensor([896.0, -2.0])
    quantized, scales = reference.quantize_fp8(x, "fp32")
    assert scales[0].tolist() == [1.0, 2.0, as_f32(as_f32(1e-4) / 448.0), as_f32(as_f32(1e-4) / 448.0)]
    assert_same(reference.dequantize_fp8(quantized, scales), x, "dequantised")
    _, packed = reference.quantize_fp8(x, "ue8m0")
    assert int(packed) & 0xFFFF == 127 | 128 << 8
    assert_same(reference.pack_ue8m0(reference.unpack_ue8m0(packed)), packed, "packed")


def test_quantise_saturates_and_keeps_nan() -> None:
    x = torch.zeros(2, 128)
    x[0, :3] = torch.tensor([torch.nan, 448.0, -448.0])
    x[1, :2] = torch.tensor([torch.inf, 5.0])
    quantized, scales = reference.quantize_fp8(x)
    values = quantized.float()
    assert values[0, 0].isnan()
    assert values[0, 1:3].tolist() == [448.0, -448.0]
    assert scales[0, 0] == 1.0
    assert values[1, 0].isnan(), "infinity times 448 / infinity"
    assert values[1, 1] == 0.0


def plain_dispatch(case: Case, inputs: list[RankInput], rank: int) -> list[list[tuple[int, int]]]:
    """(source, token) of each row of each local expert, by loops over single choices."""
    num_local = case.num_experts // case.num_ranks
    rows: list[list[tuple[int, int]]] = [[] for _ in range(num_local)]
    for source, given in enumerate(inputs):
        for token in range(given.num_valid):
            for expert in sorted({int(choice) for choice in given.topk_ids[token]}):
                if expert >= 0 and expert // num_local == rank:
                    rows[expert % num_local].append((source, token))
    return rows


@pytest.mark.parametrize("routing", ["uniform", "duplicates", "holes", "any", "ragged"])
@pytest.mark.parametrize("padded", [False, True])
def test_dispatch_by_loops(routing: str, padded: bool) -> None:
    case = Case(num_ranks=3, num_experts=9, num_topk=4, routing=routing, padded=padded)
    inputs = case.inputs(0)
    for rank, got in enumerate(reference.dispatch(case.config(), inputs)):
        rows = plain_dispatch(case, inputs, rank)
        assert got.src_info is not None
        assert got.layout_range is not None
        assert got.expert_num_tokens.tolist() == [len(origins) for origins in rows]
        messages = {origin for origins in rows for origin in origins}
        assert got.src_num_tokens.tolist() == [sum(origin[0] == source for origin in messages) for source in range(3)]
        for expert, origins in enumerate(rows):
            assert got.src_info[expert, : len(origins)].tolist() == [token for _, token in origins]
            for row, (source, token) in enumerate(origins):
                assert_same(got.x[expert, row], inputs[source].x[token], f"x[{expert}, {row}]")
            for source in range(3):
                begin, count = divmod(int(got.layout_range[expert, source]), 1 << 32)
                assert [origin[0] for origin in origins[begin : begin + count]] == [source] * count


def test_token_major_by_loops() -> None:
    case = Case(num_ranks=3, num_experts=9, num_topk=4, routing="any", mode="token")
    inputs = case.inputs(0)
    for rank, got in enumerate(reference.dispatch(case.config(), inputs)):
        assert got.topk_ids is not None
        assert got.topk_weights is not None
        for source, given in enumerate(inputs):
            row = source * case.max_num_tokens
            for token in range(given.num_tokens):
                local = [int(choice) - 3 * rank if int(choice) // 3 == rank else -1 for choice in given.topk_ids[token]]
                if max(local) < 0:
                    continue
                assert got.topk_ids[row].tolist() == local
                assert_same(got.x[row], given.x[token], f"x[{row}]")
                assert_same(got.topk_weights[row], given.topk_weights[token], f"topk_weights[{row}]")
                row += 1
            end = (source + 1) * case.max_num_tokens
            assert (got.topk_ids[row:end] == -1).all()


def identity(case: Case, received: list[reference.RankDispatched]) -> list[Tensor]:
    """Experts that give back what they got; token_major: times the sum of the local weights."""
    outputs = []
    for each in received:
        if each.topk_ids is None:
            outputs.append(each.x.clone())
            continue
        assert each.topk_weights is not None
        weights = torch.where(each.topk_ids >= 0, each.topk_weights, 0.0).sum(dim=1, keepdim=True)
        outputs.append((each.x.float() * weights).to(each.x.dtype))
    return outputs


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("routing", ["uniform", "holes", "duplicates", "local", "unrouted", "k1"])
def test_identity_experts_closed_form(mode: str, routing: str) -> None:
    """Weights that are powers of two: every product and sum is exact, so x comes back times its routed weights."""
    case = Case(num_ranks=4, num_experts=8, num_topk=4, hidden=16, payload="fp32", mode=mode, routing=routing)
    inputs = []
    for given in case.inputs(0):
        weights = 2.0 ** -torch.arange(case.topk).float().expand(given.num_tokens, -1)
        inputs.append(RankInput(given.x.bfloat16().float(), given.topk_ids, weights.contiguous()))
    received = reference.dispatch(case.config(), inputs)
    combined = reference.combine(case.config(), inputs, received, identity(case, received))
    for given, got in zip(inputs, combined, strict=True):
        routed = torch.where(given.topk_ids >= 0, given.topk_weights, 0.0).sum(dim=1, keepdim=True)
        assert_same(got, given.x * routed + 0.0, "combined")


def test_combine_order_is_ascending_and_unfused() -> None:
    """Sums that tell the orders apart, and a product that tells fused from separately rounded."""
    config = Config(num_experts=4, num_topk=4, hidden=4, max_num_tokens=1, payload="fp32", weights_at="combine")
    ids = torch.tensor([[3, 0, 2, 1]])
    weights = torch.tensor([[1.0, 1.0, 1.0 + 2.0**-12, 1.0]])
    inputs = [RankInput(torch.zeros(1, 4), ids, weights), *[RankInput(torch.zeros(0, 4), ids[:0], weights[:0])]]
    received = reference.dispatch(config, inputs)
    values = {3: 1e8, 0: 1.0, 2: -1e8, 1: 1.0 + 2.0**-12}
    outputs = [torch.zeros(2, 2, 4) for _ in range(2)]
    for expert, value in values.items():
        outputs[expert // 2][expert % 2, 0] = value
    got = reference.combine(config, inputs, received, outputs)[0]
    want = 0.0
    for k, expert in enumerate(ids[0].tolist()):
        want = as_f32(want + as_f32(weights[0, k].item() * as_f32(values[expert])))
    assert got[0].tolist() == [want] * 4


def test_reduction_rounds_once_per_rank() -> None:
    """bf16: each rank's sum is rounded before it travels, and their sum is rounded again."""
    config = Config(num_experts=4, num_topk=4, hidden=8, max_num_tokens=1)
    ids, weights = torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4)
    inputs = [
        RankInput(torch.zeros(1, 8).bfloat16(), ids, weights),
        RankInput(torch.zeros(0, 8).bfloat16(), ids[:0], weights[:0]),
    ]
    received = reference.dispatch(config, inputs)
    outputs = [torch.zeros(2, 2, 8).bfloat16() for _ in range(2)]
    outputs[0][0, 0], outputs[0][1, 0] = 256.0, 1.0  # 257 is no bf16: rounds to 256
    outputs[1][0, 0], outputs[1][1, 0] = 1.0, 1.0
    assert reference.combine(config, inputs, received, outputs)[0][0].tolist() == [258.0] * 8


def test_expected_rounds_poison_what_nobody_may_read() -> None:
    expected = expect(Case(num_ranks=2, routing="uniform"), 0)
    for rows, received in zip(expected.expert_out, expected.dispatched, strict=True):
        for expert, count in enumerate(received.expert_num_tokens.tolist()):
            assert not rows[expert, :count].isnan().any()
            assert rows[expert, count:].isnan().all()
    assert not any(bool(rows.isnan().any()) for rows in expected.combined)
