"""A `vllm serve` that can be halted while another one is measured, and `vllm bench serve` against it."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from typing import TYPE_CHECKING, Any

from moebius import env
from moebius.errors import MoebiusError

if TYPE_CHECKING:
    from collections.abc import Sequence

SERVED_NAME = "served"
SIDES = {
    "moebius": (("--all2all-backend", "moebius"), {}),
    "gloo": (("--all2all-backend", "allgather_reducescatter"), {"MOEBIUS_VLLM_GLOO": "1"}),
}


class ServeError(MoebiusError):
    """A server, or the client that measures it, failed; the message has the end of its log."""


def settings(ranks: int) -> dict[str, str]:
    """What vLLM needs for ranks that share a machine without a GPU; the caller's own environment wins."""
    cores = sorted(os.sched_getaffinity(0))
    defaults = {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(ranks)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    return env.for_child(defaults)


def _program() -> list[str]:
    return [sys.executable, str(pathlib.Path(sys.executable).with_name("vllm"))]


class Server:
    """Starts at once; `wait_until_ready` waits. A context, which ends every process that it started."""

    def __init__(self, side: str, model: str, ranks: int, options: Sequence[str], folder: pathlib.Path) -> None:
        """Start `vllm serve`.

        Args:
            side: of `SIDES`.
            model: folder or name.
            ranks: data-parallel ones.
            options: more of `vllm serve`.
            folder: for the log.
        """
        backend, env = SIDES[side]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.side = side
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / f"{side}.log"
        where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", SERVED_NAME]
        parallel = ["--data-parallel-size", str(ranks), "--enable-expert-parallel", *backend]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*_program(), "serve", model, *where, *parallel, *options],
                env={**settings(ranks), **env},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self, limit_s: float) -> None:
        """Until it answers.

        Raises:
            ServeError: it ended, or takes longer.
        """
        deadline = time.monotonic() + limit_s
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=2):
                return
            time.sleep(0.25)
        raise ServeError(f"the server over {self.side} is not ready:\n{self.log.read_text()[-4000:]}")

    def halt(self) -> None:
        """Take its processes off the cores, as they are."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let them run again."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        # vLLM leaves its workers in the process group that it was started in.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.resume()
        self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(15)
        self._signal(signal.SIGKILL)
        self._process.wait()


def measure(
    server: Server, model: str, options: Sequence[str], folder: pathlib.Path, timeout_s: float
) -> dict[str, Any]:
    """What `vllm bench serve` found, request by request.

    Raises:
        ServeError: it failed, or took longer.
    """
    about = ["--backend", "openai", "--base-url", server.url, "--model", SERVED_NAME, "--tokenizer", model]
    result = ["--save-result", "--save-detailed", "--result-dir", str(folder), "--result-filename", "run.json"]
    quiet = ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99", "--disable-tqdm"]
    (folder / "run.json").unlink(missing_ok=True)
    try:
        ran = subprocess.run(
            [*_program(), "bench", "serve", *about, *result, *quiet, *options],
            env=settings(1),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ServeError(f"vllm bench serve took more than {timeout_s:g} s over {server.side}") from error
    if ran.returncode or not (folder / "run.json").exists():
        end = server.log.read_text()[-2000:]
        raise ServeError(f"vllm bench serve failed over {server.side}:\n{ran.stdout[-3000:]}\n{end}")
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    if not found["completed"]:
        raise ServeError(f"no request was answered over {server.side}:\n{server.log.read_text()[-4000:]}")
    return found
