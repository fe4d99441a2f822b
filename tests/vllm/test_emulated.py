"""vLLM's own kernel with our classes over the CUDA engine's kernels, on the host executor: what a GPU is to do."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moebius import ConfigError, PeerTimeoutError, reference, virtual_ranks
from tests.helpers import simt
from tests.vllm import emulated, test_kernel
from tests.vllm.emulated import EmulatedManager, Meeting
from tests.vllm.marks import needs_vllm
from tests.vllm.micro_batches import Contexts
from tests.vllm.test_kernel import CASES, E, H, K, M, R, make_kernel, random_weights, routing

pytestmark = [needs_vllm, pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))]
# A row for each pair, as vLLM's experts for the CPU have them, is made by the host.
ON_GPU = [case for case in CASES if case != "standard-stock-experts"]
LAYERS = 3


@pytest.fixture(autouse=True)
def _world() -> None:
    simt.extension().reset(simt.seed_of_test())


@pytest.mark.parametrize("case", ON_GPU)
@pytest.mark.parametrize("kind", ["random", "padding"])
def test_the_kernel_computes_the_layer_and_the_host_waits_for_nothing(case: str, kind: str) -> None:
    meeting = Meeting(R)
    managers: list[EmulatedManager] = []
    waits: list[list[str]] = []

    def watch(kernel: Any) -> None:
        waits.append(emulated.watch(kernel.prepare_finalize))

    def manager_of(group: Any) -> EmulatedManager:
        managers.append(EmulatedManager(group, meeting))
        return managers[-1]

    test_kernel.check_layer(case, kind, manager_of, watch)
    assert [found for found in waits if found] == []
    for manager in managers:
        assert manager.made is not None
        assert manager.made.asked == emulated.HALVES
        assert manager.made.order == ["dispatch_send", "dispatch_recv", "combine_send", "combine_recv"] * 4


def test_what_waits_is_noticed() -> None:
    x, found = torch.arange(6.0), []  # type: tuple[Tensor, list[str]]

    def halves() -> tuple[Any, Any]:
        x.to(torch.float64)
        return (lambda: x[x > 2], lambda: x.max().item())

    for part in emulated.waits_of(halves, found)():
        part()
    assert {"aten.index", "item"} <= set(found)


@pytest.mark.parametrize("case", ["batched", "standard-mapped", "batched-fp8"])
def test_dual_batch_overlap_by_vllm_s_own_threads(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches through some layers, switched by vLLM's own contexts where its kernel says."""
    from vllm.v1.worker import ubatching

    stream = object()
    contexts = Contexts(monkeypatch)
    monkeypatch.setattr(ubatching, "current_stream", lambda: stream)
    monkeypatch.setattr(ubatching, "torch", SimpleNamespace(Event=object))
    w1, w2 = random_weights(5)
    dtype, tolerance = CASES[case][2:]
    meeting = Meeting(R)

    def run(rank: int, group: Any) -> None:
        manager = EmulatedManager(group, meeting)
        kernel, mine1, mine2 = make_kernel(case, rank, manager, K, w1, w2)
        assert manager.made is not None
        waits = emulated.watch(kernel.prepare_finalize)
        order = manager.made.order
        results: list[Any] = []

        def micro_batch(number: int) -> None:
            for layer in range(LAYERS):
                check(number, layer)

        def check(number: int, layer: int) -> None:
            ids, weights = routing(rank + 2 * layer, 4 + number, K, "random")
            x = torch.randn(4 + number, H, generator=torch.Generator().manual_seed(rank + 7 * number)).to(dtype)
            y = kernel.apply(
                hidden_states=x, w1=mine1, w2=mine2, topk_weights=weights, topk_ids=ids,
                activation=kernel.moe_config.activation, global_num_experts=E,
                expert_map=test_kernel.expert_map(rank), apply_router_weight_on_input=False,
            )  # fmt: skip
            # On a GPU all of this is enqueued only; here the combine is received after y was handed out.
            results.append((number, layer, x, ids, weights, y))

        contexts.in_turn(rank, micro_batch, stream)
        for number, layer, x, ids, weights, y in results:
            arriving = test_kernel.through_e4m3(x, is_packed=False) if "fp8" in case else x
            wanted = test_kernel.reference(arriving, ids, weights, w1, w2)
            assert torch.allclose(y, wanted, atol=tolerance, rtol=tolerance), f"micro-batch {number}, layer {layer}"
        assert len(results) == 2 * LAYERS
        assert waits == []
        assert manager.made.asked == emulated.HALVES
        # A half is received in the other's turn, just before the other sends: first the one's send and experts, so to
        # say, then the other's.
        both = ["dispatch_send", "dispatch_recv"] * 2 + ["combine_send", "combine_recv"] * 2
        assert order == both * LAYERS

    test_kernel.on_every_rank(run)


