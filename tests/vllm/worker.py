"""One rank of an offline run: `python -m tests.vllm.worker SPEC.json`, under the environment that `runs` sets.

The engine lives in this process (external_launcher), which is the cheapest way to run several ranks of vLLM. Each
data-parallel rank generates for its own prompts and writes what came out.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


def answers(outputs: list[Any]) -> list[dict[str, Any]]:
    found = []
    for output in outputs:
        made = output.outputs[0]
        logprobs = [step[token].logprob for step, token in zip(made.logprobs, made.token_ids, strict=True)]
        found.append({"prompt": output.prompt, "tokens": list(made.token_ids), "logprobs": logprobs})
    return found


def main(spec: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    rank = int(os.environ.get("RANK", "0"))
    llm = LLM(**spec["llm"])
    dp_rank = rank // spec["llm"].get("tensor_parallel_size", 1)
    rounds = []
    for batch in spec["batches"]:
        mine = batch[dp_rank % len(batch)]
        sampling = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=0) for _, length in mine]
        rounds += answers(llm.generate([prompt for prompt, _ in mine], sampling, use_tqdm=False))
    Path(spec["out"], f"rank{rank}.json").write_text(json.dumps(rounds))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
