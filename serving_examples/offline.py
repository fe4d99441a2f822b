"""torchrun --nproc-per-node 2 serving_examples/offline.py.

Offline generation with vLLM: two data-parallel ranks, the experts of each layer spread over both, tokens exchanged by
moebius. Each rank generates for prompts of its own. A model's folder or name may follow; without one, a tiny random
model is made.
"""

import atexit
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import tiny_model

PROMPTS = ["The capital of France is", "To be or not to be", "A mixture of experts", "Moebius strips have one side and"]
# vLLM's engine in this process, and what it needs on a small machine without a network. Your own settings win.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def common_model(rank: int) -> str:
    """A tiny model that the first rank makes and the others wait for."""
    folder = Path(tempfile.gettempdir(), f"moebius-tiny-model-{os.getppid()}")  # torchrun is the parent of all
    if rank == 0:
        made = Path(tempfile.mkdtemp())
        tiny_model.make_model("qwen3_moe", made)
        made.rename(folder)  # all of it is there at once
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for _ in range(1200):
        if folder.exists():
            return str(folder)
        time.sleep(0.1)
    raise SystemExit("the first rank made no model within two minutes")


def main() -> None:
    """Generate on this rank."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    model = sys.argv[1] if len(sys.argv) > 1 else common_model(rank)

    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        data_parallel_size=num_ranks,
        enable_expert_parallel=True,
        all2all_backend="moebius",
        distributed_executor_backend="external_launcher",  # torchrun
        max_model_len=256,
        max_num_seqs=8,
        enforce_eager=True,
    )
    mine = PROMPTS[rank::num_ranks]
    for output in llm.generate(mine, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False):
        print(f"rank {rank}: {output.prompt!r} -> {list(output.outputs[0].token_ids)}", flush=True)


if __name__ == "__main__":
    main()
