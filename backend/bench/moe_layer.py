"""A mixture-of-experts layer in torch: router, SwiGLU experts, shared expert; whole, or spread over ranks.

The router must choose the same experts in both, whatever batch a token is in, or nothing could be compared. So it
scores on a grid: tokens and its weights are rounded to small integers, whose fp32 dot products are exact (below 2^24)
in any order of summation; ties go to the lower expert.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F  # torch's own abbreviation
from torch import Tensor

from .baseline import dequantise_fp8, quantise_fp8
from .workload import DTYPES, Workload, generator, input_dtype, popularity

if TYPE_CHECKING:
    from moebius.config import Config

_EXACT = 2**24  # integers that fp32 holds exactly
# Expert rows may differ by one unit in the last place (GEMMs of other batch sizes add in another order); then the sum
# of a rank, the sum of the ranks and the sum with the shared expert are rounded, half a unit each: 2.5 units, of the
# largest term in the token's row. fp32 rows differ by the order of the GEMM's own sums instead.
TOLERANCE_UNITS = 3.0
TOLERANCE_FLOOR = 1e-4


class Received(Protocol):
    """What dispatch hands to the experts: `moebius.Dispatched` and `baseline.Arrived` both fit."""

    @property
    def x(self) -> Tensor:
        """[L, R*M, H] or [N, H]."""

    @property
    def scales(self) -> Tensor | None:
        """Of FP8."""

    @property
    def expert_num_tokens(self) -> Tensor | None:
        """[L], expert_major."""

    @property
    def topk_ids(self) -> Tensor | None:
        """[N, K], token_major."""

    @property
    def topk_weights(self) -> Tensor | None:
        """[N, K], token_major."""


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """SwiGLU.

    Attributes:
        gate_up: [2I, H].
        down: [H, I].
    """

    gate_up: Tensor
    down: Tensor

    @classmethod
    def create(cls, hidden: int, intermediate: int, dtype: torch.dtype, random: torch.Generator) -> FeedForward:
        """Random weights that keep the size of their input."""
        gate_up = torch.randn(2 * intermediate, hidden, generator=random) / math.sqrt(hidden)
        down = torch.randn(hidden, intermediate, generator=random) * (2.0 / math.sqrt(intermediate))
        return cls(gate_up.to(dtype), down.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """[N, H] to [N, H]."""
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)


class Router:
    """Chooses experts and weights; exact, hence independent of batch, blocking and machine."""

    def __init__(self, workload: Workload) -> None:
        """Draw the weights and the bias that makes the wanted popularity."""
        limit = math.isqrt(_EXACT // workload.hidden)
        random = generator(workload.seed, 3)
        self._limit, self._grid = limit, limit / 4.0  # four standard deviations fit
        weight = torch.randn(workload.experts, workload.hidden, generator=random) * self._grid
        self._weight = weight.round().clamp(-limit, limit)
        self._spread = self._grid**2 * math.sqrt(workload.hidden)  # standard deviation of a score
        liked = popularity(workload.routing, workload.experts, workload.seed).clamp(max=100.0)
        self._bias = (liked * self._spread).round()
        self._num_experts, self._topk = workload.experts, workload.topk
        self._tie_break = torch.arange(workload.experts, dtype=torch.float64)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Route x [T, H].

        Returns:
            topk_ids [T, K] int32 and topk_weights [T, K] fp32 (softmax over the chosen).
        """
        on_grid = (x.float() * self._grid).round_().clamp_(-self._limit, self._limit)
        scores = F.linear(on_grid, self._weight).double() + self._bias
        ids = (scores * self._num_experts - self._tie_break).topk(self._topk).indices
        chosen = scores.gather(1, ids) - self._bias[ids]
        return ids.int(), torch.softmax(chosen / self._spread, dim=1).float()


