"""python serving_examples/serve_and_stream.py.

Starts `vllm serve` with two data-parallel ranks and moebius between their experts, waits until it is ready, streams
one chat over the OpenAI API, and stops the server. A model's folder or name may follow; without one, a tiny random
model is made. Only the standard library is needed besides vLLM.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny_model

READY_LIMIT_S = 300.0
NAME = "served"
# What vLLM needs for two ranks on a small machine: the cores of each, and little memory. Your own settings win.
SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": f"0|{min(1, (os.cpu_count() or 1) - 1)}",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
OURS = ("--data-parallel-size", "2", "--enable-expert-parallel", "--all2all-backend", "moebius")


class Server:
    """A running `vllm serve`: `with Server(model) as server: server.post(...)`."""

    def __init__(self, model: str, *options: str) -> None:
        """Start it and wait until it is ready.

        Args:
            model: folder or name.
            *options: of `vllm serve`, after ours.

        Raises:
            RuntimeError: it ended, or is not ready in time; with the end of its log.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        vllm = [sys.executable, str(Path(sys.executable).with_name("vllm"))]
        where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
        self._log = tempfile.NamedTemporaryFile("w+", prefix="vllm-serve-", suffix=".log")  # noqa: SIM115 - until close
        self._process = subprocess.Popen(
            [*vllm, "serve", model, *where, *OURS, *options],
            env=SETTINGS | os.environ,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its workers can be told from ours
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_LIMIT_S
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return
            time.sleep(0.25)
        raise RuntimeError("the server is not ready:\n" + self.log()[-4000:])

    def log(self) -> str:
        """What it said so far."""
        return Path(self._log.name).read_text()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop it, and every process that it started."""
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


def post(url: str, path: str, timeout_s: float = 300.0, **body: Any) -> Any:
    """The reply to a request of the OpenAI API, as a file."""
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=timeout_s)


def stream_chat(url: str, model: str, text: str, num_tokens: int) -> Iterator[str]:
    """The pieces of an answer, as they come."""
    messages = [{"role": "user", "content": text}]
    with post(url, "/v1/chat/completions", model=model, messages=messages, max_tokens=num_tokens, stream=True) as reply:
        for line in reply:
            event = line.decode().strip().removeprefix("data: ")
            if event and event != "[DONE]":
                yield from (choice["delta"].get("content") or "" for choice in json.loads(event)["choices"])


def main() -> None:
    """Serve, stream, stop."""
    with tempfile.TemporaryDirectory() as made:
        model = sys.argv[1] if len(sys.argv) > 1 else made
        options = ["--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager"]
        if model == made:
            tiny_model.make_model("qwen3_moe", Path(made))
        with Server(model, *options) as server:
            print("active:", next(line for line in server.log().splitlines() if "moebius 0." in line))
            num_pieces = 0
            for piece in stream_chat(server.url, NAME, "Tell me about mixtures of experts.", 24):
                print(piece, end="", flush=True)
                num_pieces += 1
            print(f"\nstreamed in {num_pieces} pieces")


if __name__ == "__main__":
    main()
