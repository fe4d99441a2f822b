"""Conversions and sums of every instruction set, against torch, over every 16-bit pattern."""

import pytest
import torch

from moebius import AllToAll, Config, native, virtual_ranks
from moebius.wire import TORCH_DTYPE

LEVELS = native.core().simd_levels()
HIDDEN = 1024


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MOEBIUS_SIMD", request.param)
    name: str = request.param
    return name


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    return patterns.view(-1, HIDDEN)


def assert_same(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(got.isnan(), expected.isnan())
    bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
    keep = ~expected.isnan()
    wrong = (got.view(bits) != expected.view(bits)) & keep
    assert not wrong.any(), (got[wrong][:4], expected[wrong][:4])


def combined(rows: torch.Tensor, weights: torch.Tensor, output: str) -> torch.Tensor:
    """Sum over K of weights[t, k] * rows[t], where the engine multiplies and adds."""
    num_tokens, num_topk = weights.shape
    config = Config(
        num_experts=num_topk,
        num_topk=num_topk,
        hidden=rows.shape[1],
        max_num_tokens=num_tokens,
        payload=output,  # type: ignore[arg-type]
        weights_at="combine",
    )
    with AllToAll(virtual_ranks(1)[0], config) as a2a:
        recv = a2a.dispatch(rows, torch.arange(num_topk).expand(num_tokens, num_topk))
        return a2a.combine(recv.x, recv, weights)


@pytest.mark.parametrize("output", ["bf16", "fp16"])
def test_every_value_survives_widening_and_narrowing(level: str, output: str) -> None:
    rows = every_pattern(TORCH_DTYPE[output])
    got = combined(rows, torch.ones(rows.shape[0], 1), output)
    # The sum starts from +0, which is all that becomes of -0.
    assert_same(got, (rows.float() + 0.0).to(rows.dtype))


@pytest.mark.parametrize("output", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("hidden", [8, 24, 72, 1000])
def test_sums_round_as_torch_does(level: str, output: str, hidden: int) -> None:
    torch.manual_seed(hidden)
    dtype = TORCH_DTYPE[output]
    rows = (torch.randn(64, hidden) * torch.logspace(-8, 4, 64)[:, None]).to(dtype)
    weights = torch.randn(64, 3)
    expected = torch.zeros(64, hidden)
    for k in range(3):
        expected = expected + rows.float() * weights[:, k : k + 1]
    assert_same(combined(rows, weights, output), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale_format", ["fp32", "pow2"])
def test_fp8_rounds_as_torch_does(level: str, dtype: torch.dtype, scale_format: str) -> None:
    torch.manual_seed(0)
    x = (torch.randn(64, HIDDEN) * torch.logspace(-6, 4, 64)[:, None]).to(dtype)
    x[0] = 0
    x[1, :128] = torch.linspace(-448, 448, 128).to(dtype)  # every code of the largest scale
    config = Config(
        num_experts=1,
        num_topk=1,
        hidden=HIDDEN,
        max_num_tokens=64,
        payload="fp8_e4m3",
        scale_format=scale_format,  # type: ignore[arg-type]
    )
    with AllToAll(virtual_ranks(1)[0], config) as a2a:
        recv = a2a.dispatch(x, torch.zeros(64, 1, dtype=torch.int64), torch.ones(64, 1))
        got, scales = recv.x[0].float(), recv.scales
        assert scales is not None
        scales = scales[0].clone()
    groups = x.float().view(64, -1, 128)
    amax = groups.abs().amax(-1).clamp(min=1e-4)
    # Not `448 / amax`, which torch computes as a reciprocal and a product.
    expected_scales, inverse = amax / 448, torch.full_like(amax, 448) / amax
    if scale_format == "pow2":
        mantissa, exponent = torch.frexp(expected_scales)
        expected_scales = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
        inverse = 1 / expected_scales
    assert torch.equal(scales, expected_scales)
    expected = (groups * inverse[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn).float().view(64, HIDDEN)
    assert torch.equal(got, expected)


def test_a_nan_stays_one_in_fp8(level: str) -> None:
    x = torch.ones(1, 128)
    x[0, 5] = float("nan")
    config = Config(num_experts=1, num_topk=1, hidden=128, max_num_tokens=1, payload="fp8_e4m3")
    with AllToAll(virtual_ranks(1)[0], config) as a2a:
        recv = a2a.dispatch(x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
        isnan = recv.x[0, 0].float().isnan()
    assert isnan[5]
    assert isnan.sum() == 1