class Experts:
    """A contiguous range of the layer's experts. An expert's weights depend on the seed and its number only."""

    def __init__(self, workload: Workload, intermediate: int, first: int, count: int) -> None:
        """Make experts `first` to `first + count - 1`."""
        self.config = workload.config()
        self.dtype = DTYPES[self.config.output_dtype]
        self.experts = [
            FeedForward.create(workload.hidden, intermediate, self.dtype, generator(workload.seed, 4, expert))
            for expert in range(first, first + count)
        ]

    def __call__(self, received: Received, out: Tensor) -> Tensor:
        """Run the local experts on what dispatch brought.

        Args:
            received: in the layout of the config.
            out: where the rows for combine go: [L, R*M, H], or [rows of received.x, H].

        Returns:
            `out`; `expert_major` leaves rows past an expert's count as they were.
        """
        if self.config.layout == "expert_major":
            self._run_batched(received, out)
        else:
            self._run_in_place(received, out)
        return out

    def touch(self) -> None:
        """Read all weights, as a step does: what was cached before is gone."""
        row = torch.zeros(1, self.config.hidden, dtype=self.dtype)
        for expert in self.experts:
            expert(row)

    def _rows(self, x: Tensor, scales: Tensor | None) -> Tensor:
        return x if scales is None else dequantise_fp8(x, scales, self.dtype)

    def _run_batched(self, received: Received, out: Tensor) -> None:
        assert received.expert_num_tokens is not None  # expert_major has them
        for local, count in enumerate(received.expert_num_tokens.tolist()):
            if count:
                scales = None if received.scales is None else received.scales[local, :count]
                out[local, :count] = self.experts[local](self._rows(received.x[local, :count], scales))

    def _run_in_place(self, received: Received, out: Tensor) -> None:
        ids, weights = received.topk_ids, received.topk_weights
        assert ids is not None  # token_major has both
        assert weights is not None
        row, choice = (ids >= 0).nonzero(as_tuple=True)
        expert, order = ids[row, choice].sort(stable=True)
        row, weight = row[order], weights[row, choice][order].unsqueeze(1)
        counts = torch.bincount(expert, minlength=len(self.experts)).tolist()
        total = torch.zeros(len(ids), out.shape[1])
        first = 0
        for local, count in enumerate(counts):
            rows = row[first : first + count]
            if count:
                scales = None if received.scales is None else received.scales[rows]
                result = self.experts[local](self._rows(received.x[rows], scales))
                total.index_add_(0, rows, result.float().mul_(weight[first : first + count]))
            first += count
        out.copy_(total)


@dataclasses.dataclass(frozen=True)
class Expected:
    """What one process computed for one step.

    Attributes:
        x: [R, T, H] the step's input.
        topk_ids: [R, T, K] int32.
        y: [R, T, H] fp32 output of the layer.
        scale: [R, T] fp32, the largest term of the token's sum; errors are measured against it.
    """

    x: Tensor
    topk_ids: Tensor
    y: Tensor
    scale: Tensor


class WholeLayer:
    """The layer with all its experts in one process: what every spread step is checked against."""

    def __init__(self, workload: Workload, intermediate: int) -> None:
        """Make router, experts and shared expert."""
        self.workload, self.config = workload, workload.config()
        self.router = Router(workload)
        self.experts = Experts(workload, intermediate, 0, workload.experts)
        self.shared = shared_expert(workload, intermediate)

    def expect(self, step: int) -> Expected:
        """Draw the input of a step for all ranks, and compute the layer on all of it at once."""
        workload = self.workload
        x = torch.stack([step_input(workload, rank, step) for rank in range(workload.ranks)])
        tokens = x.flatten(0, 1)
        ids, weights = self.router(tokens)
        routed = tokens
        if self.config.payload == "fp8_e4m3":
            routed = dequantise_fp8(*quantise_fp8(tokens), self.experts.dtype)
        total = torch.zeros(len(tokens), workload.hidden)
        terms = torch.zeros_like(total)
        for number, expert in enumerate(self.experts.experts):
            row, choice = (ids == number).nonzero(as_tuple=True)
            if len(row):
                term = expert(routed[row]).float() * weights[row, choice].unsqueeze(1)
                total.index_add_(0, row, term)
                terms.index_add_(0, row, term.abs())
        shared = self.shared(tokens).float()
        shape = (workload.ranks, workload.tokens)
        return Expected(
            x=x,
            topk_ids=ids.view(*shape, -1),
            y=(total + shared).view(*shape, -1),
            scale=(terms + shared.abs()).amax(1).view(shape),
        )


def shared_expert(workload: Workload, intermediate: int) -> FeedForward:
    """The expert that every token passes on its own rank."""
    dtype = DTYPES[workload.config().output_dtype]
    return FeedForward.create(workload.hidden, intermediate, dtype, generator(workload.seed, 5))


def step_input(workload: Workload, rank: int, step: int) -> Tensor:
    """[T, H]: the tokens of a rank in a step, standard normal."""
    random = generator(workload.seed, 6, rank, step)
    return torch.randn(workload.tokens, workload.hidden, generator=random).to(input_dtype(workload.config()))


def tolerance(config: Config) -> float:
    """The largest error allowed, as a fraction of `Expected.scale`."""
    return max(TOLERANCE_UNITS * torch.finfo(DTYPES[config.output_dtype]).eps, TOLERANCE_FLOOR)


def worst_error(out: Tensor, expected: Tensor, scale: Tensor) -> float:
    """The largest difference of any element, as a fraction of its token's `scale`; NaN is infinite."""
    error = ((out.float() - expected).abs().amax(1) / scale).nan_to_num_(nan=math.inf)
    return float(error.max()) if len(error) else 0.0
