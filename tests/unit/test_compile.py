"""A step that calls us compiles whole, and computes what it computes eagerly."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moebius import AllToAll, Config, StateError, virtual_ranks

E, K, H, M = 8, 2, 128, 16


def make(layout: str, payload: str = "fp32", weights_at: str = "dispatch") -> AllToAll:
    config = Config(
        num_experts=E,
        num_topk=K,
        hidden=H,
        max_num_tokens=M,
        layout=layout,  # type: ignore[arg-type]
        payload=payload,  # type: ignore[arg-type]
        weights_at=weights_at,  # type: ignore[arg-type]
    )
    return AllToAll(virtual_ranks(1)[0], config)


def inputs(num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(num_tokens)
    ids = torch.rand(num_tokens, E).topk(K).indices
    return torch.randn(num_tokens, H), ids, torch.rand(num_tokens, K)


def blocking(a2a: AllToAll) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def step(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        recv = a2a.dispatch(x * 2, ids, weights)
        return a2a.combine(recv.x * 4, recv) + x

    return step


def by_hooks(a2a: AllToAll) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def step(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        first = a2a.dispatch_send(x * 2, ids, weights)
        second = a2a.dispatch_send(x * 8, ids, weights)
        shared = x + 1
        recv = first.receive()
        returning = a2a.combine_send(recv.x * 4, recv)
        recv = second.receive()
        also = a2a.combine_send(recv.x * 2, recv)
        return returning.receive() + also.receive() + shared

    return step


@pytest.mark.parametrize("layout", ["expert_major", "token_major"])
@pytest.mark.parametrize("step", [blocking, by_hooks])
def test_a_compiled_step_equals_the_eager_one(
    layout: str, step: Callable[[AllToAll], Callable[[Tensor, Tensor, Tensor], Tensor]]
) -> None:
    torch.compiler.reset()
    with make(layout) as a2a, make(layout) as plain:
        compiled = torch.compile(step(a2a), fullgraph=True)
        eager = step(plain)
        for num_tokens in (M, 5, 7, M):
            call = inputs(num_tokens)
            assert torch.equal(compiled(*call), eager(*call))
        assert a2a.epoch == plain.epoch


def test_fp8_and_weights_at_combine_compile() -> None:
    torch.compiler.reset()

    def step(a2a: AllToAll, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        recv = a2a.dispatch(x, ids)
        assert recv.scales is not None
        rows = recv.x.float() * recv.scales.repeat_interleave(128, -1)
        return a2a.combine(rows.bfloat16(), recv, weights)

    with make("expert_major", "fp8_e4m3", "combine") as a2a, make("expert_major", "fp8_e4m3", "combine") as plain:
        compiled = torch.compile(step, fullgraph=True)
        call = inputs(9)
        assert torch.equal(compiled(a2a, *call), step(plain, *call))


def test_a_closed_object_says_so_from_compiled_code() -> None:
    torch.compiler.reset()
    a2a = make("expert_major")
    compiled = torch.compile(blocking(a2a), fullgraph=True)
    compiled(*inputs(3))
    a2a.close()
    with pytest.raises(StateError, match="closed"):
        compiled(*inputs(3))


def test_operators_pass_the_checks_of_torch_library() -> None:
    with make("expert_major") as a2a:
        x, ids, weights = inputs(4)
        traced = a2a.traced
        op = torch.ops.moebius.dispatch_send.default
        torch.library.opcheck(
            op,
            (traced.state, traced.number, x, ids, weights, None, None),
            test_utils=("test_schema", "test_faketensor"),
        )
