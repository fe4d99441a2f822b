"""Runs of the real vLLM over several processes, and what they leave behind."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Batch = list[list[tuple[str, int]]]  # for each data-parallel rank: its prompts, and how many tokens to make of each


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(**more: str) -> dict[str, str]:
    """What vLLM needs to run on a small machine without network, with ranks that share its cores."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        # Another version of vLLM may be in front: tests/vllm/versions.py.
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
        **more,
    }


@dataclasses.dataclass
class Answer:
    tokens: list[int]
    logprobs: list[float]


@dataclasses.dataclass
class Result:
    """What each rank's prompts gave, by prompt, and what was logged."""

    answers: dict[str, Answer]
    log: str


def generate(
    folder: Path,
    model: Path,
    batches: list[Batch],
    *,
    num_ranks: int = 1,
    timeout_s: float = 240,
    env: dict[str, str] | None = None,
    **llm: Any,
) -> Result:
    """Run `tests.vllm.worker` on `num_ranks` ranks.

    Raises:
        AssertionError: a rank failed; the message has the end of its log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    common = {"max_model_len": 256, "max_num_seqs": 8, "dtype": "float32", "enforce_eager": True}
    options = {"model": str(model), **common, **llm}
    if num_ranks > 1:
        options["distributed_executor_backend"] = "external_launcher"
    spec = {"llm": options, "batches": batches, "out": str(folder)}
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    port = str(free_port())
    started = []
    for rank in range(num_ranks):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
        store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        in_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        more = {**in_process, **(ranks | store if num_ranks > 1 else {}), **(env or {})}
        with (folder / f"rank{rank}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.vllm.worker", str(path)],
                    env=environment(**more),
                    cwd=ROOT,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.poll() is None for process in started) and time.monotonic() < deadline:
            if any(process.poll() for process in started):
                break
            time.sleep(0.1)
        if any(process.poll() for process in started):
            time.sleep(2)  # the others' own words, before they are killed
    finally:
        for process in started:
            end(process)
    logs = [(folder / f"rank{rank}.log").read_text() for rank in range(num_ranks)]
    for rank, process in enumerate(started):
        assert process.returncode == 0, f"rank {rank} exited {process.returncode}:\n" + "\n---\n".join(
            log[-4000:] for log in logs
        )
    found = {}
    for rank in range(num_ranks):
        for answer in json.loads((folder / f"rank{rank}.json").read_text()):
            found[answer["prompt"]] = Answer(answer["tokens"], answer["logprobs"])
    return Result(found, "\n".join(logs))


def segments() -> set[str]:
    """Named shared memory that may be ours: not of vLLM's queues and locks, nor of torch, of this run or another."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith(("psm_", "sem.", "torch_", "cpushm"))}


def processes_of(session: int) -> list[int]:
    """Every process of a session that is there, zombies not counted."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, _, _, theirs = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(theirs) == session and state != "Z":
                found.append(int(entry.name))
    return found


def wait_until_gone(process: "subprocess.Popen[Any]", limit_s: float) -> list[int]:
    """What is left of a process and its session after at most `limit_s`."""
    deadline = time.monotonic() + limit_s
    while processes_of(process.pid) and time.monotonic() < deadline:
        process.poll()
        time.sleep(0.2)
    return processes_of(process.pid)


def end(process: "subprocess.Popen[Any]") -> None:
    """End a process and all of its session that is still there."""
    for pid in processes_of(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=30)
