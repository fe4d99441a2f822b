"""The environment variables that moebius knows, and the only place of the package that reads them."""

from __future__ import annotations

import dataclasses
import os

from .errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Variable:
    """One environment variable.

    Attributes:
        name: as it is set.
        values: what it may hold: the words it is checked against, or a description when it holds something else.
        default: what holds when it is unset or empty, in words.
        meaning: what it changes, and when it is read.
    """

    name: str
    values: tuple[str, ...] | str
    default: str
    meaning: str


SIMD = Variable(
    "MOEBIUS_SIMD",
    ("avx512", "avx2", "scalar"),
    "the best the processor has",
    "SIMD level of the CPU engine; read when the extension is loaded",
)
VLLM_FORMAT = Variable(
    "MOEBIUS_VLLM_FORMAT",
    ("batched", "standard"),
    "what a layer's experts take; batched is asked for first, on the CPU standard",
    "how vLLM's experts get their tokens: packed by expert, or as they arrived; read when vLLM builds a layer",
)
VLLM_TRACE = Variable(
    "MOEBIUS_VLLM_TRACE",
    "a file",
    "nothing is recorded",
    "where each rank records its tokens' experts, its number added to the name; read when vLLM builds a layer",
)
VLLM_GLOO = Variable(
    "MOEBIUS_VLLM_GLOO",
    ("1",),
    "vLLM as it is",
    "make vLLM's allgather_reducescatter work on the CPU, over gloo, to compare with; read when vLLM loads plugins",
)
VLLM_NUM_SMS = Variable(
    "MOEBIUS_VLLM_NUM_SMS",
    "a number",
    "all of them",
    "SMs that a half may occupy on a GPU in vLLM; read when vLLM builds a layer",
)
HOST = Variable(
    "MOEBIUS_HOST",
    "a name",
    "ranks that share kernel and namespaces share memory",
    "ranks with different names use the network between them, even on one host; read when an object is made",
)
VARIABLES = (
    SIMD,
    HOST,
    VLLM_FORMAT,
    VLLM_TRACE,
    VLLM_GLOO,
    VLLM_NUM_SMS,
    Variable(
        "MOEBIUS_SKIP_CUDA_BUILD",
        ("1",),
        "built when nvcc and its sources are there",
        "build without the CUDA extension; read by setup.py",
    ),
    Variable(
        "MOEBIUS_CUDA_ARCHS",
        "architectures",
        "80 90a 100a",
        "GPUs that the CUDA extension is built for; read by setup.py",
    ),
    Variable(
        "MOEBIUS_NVSHMEM",
        ("0",),
        "built when CUDA's is and NVSHMEM is there",
        "build without the NVSHMEM extension; read by setup.py",
    ),
    Variable("MOEBIUS_BUILD_JOBS", "a number", "one per core", "compilers that run at once; read by setup.py"),
)


def _choice(variable: Variable) -> str | None:
    """The value of a variable that holds one of several words; None when it is unset or empty."""
    value = os.environ.get(variable.name, "")
    if value and value not in variable.values:
        raise ConfigError(f"`{variable.name}` must be one of {', '.join(variable.values)} (got {value!r})")
    return value or None


def simd() -> str | None:
    """The SIMD level that is asked for, or None to take the best.

    Raises:
        ConfigError: it is no level that exists.
    """
    return _choice(SIMD)


def vllm_format() -> str | None:
    """The format that vLLM's experts are to be given, or None for the platform's default.

    Raises:
        ConfigError: it is no format that exists.
    """
    return _choice(VLLM_FORMAT)


def vllm_trace() -> str | None:
    """The file to record routing in, or None."""
    return os.environ.get(VLLM_TRACE.name) or None


def vllm_gloo() -> bool:
    """Whether vLLM is to be given the baseline over gloo.

    Raises:
        ConfigError: the variable holds something else than 1.
    """
    return _choice(VLLM_GLOO) is not None


def vllm_num_sms() -> int | None:
    """The SMs that a half may occupy under vLLM, or None for all.

    Raises:
        ConfigError: the variable holds no number from 1 on.
    """
    value = os.environ.get(VLLM_NUM_SMS.name, "")
    if value and not (value.isascii() and value.isdigit() and int(value)):
        raise ConfigError(f"`{VLLM_NUM_SMS.name}` must be a number from 1 on (got {value!r})")
    return int(value) if value else None


def host() -> str:
    """The name that sets this rank's host apart; empty for none."""
    return os.environ.get(HOST.name, "")


def nvshmem_home() -> str | None:
    """Where NVSHMEM is installed, by the variable of its own; None where that is unset."""
    return os.environ.get("NVSHMEM_HOME") or None


def for_child(defaults: dict[str, str]) -> dict[str, str]:
    """The environment of a process to start: this one's, over `defaults`."""
    return {**defaults, **os.environ}
