"""torchrun --nproc-per-node 2 serving_examples/overlapped_layer.py.

A decode loop of one MoE layer in plain PyTorch: each rank holds half of the experts, and the shared expert is computed
while the tokens travel. The result is compared with the same layer computed in one piece.
"""

import torch
import torch.distributed as dist
from torch import Tensor

import moebius

EXPERTS, TOPK, HIDDEN, TOKENS, STEPS = 16, 4, 256, 32, 20


def expert(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """One feed-forward expert, or several at once over a leading dimension."""
    return torch.nn.functional.silu(x @ up) @ down


def main() -> None:
    """Run the loop on this rank."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights on every rank; each keeps its share of the experts
    up, down = torch.randn(EXPERTS, HIDDEN, HIDDEN) / 16, torch.randn(EXPERTS, HIDDEN, HIDDEN) / 16
    shared_up, shared_down = torch.randn(HIDDEN, HIDDEN) / 16, torch.randn(HIDDEN, HIDDEN) / 16
    router = torch.randn(HIDDEN, EXPERTS) / 16
    mine = slice(rank * EXPERTS // num_ranks, (rank + 1) * EXPERTS // num_ranks)

    config = moebius.Config(num_experts=EXPERTS, num_topk=TOPK, hidden=HIDDEN, max_num_tokens=TOKENS, payload="fp32")
    torch.manual_seed(rank + 1)  # every rank decodes tokens of its own
    x = torch.randn(TOKENS, HIDDEN)
    with moebius.AllToAll(dist.group.WORLD, config) as a2a:
        for _ in range(STEPS):
            topk_weights, topk_ids = (x @ router).softmax(-1).topk(TOPK)

            dispatching = a2a.dispatch_send(x, topk_ids, topk_weights)
            shared = expert(x, shared_up, shared_down)  # the tokens travel meanwhile
            recv = dispatching.receive()
            most = int(recv.expert_num_tokens.max())  # rows past an expert's count are undefined, and not read
            expert_out = torch.zeros_like(recv.x)
            expert_out[:, :most] = expert(recv.x[:, :most].nan_to_num(), up[mine], down[mine])
            y = a2a.combine(expert_out, recv) + shared

            rows = expert(x[:, None, None], up[topk_ids], down[topk_ids])[:, :, 0]
            expected = (rows * topk_weights[..., None]).sum(1) + shared
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            x = torch.nn.functional.normalize(y, dim=-1) * HIDDEN**0.5  # what the next layer would be given
    print(f"rank {rank}: {STEPS} steps, each equal to the layer in one piece")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
