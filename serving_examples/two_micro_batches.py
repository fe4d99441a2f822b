"""torchrun --nproc-per-node 2 serving_examples/two_micro_batches.py.

Two micro-batches in plain PyTorch: while the tokens of one travel, the other computes. The layers of a micro-batch are
a generator that gives way at every round; `moebius.graphs.interleave` takes them in turn. The result is compared with
that of the same layers on the whole batch, one round after the other.
"""

import torch
import torch.distributed as dist
from torch import Tensor

import moebius
from moebius.graphs import Batch, interleave, moe_layer

EXPERTS, TOPK, HIDDEN, TOKENS, LAYERS = 16, 4, 256, 64, 6


class Model:
    """Layers of a dense part (in place of attention) and experts, of which this rank has its share."""

    def __init__(self, a2a: moebius.AllToAll) -> None:
        """The same random weights on every rank."""
        self.a2a = a2a
        torch.manual_seed(0)
        self.dense, self.router = torch.randn(HIDDEN, HIDDEN) / 16, torch.randn(HIDDEN, EXPERTS) / 16
        up, down = torch.randn(2, EXPERTS, HIDDEN, HIDDEN) / 16
        mine = slice(a2a.rank * EXPERTS // a2a.num_ranks, (a2a.rank + 1) * EXPERTS // a2a.num_ranks)
        self.up, self.down = up[mine], down[mine]

    def experts(self, recv: moebius.Dispatched) -> Tensor:
        """What this rank's experts make of the rows that came; rows past an expert's count stay zero."""
        out = torch.zeros_like(recv.x)
        for expert, count in enumerate(recv.expert_num_tokens.tolist()):
            rows = recv.x[expert, :count]
            out[expert, :count] = torch.nn.functional.silu(rows @ self.up[expert]) @ self.down[expert]
        return out

    def layers(self, x: Tensor) -> Batch[Tensor]:
        """Run all layers on a micro-batch, giving way wherever it would wait."""
        for _ in range(LAYERS):
            h = torch.tanh(x @ self.dense)
            topk_weights, topk_ids = (h @ self.router).softmax(-1).topk(TOPK)
            y = yield from moe_layer(self.a2a, self.experts, h, topk_ids, topk_weights)
            x = torch.nn.functional.normalize(x + y, dim=-1) * HIDDEN**0.5
        return x


def main() -> None:
    """Compare both ways on this rank."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    # Two rounds are under way at a time: depth 2, the default.
    config = moebius.Config(num_experts=EXPERTS, num_topk=TOPK, hidden=HIDDEN, max_num_tokens=TOKENS, payload="fp32")
    with moebius.AllToAll(dist.group.WORLD, config) as a2a:
        model = Model(a2a)
        torch.manual_seed(a2a.rank + 1)  # every rank has tokens of its own
        x = torch.randn(TOKENS, HIDDEN)
        (expected,) = interleave([model.layers(x)])
        found = torch.cat(interleave([model.layers(half) for half in x.chunk(2)]))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        print(f"rank {a2a.rank}: {LAYERS} layers in two micro-batches, equal to the whole batch")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
