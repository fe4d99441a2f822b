"""python serving_examples/load_test.py --requests 100.

Many requests at a rate, in Poisson arrivals, against `vllm serve` with two data-parallel ranks over moebius; every
answer is compared with the one that a single process without us gives to the same prompt alone. Nothing may be lost.
Needs vLLM. `--url` and `--served-model` take a server that runs already, `--model` names what it serves; without one,
a tiny random model is made. Compare in float32: rounding to 16 bits differs between batches, and flips close choices.
"""

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import serve_and_stream
import tiny_model

TOLERANCE = 5e-5  # of a logprob: four decimals
WORDS = ("the", "of", "and", "to", "expert", "token", "router", "layer", "rank", "batch", "long", "short", "one", "two")
OPTIONS = ("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--enforce-eager")


@dataclasses.dataclass
class Answer:
    """Tokens of a request, and the logprob of each."""

    tokens: list[int]
    logprobs: list[float]

    def equals(self, other: "Answer") -> bool:
        """Same tokens, and logprobs within the tolerance."""
        pairs = zip(self.logprobs, other.logprobs, strict=False)
        return self.tokens == other.tokens and all(abs(a - b) < TOLERANCE for a, b in pairs)


def make_requests(count: int, seed: int) -> list[tuple[str, int]]:
    """Prompts, all different, and how many tokens to make of each."""
    chance = random.Random(seed)
    return [
        (f"{number} " + " ".join(chance.choices(WORDS, k=chance.randint(1, 12))), chance.randint(1, 24))
        for number in range(count)
    ]


def answer_offline(spec: dict[str, Any]) -> None:
    """Run as a process of its own: every prompt alone, in one process, without expert parallelism."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    llm = LLM(spec["model"], dtype="float32", max_model_len=256, max_num_seqs=1, enforce_eager=True)
    prompts = [prompt for prompt, _ in spec["requests"]]
    sampling = [
        SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, logprobs=0) for _, length in spec["requests"]
    ]
    answers = []
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        made = output.outputs[0]
        logprobs = [step[token].logprob for step, token in zip(made.logprobs, made.token_ids, strict=True)]
        answers.append(dataclasses.asdict(Answer(list(made.token_ids), logprobs)))
    Path(spec["out"]).write_text(json.dumps(answers))


def offline_answers(model: str, requests: list[tuple[str, int]], folder: Path) -> list[Answer]:
    """What one process answers.

    Raises:
        SystemExit: it failed; with the end of its log.
    """
    out = folder / "offline.json"
    (folder / "spec.json").write_text(json.dumps({"model": model, "requests": requests, "out": str(out)}))
    # Another model loader, engine and batch than the server's: only the model is the same.
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", **os.environ}
    env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    command = [sys.executable, __file__, "--offline-spec", str(folder / "spec.json")]
    ran = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if ran.returncode:
        raise SystemExit("the offline run failed:\n" + ran.stdout[-4000:])
    return [Answer(**answer) for answer in json.loads(out.read_text())]


def ask(url: str, served: str, prompt: str, length: int) -> Answer:
    """One request, as a client sends it."""
    wanted = {"max_tokens": length, "temperature": 0, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
    with serve_and_stream.post(url, "/v1/completions", model=served, prompt=prompt, **wanted) as reply:
        choice = json.load(reply)["choices"][0]
    return Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"])


def load(
    url: str, served: str, requests: list[tuple[str, int]], rate: float, seed: int
) -> list[tuple[Answer | str, float]]:
    """Send all of them when their time has come, whatever became of those before.

    Returns:
        for each, its answer, or why there is none; and the seconds from when it was due until its answer was there.
    """
    chance = random.Random(seed)
    due, now = [], 0.0
    for _ in requests:
        due.append(now)
        now += chance.expovariate(rate)
    begin = time.monotonic()

    def one(number: int) -> tuple[Answer | str, float]:
        time.sleep(max(0.0, begin + due[number] - time.monotonic()))
        found: Answer | str
        try:
            found = ask(url, served, *requests[number])
        except (OSError, KeyError, ValueError) as error:
            found = repr(error)
        return found, time.monotonic() - begin - due[number]

    # A thread for each: a slow server must not hold back requests that are due.
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(one, range(len(requests))))


def report(expected: list[Answer], found: list[tuple[Answer | str, float]], requests: list[tuple[str, int]]) -> bool:
    """Print what came of them; returns whether all were answered, and right."""
    lost = [number for number, (answer, _) in enumerate(found) if isinstance(answer, str)]
    other = [
        number
        for number, (answer, _) in enumerate(found)
        if isinstance(answer, Answer) and not answer.equals(expected[number])
    ]
    for number in (*lost[:3], *other[:3]):
        print(f"{requests[number][0]!r}: {found[number][0]}, offline {expected[number]}")
    seconds = sorted(passed for _, passed in found)
    tokens = sum(length for _, length in requests)
    print(f"{len(found)} requests, {tokens} tokens: {len(lost)} lost, {len(other)} other than offline")
    print(f"seconds until answered: median {seconds[len(seconds) // 2]:.2f}, most {seconds[-1]:.2f}")
    return not lost and not other


def main() -> int:
    """Run the test; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--rate", type=float, default=20.0, help="arrivals a second (default 20)")
    parser.add_argument("--model", help="folder or name (default: a tiny one is made)")
    parser.add_argument("--url", help="of a server that runs, with --dtype float32 (default: one is started)")
    parser.add_argument("--served-model", help="what the server at --url calls it (default: --model)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--offline-spec", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.offline_spec:
        answer_offline(json.loads(flags.offline_spec.read_text()))
        return 0
    if flags.url and not flags.model:
        parser.error("--url needs --model: the offline answers are made with it")
    requests = make_requests(flags.requests, flags.seed)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = flags.model
        if not model:
            model = str(folder / "model")
            tiny_model.make_model("qwen3_moe", Path(model))
        expected = offline_answers(model, requests, folder)
        if flags.url:
            found = load(flags.url.rstrip("/"), flags.served_model or model, requests, flags.rate, flags.seed)
        else:
            with serve_and_stream.Server(model, *OPTIONS) as server:
                found = load(server.url, serve_and_stream.NAME, requests, flags.rate, flags.seed)
    return 0 if report(expected, found, requests) else 1


if __name__ == "__main__":
    sys.exit(main())
