"""The same rounds in plain torch on the same lanes: index, quantise, copy. What ours is compared with on a device.

It is given what a real one would have to find out: which token goes where is counted before anything is timed, so it
sends no ids, no weights, no counts and waits for no signal; joins between the halves order its ranks. One row per
(token, rank), gathered straight into the receiver's memory; expert_major rows are gathered once more, grouped by
expert without gaps; token_major leaves them where they are. The experts' rows are reduced on their rank before they
come home (`embedding_bag`, weights in the rows' dtype).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # torch's own abbreviation
from torch import Tensor

from moebius.bench.baseline import padded_row_bytes, quantise_fp8
from moebius.bench.workload import DTYPES, input_dtype, payload_row_bytes

if TYPE_CHECKING:
    from moebius.config import Config

    from .devices import Device

WORD = torch.int64  # rows move as these


@dataclasses.dataclass
class _Plan:
    """Indices of one rank in one routing.

    Attributes:
        sent: [R] tokens that go to each rank.
        counts: [R] rows received from each rank.
        homes: [S] row of `home` for each (token, rank), by token.
        home_offsets: [T] first of `homes` of each token.
        rows: expert_major: [P] row of the inbox for each (token, expert), by expert, then source and token.
        slots: expert_major: [P] position among `rows` of each pair, by received row.
        weights: expert_major: [P] weight of each of `slots`.
        offsets: expert_major: [N] first of `slots` of each received row.
    """

    sent: list[Tensor]
    counts: list[int]
    homes: Tensor
    home_offsets: Tensor
    rows: Tensor | None = None
    slots: Tensor | None = None
    weights: Tensor | None = None
    offsets: Tensor | None = None


class TorchExchange:
    """Halves of a round over torch; every rank of the group is a lane of the device."""

    def __init__(
        self,
        device: Device,
        config: Config,
        inputs: list[list[Tensor]],
        routes: list[list[tuple[Tensor, Tensor]]],
        expert_out: list[Tensor],
    ) -> None:
        """Count everything, allocate everything.

        Args:
            device: with one lane a rank.
            config: the shape.
            inputs: of each rank, of each routing: [T, H].
            routes: likewise, on the host: topk_ids [T, K], topk_weights [T, K].
            expert_out: of each rank: rows that the experts would return.
        """
        self._config, self._inputs, self._expert_out = config, inputs, expert_out
        ranks, where = len(inputs), device.where
        self._num_ranks, self._num_local = ranks, config.num_experts // ranks
        self._dtype = DTYPES[config.output_dtype]
        steps = range(len(routes[0]))
        self.plans = [
            [self._plan(rank, [lane[step] for lane in routes], where) for rank in range(ranks)] for step in steps
        ]
        words = padded_row_bytes(config) // WORD.itemsize
        most = ranks * max(len(ids) for lane in routes for ids, _ in lane)
        self._inbox = [torch.zeros(most, words, dtype=WORD, device=where) for _ in inputs]
        pairs = max((len(plan.rows) for step in self.plans for plan in step if plan.rows is not None), default=0)
        self._packed = [torch.zeros(pairs, words, dtype=WORD, device=where) for _ in inputs]
        self._home = [torch.zeros(most, config.hidden, dtype=self._dtype, device=where) for _ in inputs]
        self.combined: list[Tensor] = [torch.empty(0) for _ in inputs]
        device.synchronize()  # lanes do not follow the stream that this ran on

    def _plan(self, rank: int, routes: list[tuple[Tensor, Tensor]], where: torch.device) -> _Plan:
        ranks, local = self._num_ranks, self._num_local
        targets = [_targets(ids, ranks, local) for ids, _ in routes]
        sent = [targets[rank][:, peer].nonzero().flatten() for peer in range(ranks)]
        counts = [int(target[:, rank].sum()) for target in targets]
        # Where each (token, rank) lies in `home`: by rank, then token.
        begin = torch.tensor([0, *map(len, sent)]).cumsum(0)
        place = targets[rank].long().cumsum(0) - 1 + begin[:-1]
        tokens, peers = targets[rank].nonzero(as_tuple=True)
        per_token = targets[rank].sum(1)
        homes, home_offsets = place[tokens, peers], per_token.cumsum(0) - per_token
        plan = _Plan([one.to(where) for one in sent], counts, homes.to(where), home_offsets.to(where))
        if self._config.layout == "expert_major":
            rows, slots, weights, offsets = (one.to(where) for one in self._pairs(rank, routes, targets))
            plan.rows, plan.slots, plan.weights, plan.offsets = rows, slots, weights, offsets
        return plan

    def _pairs(
        self, rank: int, routes: list[tuple[Tensor, Tensor]], targets: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The (token, expert) pairs of a rank: rows by expert; slots, weights and offsets by received row."""
        chosen, weight, cells = [], [], []
        for source, (ids, weights) in enumerate(routes):
            arrives = targets[source][:, rank]
            here = torch.where(ids // self._num_local == rank, ids - rank * self._num_local, self._num_local)[arrives]
            by_expert = torch.zeros(len(here), self._num_local + 1)
            by_expert.scatter_add_(1, here.long(), weights[arrives])
            mark = torch.zeros(len(here), self._num_local + 1, dtype=torch.bool)
            mark.scatter_(1, here.long(), value=True)
            chosen.append(mark[:, :-1])
            weight.append(by_expert[:, :-1])
            cells.append(source * len(ids) + torch.arange(len(here)))
        mark, by_expert, cell = torch.cat(chosen), torch.cat(weight), torch.cat(cells)
        expert, row = mark.t().nonzero(as_tuple=True)
        position = torch.zeros(mark.shape, dtype=torch.int64)
        position[row, expert] = torch.arange(len(row))
        row_of, expert_of = mark.nonzero(as_tuple=True)
        per_row = mark.sum(1)
        weights = by_expert[row_of, expert_of].to(self._dtype)
        return cell[row], position[row_of, expert_of], weights, per_row.cumsum(0) - per_row

    def step(self, lane: int, half: str, number: int) -> None:
        """See `schedules.Exchange`."""
        step = number % len(self.plans)
        plan, stride = self.plans[step][lane], len(self._inputs[lane][step])
        if half == "dispatch_send":
            rows = self._rows(self._inputs[lane][step])
            for peer, tokens in enumerate(plan.sent):
                target = self._inbox[peer][lane * stride : lane * stride + len(tokens)]
                torch.index_select(rows, 0, tokens, out=target)
        elif half == "dispatch_recv":
            if plan.rows is not None:
                torch.index_select(self._inbox[lane], 0, plan.rows, out=self._packed[lane][: len(plan.rows)])
        elif half == "combine_send":
            self._reply(lane, plan, step)
        else:
            home = self._home[lane]
            self.combined[lane] = F.embedding_bag(plan.homes, home, plan.home_offsets, mode="sum")

    def _rows(self, x: Tensor) -> Tensor:
        if self._config.payload != "fp8_e4m3":
            return x.view(WORD)
        quantised, scales = quantise_fp8(x)
        row = torch.cat([quantised.view(torch.uint8), scales.view(torch.uint8)], dim=1)
        padding = padded_row_bytes(self._config) - payload_row_bytes(self._config)
        return (F.pad(row, (0, padding)) if padding else row).view(WORD)

    def _reply(self, lane: int, plan: _Plan, step: int) -> None:
        """Reduce, and copy each source's rows home: there they lie by rank, then token."""
        rows, most = self._expert_out[lane], self._config.max_num_tokens
        if plan.slots is not None:
            rows = rows.view(-1, self._config.hidden)
            rows = F.embedding_bag(plan.slots, rows, plan.offsets, mode="sum", per_sample_weights=plan.weights)
        first = 0
        for source, count in enumerate(plan.counts):
            begin = sum(len(sent) for sent in self.plans[step][source].sent[:lane])
            taken = (
                rows[first : first + count] if plan.slots is not None else rows[source * most : source * most + count]
            )
            self._home[source][begin : begin + count].copy_(taken)
            first += count

    def received(self, lane: int, step: int) -> Tensor:
        """expert_major: [P, H] the tokens of a rank by expert, in the payload's dtype (scales left out); for checks."""
        plan, hidden = self.plans[step][lane], self._config.hidden
        assert plan.rows is not None
        bytes_of = self._packed[lane][: len(plan.rows)].view(torch.uint8)
        dtype = torch.float8_e4m3fn if self._config.payload == "fp8_e4m3" else input_dtype(self._config)
        return bytes_of[:, : hidden * dtype.itemsize].view(dtype)


def _targets(ids: Tensor, num_ranks: int, num_local: int) -> Tensor:
    """[T, R] bool: which ranks each token goes to."""
    mark = torch.zeros(len(ids), num_ranks + 1, dtype=torch.bool)
    mark.scatter_(1, torch.where(ids < 0, num_ranks, ids // num_local).long(), value=True)
    return mark[:, :num_ranks]
