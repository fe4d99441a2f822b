"""vLLM's own modular kernel with our classes, on CPU tensors: what the engine drives, without the engine."""

import importlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius import AllToAll, Config, ConfigError, virtual_ranks
from tests.vllm.marks import needs_vllm

pytestmark = needs_vllm
E, K, H, INTERMEDIATE, M, R = 8, 2, 512, 64, 16, 2
PEER_LIMIT_S = 60.0  # a rank that hangs is all that it is to tell
SCRATCHPAD = threading.Lock()


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """vLLM takes a while to import, and threads that wait for each other should not have to wait for that."""
    for name in ("vllm.model_executor.layers.fused_moe.experts.cpu_moe", "moebius.vllm.layers", "tests.vllm.experts"):
        importlib.import_module(name)


def parallel_config(ep_rank: int) -> Any:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

    fields = dict.fromkeys(("tp_size", "pcp_size", "sp_size"), 1) | dict.fromkeys(("tp_rank", "pcp_rank"), 0)
    return FusedMoEParallelConfig(
        **fields,
        dp_size=R,
        dp_rank=ep_rank,
        ep_size=R,
        ep_rank=ep_rank,
        use_ep=True,
        all2all_backend="moebius",
        enable_eplb=False,
    )


def moe_config(rank: int, dtype: torch.dtype, topk: int) -> Any:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, RoutingMethodType

    return FusedMoEConfig(
        num_experts=E,
        experts_per_token=topk,
        hidden_dim=H,
        intermediate_size=INTERMEDIATE,
        num_local_experts=E // R,
        num_logical_experts=E,
        activation=MoEActivation.SILU,
        device="cpu",
        routing_method=RoutingMethodType.TopK,
        moe_parallel_config=parallel_config(rank),
        in_dtype=dtype,
        max_num_tokens=M,
    )


class Manager:
    """Stands in for the group's manager: virtual ranks instead of processes."""

    def __init__(self, rank: Any) -> None:
        self.group = rank
        self.world_size = R
        self.made: dict[Any, AllToAll] = {}

    def get_handle(self, fields: dict[str, Any]) -> AllToAll:
        key = tuple(sorted(fields.items()))
        if key not in self.made:
            self.made[key] = AllToAll(self.group, Config(**{**fields, "timeout_s": PEER_LIMIT_S}))
        return self.made[key]


def reference(x: Tensor, ids: Tensor, weights: Tensor, w1: Tensor, w2: Tensor, *, on_input: bool = False) -> Tensor:
    from tests.vllm.experts import expert

    out = torch.zeros(x.shape[0], H)
    for token in range(x.shape[0]):
        for choice in range(ids.shape[1]):
            e = int(ids[token, choice])
            if e >= 0:
                weight = weights[token, choice]
                row = x[token].float() * (weight if on_input else 1)
                out[token] += expert(row, w1[e].float(), w2[e].float()) * (1 if on_input else weight)
    return out


def through_e4m3(x: Tensor, *, is_packed: bool) -> Tensor:
    """What is left of a token that travelled in e4m3, with a scale for each 128 channels."""
    groups = x.float().view(x.shape[0], H // 128, 128)
    amax = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 448))) if is_packed else amax / 448
    # `448 / amax` would be the reciprocal of amax times 448: rounded twice, and another FP8 value at a tie.
    times = 1 / scale if is_packed else torch.tensor(448.0) / amax
    return ((groups * times).to(torch.float8_e4m3fn).float() * scale).view_as(x)


def on_every_rank(run: Callable[[int, Any], None]) -> None:
    """A thread for each virtual rank; raises what the first of them raised."""
    errors: list[BaseException] = []

    def guarded(rank: Any) -> None:
        try:
            run(rank.rank, rank)
        except BaseException as error:  # noqa: BLE001  # raised below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(rank,), daemon=True) for rank in virtual_ranks(R)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2 * PEER_LIMIT_S
    while any(thread.is_alive() for thread in threads) and not errors:
        assert time.monotonic() < deadline, "a rank hangs"
        threads[0].join(0.05)
    if errors:
        raise errors[0]


CASES = {
    "batched": ("batched", None, torch.float32, 1e-5),
    "batched-bf16": ("batched", None, torch.bfloat16, 3e-2),
    "standard-stock-experts": ("standard", None, torch.float32, 1e-5),
    "standard-mapped": ("standard", "MappedExperts", torch.float32, 1e-5),
    "batched-fp8": ("batched", "QuantisedBatchedExperts", torch.float32, 1e-4),
    "batched-fp8-packed-scales": ("batched", "PackedScaleExperts", torch.bfloat16, 3e-2),
    "standard-fp8": ("standard", "MappedExperts-fp8", torch.float32, 1e-4),
}


experts_of: dict[str, Any] = {}  # batched experts by case: classes that only some environments have


