"""A real server: processes that vLLM starts by itself, requests over HTTP, and what is left when it is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.vllm import runs
from tests.vllm.cases import BATCHES, compare, on_one_rank
from tests.vllm.marks import needs_vllm

pytestmark = needs_vllm
READY_LIMIT_S = 300.0  # 40 s on a machine of its own


class Server:
    """`vllm serve` with two data-parallel ranks."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.port = runs.free_port()
        self.log = folder / f"server-{self.port}.log"
        options = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager"]
        ours = ["--data-parallel-size", "2", "--enable-expert-parallel", "--all2all-backend", "moebius"]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "tiny"]
        program = [sys.executable, str(Path(sys.executable).with_name("vllm")), "serve", str(model)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*program, *options, *ours, *where],
                # vLLM binds the threads of each rank: one core for each, as far as there are cores.
                env=runs.environment(VLLM_CPU_OMP_THREADS_BIND=f"0|{min(1, (os.cpu_count() or 1) - 1)}"),
                cwd=runs.ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_LIMIT_S
        while True:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).close()
                return
            time.sleep(0.25)

    def post(self, path: str, **body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps({"model": "tiny", "temperature": 0, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=60)

    def complete(self, prompt: str, length: int) -> runs.Answer:
        body = {"prompt": prompt, "max_tokens": length, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
        with self.post("/v1/completions", **body) as reply:
            choice = json.load(reply)["choices"][0]
        return runs.Answer(choice["token_ids"], choice["logprobs"]["token_logprobs"])

    def processes(self) -> list[int]:
        return runs.processes_of(self.process.pid)


@pytest.fixture
def servers(model: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[[], Server]]:
    started: list[Server] = []

    def start() -> Server:
        started.append(Server(model("qwen3_moe"), tmp_path))
        return started[-1]

    yield start
    for server in started:
        runs.end(server.process)


@pytest.mark.slow
def test_a_server_answers_dies_comes_back_and_notices_a_dead_rank(
    servers: Callable[[], Server], expected: Callable[[str], dict[str, runs.Answer]]
) -> None:
    wanted = expected("qwen3_moe")
    before = runs.segments()
    server = servers()
    server.wait_until_ready()
    assert server.log.read_text().count("ranks, standard format") == 2, "each rank says once that we are active"

    prompts = [one for batch in on_one_rank(BATCHES) for one in batch[0]]
    with ThreadPoolExecutor(4) as pool:  # arriving together, leaving one by one, over two ranks
        found = dict(pool.map(lambda one: (one[0], server.complete(*one)), prompts))
    compare(found, wanted)
    with server.post(
        "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=4, stream=True
    ) as stream:
        chunks = [line for line in stream.read().decode().splitlines() if line.startswith("data: ")]
    assert chunks[-1] == "data: [DONE]"

    # All at once and without a chance to clean up. Ours is memory without a name: there is nothing to leave behind.
    # Only Python's trackers live on for a moment, as they would, and remove vLLM's own segments.
    killed = [pid for pid in server.processes() if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for pid in killed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert len(killed) >= 4
    assert runs.wait_until_gone(server.process, 20) == []
    assert runs.segments() - before == set()

    again = servers()
    again.wait_until_ready()
    prompt, length = prompts[0]
    compare({prompt: again.complete(prompt, length)}, {prompt: wanted[prompt]})

    # vLLM has no way to go on with fewer ranks here: it must notice, and nothing may hang in an exchange.
    workers = [pid for pid in again.processes() if b"VLLM::Worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    with contextlib.suppress(OSError):
        again.complete("nobody answers this", 50)
    assert runs.wait_until_gone(again.process, 60) == []
