"""Virtual ranks of one device under vLLM's kernel, each with a stream, a workspace and a part of the experts.

To vLLM a rank is a process. Here one thread enqueues them all, so a half on one stream may wait for a half that has yet
to be enqueued on another: nothing in between may wait for the device. That is what `primed` is for, see
tests/graphs/virtual_ranks.py, and why every rank has a workspace of its own.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from moebius import AllToAll, Config, virtual_ranks
from tests.vllm.test_kernel import (
    E,
    H,
    K,
    M,
    R,
    expert_map,
    moe_config,
    random_weights,
    reference,
    through_e4m3,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moebius.group import VirtualRank

LOCAL = E // R
NUM_SMS = 16  # of each half: those of all ranks have to fit on the device at a time
TIMEOUT_S = 10.0
STOCK_BYTES = 64 << 20  # left with the allocator on every stream
DTYPE = torch.bfloat16


class Workspaces:
    """Takes the place of vLLM's workspace manager: hands on to that of the thread's rank."""

    def __init__(self) -> None:
        self.here = threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.here.manager, name)


class Manager:
    """Stands in for the group's manager."""

    def __init__(self, group: VirtualRank, device: torch.device) -> None:
        self.world_size = group.size
        self.made: AllToAll | None = None
        self._group, self._device = group, device

    def get_handle(self, fields: dict[str, Any]) -> AllToAll:
        config = Config(**{**fields, "timeout_s": TIMEOUT_S})
        self.made = AllToAll(self._group, config, self._device, num_sms=NUM_SMS)
        return self.made


@dataclasses.dataclass
class Inputs:
    """What a rank's layer is given: x [T, H] bf16, ids [T, K] int32, weights [T, K] fp32."""

    x: Tensor
    ids: Tensor
    weights: Tensor

    @classmethod
    def of(cls, seed: int, num_tokens: int, num_valid: int | None = None) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.rand(num_tokens, E, generator=generator).topk(K).indices.to(torch.int32)
        if num_valid is not None:
            ids[num_valid:] = -1
        x = torch.randn(num_tokens, H, generator=generator).to(DTYPE)
        return cls(x, ids, torch.rand(num_tokens, K, generator=generator))

    def to(self, device: torch.device) -> Inputs:
        return Inputs(self.x.to(device), self.ids.to(device), self.weights.to(device))

    def copy_(self, other: Inputs) -> None:
        self.x.copy_(other.x)
        self.ids.copy_(other.ids)
        self.weights.copy_(other.weights)


class Rank:
    """vLLM's kernel over our exchange.

    Attributes:
        stream: of its work.
        exchange: ours.
    """

    def __init__(
        self,
        group: VirtualRank,
        stream: torch.cuda.Stream,
        workspace: tuple[Workspaces, Any],
        experts: tuple[Any, bool],
        weights: tuple[Tensor, Tensor],
    ) -> None:
        """Make it; collective. `experts` is their class and whether they take e4m3, `weights` are this rank's."""
        import vllm.model_executor.layers.fused_moe.modular_kernel as mk
        from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig

        from moebius.vllm import layers
        from moebius.vllm.batched import MoebiusBatchedPrepareAndFinalize

        self.stream = stream
        self._workspaces, self._manager = workspace
        self._weights = weights
        num_ranks, most = group.size, M * R // group.size
        manager = Manager(group, stream.device)
        chosen, takes_fp8 = experts
        quant = FusedMoEQuantConfig.make(*([torch.float8_e4m3fn] if takes_fp8 else []), **_block(takes_fp8))
        config = moe_config(group.rank, DTYPE, K)
        config.device, config.num_experts, config.max_num_tokens = str(stream.device), num_ranks * LOCAL, most
        made = MoebiusBatchedPrepareAndFinalize(
            layers.exchange_of(config, quant, manager, True), most, num_ranks, sends_fp8=layers.sends_fp8(config, quant)
        )
        room = {"max_num_tokens": most, "num_dispatchers": num_ranks}
        self.kernel = mk.FusedMoEKernel(made, chosen(moe_config=config, quant_config=quant, **room))
        assert manager.made is not None
        self.exchange = manager.made
        assert self.exchange.config.payload == ("fp8_e4m3" if takes_fp8 else "bf16")
        self._map = expert_map(group.rank)[: num_ranks * LOCAL].to(stream.device)

    def layer(self, inputs: Inputs) -> Tensor:
        """Enqueue the layer on the current stream; returns its result, [T, H]."""
        self._workspaces.here.manager = self._manager
        y: Tensor = self.kernel.apply(
            hidden_states=inputs.x,
            w1=self._weights[0],
            w2=self._weights[1],
            topk_weights=inputs.weights,
            topk_ids=inputs.ids,
            activation=self.kernel.moe_config.activation,
            global_num_experts=len(self._map),
            expert_map=self._map,
            apply_router_weight_on_input=False,
        )
        return y