def make_kernel(case: str, rank: int, manager: Any, topk: int, w1: Tensor, w2: Tensor) -> tuple[Any, Tensor, Tensor]:
    """The kernel, and the weights of this rank's experts as it takes them."""
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    from moebius.vllm import layers
    from moebius.vllm.batched import MoebiusBatchedPrepareAndFinalize
    from moebius.vllm.cpu_experts import MoebiusBatchedCPUExperts
    from moebius.vllm.standard import MoebiusStandardPrepareAndFinalize
    from tests.vllm import experts as fakes

    form, name, dtype, _ = CASES.get(case, CASES["batched"])
    config = moe_config(rank, dtype, topk)
    is_fp8 = "fp8" in case
    quant = (
        FusedMoEQuantConfig.make(torch.float8_e4m3fn, block_shape=[128, 128]) if is_fp8 else FusedMoEQuantConfig.make()
    )
    exchange = layers.exchange_of(config, quant, manager, form == "batched")
    sends_fp8 = layers.sends_fp8(config, quant)
    assert sends_fp8 == is_fp8
    own = slice(rank * E // R, (rank + 1) * E // R)
    mine1, mine2 = w1[own].to(dtype, copy=True), w2[own].to(dtype, copy=True)
    made: Any
    chosen: Any
    if form == "batched":
        made = MoebiusBatchedPrepareAndFinalize(exchange, M, R, sends_fp8=sends_fp8)
        room = {"max_num_tokens": M, "num_dispatchers": R}
        cls = experts_of.get(case) or (getattr(fakes, name) if name else MoebiusBatchedCPUExperts)
        chosen = cls(moe_config=config, quant_config=quant, **room)
        if case in experts_of:
            chosen.apply = one_at_a_time(chosen.apply)
    else:
        made = MoebiusStandardPrepareAndFinalize(exchange, M, R, sends_fp8=sends_fp8, takes_pairs=name is None)
        cls = fakes.MappedExperts if name else CPUUnquantizedExperts
        chosen = cls(moe_config=config, quant_config=quant)
        if name is None:
            layer = torch.nn.Module()
            layer.w13_weight = torch.nn.Parameter(mine1, requires_grad=False)
            layer.w2_weight = torch.nn.Parameter(mine2, requires_grad=False)
            chosen.process_weights_after_loading(layer)
            mine1, mine2 = layer.w13_weight, layer.w2_weight
            chosen.apply = one_at_a_time(chosen.apply)
    return mk.FusedMoEKernel(made, chosen), mine1, mine2


def one_at_a_time(call: Callable[..., Any]) -> Callable[..., Any]:
    """Ranks are threads here, and vLLM's C++ experts have one scratchpad for a process; so has Triton's interpreter."""

    def locked(*args: Any, **kwargs: Any) -> Any:
        with SCRATCHPAD:
            return call(*args, **kwargs)

    return locked


def expert_map(rank: int) -> Tensor:
    found = torch.full((E,), -1, dtype=torch.int32)
    found[rank * E // R : (rank + 1) * E // R] = torch.arange(E // R, dtype=torch.int32)
    return found


def routing(rank: int, num_tokens: int, topk: int, kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7 + rank)
    ids = torch.rand(num_tokens, E, generator=generator).topk(topk).indices.to(torch.int32)
    if kind == "padding":
        ids[num_tokens // 2 :] = -1  # as vLLM marks the rows that fill a CUDA graph's batch
    elif kind == "one expert":
        ids[:] = -1
        ids[:, 0] = E - 1
    return ids, torch.rand(num_tokens, topk, generator=generator)


def random_weights(seed: int) -> tuple[Tensor, Tensor]:
    """Those of all experts, [E, 2I, H] and [E, H, I]."""
    generator = torch.Generator().manual_seed(seed)
    w1 = torch.randn(E, 2 * INTERMEDIATE, H, generator=generator) * 0.05
    return w1, torch.randn(E, H, INTERMEDIATE, generator=generator) * 0.1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["random", "padding", "one expert"])
def test_the_kernel_computes_the_layer(case: str, kind: str) -> None:
    check_layer(case, kind, lambda group: Manager(group), lambda kernel: None)


def check_layer(case: str, kind: str, manager_of: Callable[[Any], Any], made: Callable[[Any], None]) -> None:
    """Every rank's kernel, over the exchanges of its manager, against the unsharded layer; `made` is given each."""
    dtype, tolerance = CASES.get(case, CASES["batched"])[2:]
    w1, w2 = random_weights(3)

    def run(rank: int, group: Any) -> None:
        kernel, mine1, mine2 = make_kernel(case, rank, manager_of(group), K, w1, w2)
        made(kernel)
        assert kernel.output_is_reduced()
        assert kernel.can_overlap_shared_experts
        for num_tokens in (5 + rank, M, 0 if rank else 3, 1):
            ids, weights = routing(rank, num_tokens, K, kind)
            x = torch.randn(num_tokens, H, generator=torch.Generator().manual_seed(rank)).to(dtype)
            ran: list[Any] = []
            y = kernel.apply(
                hidden_states=x,
                w1=mine1,
                w2=mine2,
                topk_weights=weights,
                topk_ids=ids,
                activation=kernel.moe_config.activation,
                global_num_experts=E,
                expert_map=expert_map(rank),
                apply_router_weight_on_input=False,
                shared_experts=lambda *call: ran.append(call),  # noqa: B023 - called inside
                shared_experts_input=x,
            )
            assert len(ran) == 1, "shared experts run once, between the halves of combine"
            arriving = through_e4m3(x, is_packed="packed" in case) if "fp8" in case else x
            wanted = reference(arriving, ids, weights, w1.to(dtype), w2.to(dtype))
            assert torch.allclose(y.float(), wanted, atol=tolerance, rtol=tolerance), (y.float() - wanted).abs().max()

    on_every_rank(run)


@pytest.mark.parametrize("case", ["batched", "standard-stock-experts"])
def test_router_weight_on_the_input(case: str) -> None:
    w1, w2 = random_weights(4)

    def run(rank: int, group: Any) -> None:
        kernel, mine1, mine2 = make_kernel(case, rank, Manager(group), 1, w1, w2)
        ids, weights = routing(rank, 6, 1, "random")
        x = torch.randn(6, H, generator=torch.Generator().manual_seed(rank))
        y = kernel.apply(x, mine1, mine2, weights, ids, kernel.moe_config.activation, E, expert_map(rank), True)
        wanted = reference(x, ids, weights, w1, w2, on_input=True)
        assert torch.allclose(y, wanted, atol=1e-5, rtol=1e-5)

    on_every_rank(run)


@pytest.mark.parametrize("case", ["batched", "standard-stock-experts", "standard-mapped"])
def test_two_micro_batches_under_way(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of dual-batch overlap: both dispatches, then both combines, each received by the other's turn."""
    from moebius.vllm import halves, standard

    current = threading.local()
    for module in (halves, standard):
        monkeypatch.setattr(module, "dbo_current_ubatch_id", lambda: current.number)
    w1, w2 = random_weights(5)

    def run(rank: int, group: Any) -> None:
        kernel, mine1, mine2 = make_kernel(case, rank, Manager(group), K, w1, w2)
        made, chosen, map_ = kernel.prepare_finalize, kernel.fused_experts, expert_map(rank)
        for layer in range(3):
            batches = [routing(rank + 2 * layer, 4 + number, K, "random") for number in range(2)]
            xs = [torch.randn(4 + number, H) for number in range(2)]
            outs = [torch.empty_like(x) for x in xs]
            sent = []
            for number, (ids, weights) in enumerate(batches):
                current.number = number
                sent.append(made.prepare_async(xs[number], weights, ids, E, map_, False, chosen.quant_config, False))
            returning = []
            for number, (ids, weights) in enumerate(batches):
                current.number = number
                hook, receiver = sent[number]
                hook()
                x, scales, counts, ids_, weights_ = receiver()
                ids_, weights_ = (ids, weights) if ids_ is None else (ids_, weights_)
                fused = kernel.impl._fused_experts(
                    xs[number].dtype, x, scales, mine1, mine2, weights_, ids_, kernel.moe_config.activation,
                    E, E // R, map_, False, counts,
                )  # fmt: skip
                reduce_ = chosen.finalize_weight_and_reduce_impl()
                returning.append(made.finalize_async(outs[number], fused, weights_, ids_, False, reduce_))
            for number, (hook, receiver) in enumerate(returning):
                current.number = 1 - number  # the hook of one runs in the other's turn
                hook()
                current.number = number
                receiver()
                wanted = reference(xs[number], *batches[number], w1, w2)
                assert torch.allclose(outs[number], wanted, atol=1e-5, rtol=1e-5)

    on_every_rank(run)


def test_equal_layers_share_an_exchange() -> None:
    from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

    from moebius.vllm import layers

    manager = Manager(virtual_ranks(1)[0])
    config, quant = moe_config(0, torch.bfloat16, K), FusedMoEQuantConfig.make()
    first = layers.exchange_of(config, quant, manager, True)(is_fp8=False, scale_format="fp32")
    assert layers.exchange_of(config, quant, manager, True)(is_fp8=False, scale_format="fp32") is first
    assert layers.exchange_of(config, quant, manager, True)(is_fp8=True, scale_format="fp32") is not first


def test_what_is_refused_says_what_to_do() -> None:
    from moebius.vllm import halves, layers

    config = moe_config(0, torch.float64, K)
    with pytest.raises(ConfigError, match=r"carries bf16, fp16, fp32 activations \(got torch.float64\)"):
        layers.exchange_of(config, None, None, True)
    with pytest.raises(ConfigError, match="Choose other experts with --moe-backend"):
        layers.make_prepare_finalize(moe_config(0, torch.bfloat16, K), None, {"use_monolithic": True})
    with pytest.raises(ConfigError, match=r"need top-1 routing \(got top-2\)"):
        halves.weighted_input(torch.zeros(3, H), torch.zeros(3, 2))
