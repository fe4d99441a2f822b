"""AsyncLLM with two data-parallel ranks: `python -m tests.vllm.serving SPEC.json`.

Requests arrive one after the other while others run, some are given up half-way, and every one that is not must be
answered as if it had been alone.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any


async def serve(spec: dict[str, Any]) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**spec["llm"]))
    found: list[dict[str, Any]] = []

    async def ask(number: int, prompt: str, length: int, *, gives_up: bool) -> None:
        await asyncio.sleep(0.02 * (number % 16))
        sampling = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=0)
        last: Any = None
        async for output in engine.generate(prompt, sampling, request_id=str(number)):
            last = output.outputs[0]
            if gives_up and len(last.token_ids) >= 2:
                await engine.abort(str(number))
                return
        logprobs = [step[token].logprob for step, token in zip(last.logprobs, last.token_ids, strict=True)]
        found.append({"prompt": prompt, "tokens": list(last.token_ids), "logprobs": logprobs})

    try:
        await asyncio.gather(
            *(
                ask(number, prompt, length, gives_up=number % 5 == 4)
                for number, (prompt, length) in enumerate(spec["prompts"] * spec["repeats"])
            )
        )
    finally:
        engine.shutdown()
    Path(spec["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(serve(json.loads(Path(sys.argv[1]).read_text())))