def _block(takes_fp8: bool) -> dict[str, Any]:
    return {"block_shape": [128, 128]} if takes_fp8 else {}


class Ranks:
    """All of them, primed. Use as a context manager.

    Attributes:
        each: the ranks.
        weights: of all experts, on the host: [E, 2I, H] and [E, H, I] bf16.
    """

    def __init__(self, experts: tuple[Any, bool], num_micro_batches: int = 1) -> None:
        from vllm.v1.worker import workspace

        self.device = torch.device("cuda", 0)
        w1, w2 = random_weights(3)
        self.weights = (w1.to(DTYPE), w2.to(DTYPE))
        self._module, self._before = workspace, workspace._manager
        self._module._manager = workspaces = Workspaces()
        streams = [torch.cuda.Stream(self.device) for _ in range(R)]  # type: ignore[no-untyped-call]
        managers = [workspace.WorkspaceManager(self.device, num_micro_batches) for _ in range(R)]
        parts = [
            tuple(part[rank * LOCAL : (rank + 1) * LOCAL].to(self.device) for part in self.weights) for rank in range(R)
        ]
        for rank, stream in enumerate(streams):
            # Alone, with as many rows for its experts: kernels are loaded and compiled, the workspace gets its size.
            lone = Rank(virtual_ranks(1)[0], stream, (workspaces, managers[rank]), experts, parts[rank])  # type: ignore[arg-type]
            with torch.cuda.stream(stream):
                for number in range(num_micro_batches):
                    with mock.patch.object(workspace, "dbo_current_ubatch_id", lambda number=number: number):
                        for num_tokens in (M, 1, 0, 5):
                            inputs = Inputs.of(num_tokens, num_tokens)
                            inputs.ids %= LOCAL
                            lone.layer(inputs.to(self.device)).clone()
            lone.exchange.synchronize()
            lone.exchange.close()
            managers[rank].lock()
        self.each = [
            Rank(group, streams[rank], (workspaces, managers[rank]), experts, parts[rank])  # type: ignore[arg-type]
            for rank, group in enumerate(virtual_ranks(R))
        ]
        self.stock()

    def stock(self) -> None:
        """Leave memory with the allocator on every stream, so that no call has to ask the device for some."""
        torch.cuda.synchronize()
        for rank in self.each:
            with torch.cuda.stream(rank.stream):
                kept = [torch.empty(STOCK_BYTES, dtype=torch.uint8, device=self.device)]
                kept += [torch.empty(256 << 10, dtype=torch.uint8, device=self.device) for _ in range(32)]
                del kept
        torch.cuda.synchronize()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        for rank in self.each:
            rank.exchange.close()
        self._module._manager = self._before

    def on_streams(self, call: Callable[[int, Rank], Any]) -> list[Any]:
        """Call for every rank, on its stream."""
        results = []
        for number, rank in enumerate(self.each):
            with torch.cuda.stream(rank.stream):
                results.append(call(number, rank))
        return results

    def layers(self, given: Sequence[Inputs]) -> list[Tensor]:
        """Every rank's layer."""
        return self.on_streams(lambda number, rank: rank.layer(given[number]))

    def settle(self) -> None:
        """Wait for everything; raises what a half recorded."""
        torch.cuda.synchronize()
        for rank in self.each:
            rank.exchange.check()

    def compare(self, got: Sequence[Tensor], given: Sequence[Inputs], *, is_fp8: bool, what: str) -> None:
        """Hold what each rank got to the unsharded layer."""
        for rank, (y, inputs) in enumerate(zip(got, given, strict=True)):
            arriving = through_e4m3(inputs.x, is_packed=False) if is_fp8 and len(inputs.x) else inputs.x.float()
            wanted = reference(arriving, inputs.ids, inputs.weights, *self.weights)
            off = (y.cpu().float() - wanted).abs()
            assert torch.allclose(y.cpu().float(), wanted, atol=3e-2, rtol=3e-2), f"{what}, rank {rank}: {off.max()}"