class Known:
    """Makes experts of a class compute nothing: what they give is filled in when it is known.

    Attributes:
        output: [L, R*M, H] of the last call.
    """

    def __init__(self, experts: Any) -> None:
        experts.apply = self._apply
        self.output = torch.empty(0)

    def _apply(self, **call: Any) -> None:
        self.output = call["output"]


class Ranks:
    """All ranks in one thread, which enqueues everything before anything is run; with a captured layer each."""

    def __init__(self) -> None:
        self.w1, self.w2 = random_weights(6)
        self.managers = [EmulatedManager(group) for group in virtual_ranks(R)]
        made = [make_kernel("batched", rank, self.managers[rank], K, self.w1, self.w2) for rank in range(R)]
        self.kernels = [kernel for kernel, *_ in made]
        self.weights = [weights for _, *weights in made]
        self.known = [Known(kernel.fused_experts) for kernel in self.kernels]
        self.exchanges = [manager.made for manager in self.managers if manager.made is not None]
        self.inputs = [(torch.zeros(M, H), *routing(rank, M, K, "random")) for rank in range(R)]
        self.graphs: list[Any] = []
        self.captured: list[tuple[Tensor, Tensor]] = []
        for rank in range(R):
            # As vLLM captures: every row is padding.
            self.inputs[rank][1].fill_(-1)
            self.exchanges[rank].begin_capture()
            y = self.apply(rank)
            self.graphs.append(self.exchanges[rank].end_capture())
            self.captured.append((self.known[rank].output, y))

    def apply(self, rank: int) -> Tensor:
        x, ids, weights = self.inputs[rank]
        kernel = self.kernels[rank]
        y: Tensor = kernel.apply(
            hidden_states=x, w1=self.weights[rank][0], w2=self.weights[rank][1], topk_weights=weights, topk_ids=ids,
            activation=kernel.moe_config.activation, global_num_experts=E,
            expert_map=test_kernel.expert_map(rank), apply_router_weight_on_input=False,
        )  # fmt: skip
        return y

    def fill(self, seed: int, num_tokens: int) -> None:
        """New tokens in the same memory, the rest of the rows padding."""
        for rank, (x, ids, weights) in enumerate(self.inputs):
            new_ids, new_weights = routing(seed + rank, M, K, "random")
            ids.copy_(new_ids)
            ids[num_tokens:] = -1
            weights.copy_(new_weights)
            x.copy_(torch.randn(M, H, generator=torch.Generator().manual_seed(seed + rank)))

    def run(self, *, is_replayed: bool) -> None:
        """One layer on every rank, against the unsharded one."""
        from tests.vllm.experts import expert

        config = self.exchanges[0].config
        given = [reference.RankInput(x=x, topk_ids=ids, topk_weights=weights) for x, ids, weights in self.inputs]
        received = reference.dispatch(config, given)
        targets = []
        for rank in range(R):
            if is_replayed:
                output, y = self.captured[rank]
                self.graphs[rank].replay(self.exchanges[rank].stream)
            else:
                y = self.apply(rank)
                output = self.known[rank].output
            targets.append(y)
            own = range(rank * E // R, (rank + 1) * E // R)
            output.fill_(torch.nan)
            for local, e in enumerate(own):
                rows = received[rank].x[local, : int(received[rank].expert_num_tokens[local])]
                output[local, : len(rows)] = expert(rows, self.w1[e], self.w2[e])
        simt.extension().run_until_idle()
        for rank, y in enumerate(targets):
            wanted = test_kernel.reference(*self.inputs[rank], self.w1, self.w2)
            assert torch.allclose(y, wanted, atol=1e-5, rtol=1e-5), f"rank {rank}"


def test_a_captured_layer_replayed_between_eager_ones() -> None:
    ranks = Ranks()
    for number in range(40):
        ranks.fill(100 + 3 * number, (M, 1, 0, 7)[number % 4])
        ranks.run(is_replayed=number % 3 != 2)
    for exchange in ranks.exchanges:
        assert exchange.asked == emulated.HALVES


def test_a_fault_of_a_replay_is_raised_by_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by a call of ours, as a replay has none: around the worker's step, and before its tokens are handed out."""
    from moebius.vllm import steps

    ranks = Ranks()
    ranks.fill(1, M)
    monkeypatch.setattr(steps, "_exchanges", set())
    steps.watch(ranks.exchanges[0])
    waited = []

    class Output:
        def get_output(self) -> str:
            simt.extension().run_until_idle()
            waited.append(True)
            return "tokens"

    def alone(*, is_asynchronous: bool) -> Any:
        ranks.graphs[0].replay(ranks.exchanges[0].stream)  # the other rank never answers
        if is_asynchronous:
            return Output()
        simt.extension().run_until_idle()
        return "tokens"

    step = steps.checking(alone)
    output = step(is_asynchronous=True)
    with pytest.raises(PeerTimeoutError, match="rank 1"):
        output.get_output()
    assert waited == [True]
    steps.check()  # raised once


def test_a_fault_is_raised_before_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from moebius.vllm import steps

    ranks = Ranks()
    ranks.fill(1, M)
    monkeypatch.setattr(steps, "_exchanges", set())
    steps.watch(ranks.exchanges[0])
    ranks.graphs[0].replay(ranks.exchanges[0].stream)
    simt.extension().run_until_idle()
    ran = []
    with pytest.raises(PeerTimeoutError, match="rank 1"):
        steps.checking(lambda: ran.append(True))()
    assert ran == []
    steps.checking(lambda: ran.append(True))()
    assert ran == [True]


def test_the_manager_gives_the_exchange_its_device_and_sms(monkeypatch: pytest.MonkeyPatch) -> None:
    from moebius.vllm import patches, steps

    monkeypatch.setitem(
        patches._installed,
        "platform_communicator",
        "vllm.distributed.device_communicators.cpu_communicator.CpuCommunicator",
    )
    from moebius.vllm import communicator

    given: list[Any] = []
    monkeypatch.setattr(steps, "_exchanges", set())
    monkeypatch.setattr(communicator, "AllToAll", lambda *args, **kwargs: given.append((args[2], kwargs)))
    manager = object.__new__(communicator.MoebiusAll2AllManager)
    manager.cpu_group = None
    fields = {"num_experts": E, "num_topk": K, "hidden": H, "max_num_tokens": M}
    monkeypatch.setenv("MOEBIUS_VLLM_NUM_SMS", "24")
    for device in ("cuda:3", "cpu"):
        manager.device = torch.device(device)
        manager._make(**fields)
    assert given == [(torch.device("cuda:3"), {"num_sms": 24}), (torch.device("cpu"), {"num_sms": None})]
    assert manager.max_sms_used() == 0
    for wrong in ("0", "-3", "many"):
        monkeypatch.setenv("MOEBIUS_VLLM_NUM_SMS", wrong)
        manager.device = torch.device("cuda:0")
        with pytest.raises(ConfigError, match="MOEBIUS_VLLM_NUM_SMS"):
            manager._make(**fields)
