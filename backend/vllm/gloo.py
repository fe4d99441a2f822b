"""For comparisons only: vLLM's `allgather_reducescatter` on the CPU, where vLLM does not have it.

On with MOEBIUS_VLLM_GLOO=1, and of no effect on our own backend. What vLLM does on GPUs with one grouped all-gather and
one reduce-scatter is done over gloo with as few steps: one all-gather of padded rows with ids and weights in them, and
one all-to-all of results that are added up on arrival. The experts are the ones that ours have in the standard format,
with the same rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from vllm.distributed import get_ep_group
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.model_executor.layers.fused_moe.prepare_finalize.naive_dp_ep import MoEPrepareAndFinalizeNaiveDPEPModular

from .pairs import Pairs

if TYPE_CHECKING:
    from torch import Tensor


class GlooCommunicator(CpuCommunicator):  # type: ignore[misc]
    """vLLM's communicator for the CPU with the two collectives that it lacks."""

    def __init__(
        self, cpu_group: Any, device: Any = None, device_group: Any = None, unique_name: str = "", **kwargs: Any
    ) -> None:
        """As its base; the first expert-parallel group changes what layers get."""
        super().__init__(cpu_group, device, device_group, unique_name, **kwargs)
        if unique_name.split(":")[0] == "ep":
            _install_in_layers()

    def all_gatherv(
        self, input_: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None
    ) -> Tensor | list[Tensor]:
        """The rows of all ranks, of one tensor or of several, in one collective."""
        tensors = input_ if isinstance(input_, list) else [input_]
        num_rows = tensors[0].shape[0]
        sizes = sizes or [num_rows] * self.world_size
        rows = [tensor.contiguous().view(num_rows, -1).view(torch.uint8) for tensor in tensors]
        widths = [part.shape[1] for part in rows]
        most = max(sizes)
        sent = torch.empty(most, sum(widths), dtype=torch.uint8)
        torch.cat(rows, dim=1, out=sent[:num_rows])
        came = torch.empty(self.world_size * most, sum(widths), dtype=torch.uint8)
        dist.all_gather_into_tensor(came, sent, group=self.device_group)
        if min(sizes) < most:
            came = torch.cat([came[rank * most :][:size] for rank, size in enumerate(sizes)])
        parts = [
            part.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:])
            for tensor, part in zip(tensors, torch.split(came, widths, dim=1), strict=True)
        ]
        return parts if isinstance(input_, list) else parts[0]

    def reduce_scatterv(self, input_: Tensor, dim: int = -1, sizes: list[int] | None = None) -> Tensor:
        """The sum over ranks of this rank's rows."""
        sizes = sizes or [input_.shape[0] // self.world_size] * self.world_size
        mine = sizes[self.rank_in_group]
        came = input_.new_empty(self.world_size * mine, *input_.shape[1:])
        dist.all_to_all_single(came, input_.contiguous(), [mine] * self.world_size, sizes, group=self.device_group)
        return came.view(self.world_size, mine, *input_.shape[1:]).sum(0)


class GlooPrepareAndFinalize(MoEPrepareAndFinalizeNaiveDPEPModular):  # type: ignore[misc]
    """vLLM's own over all-gather and reduce-scatter; its experts for the CPU get the pairs that are theirs."""

    def allocate_fused_expert_output(self, *_: Any, **__: Any) -> None:
        """Nothing: pairs have a size of their own."""

    def prepare(
        self,
        a1: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor,
        *rest: Any,
        **more: Any,
    ) -> Any:
        """Gather, and keep the choices of this rank's experts."""
        given = (a1, topk_weights, topk_ids, num_experts, expert_map, *rest)
        x, _, _, ids, weights = super().prepare(*given, **more)
        self._pairs = pairs = Pairs.of(expert_map[ids.long()].where(ids >= 0, -1), weights)
        self._num_rows = ids.shape[0]
        return x[pairs.rows], None, None, pairs.ids, pairs.ones()

    def finalize(self, output: Tensor, fused_expert_output: Tensor, *_: Any, **__: Any) -> None:
        """Add up what this rank has of each token, and reduce over ranks."""
        total = self._pairs.add_up(fused_expert_output, self._num_rows)
        get_ep_group().combine_into_output(total, output, is_sequence_parallel=self.is_sequence_parallel)


def install() -> None:
    """Take the place of the platform's communicator, on the CPU. Called when the plugin is loaded."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        type(current_platform).get_device_communicator_cls = classmethod(lambda cls: f"{__name__}.GlooCommunicator")


def _install_in_layers() -> None:
    from vllm.model_executor.layers.fused_moe import all2all_utils

    from .patches import rebind

    before = all2all_utils.maybe_make_prepare_finalize
    if hasattr(before, "is_gloo"):
        return

    def maybe_make_prepare_finalize(moe: Any, *args: Any, **kwargs: Any) -> Any:
        made = before(moe, *args, **kwargs)
        if type(made) is not MoEPrepareAndFinalizeNaiveDPEPModular or not moe.moe_parallel_config.use_ep:
            return made
        return GlooPrepareAndFinalize(made.is_sequence_parallel, made.num_dispatchers())

    maybe_make_prepare_finalize.is_gloo = True  # type: ignore[attr-defined]
    rebind("maybe_make_prepare_finalize", before, maybe_make_prepare_finalize)
