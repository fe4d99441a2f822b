"""The adapter for vLLM: `vllm serve MODEL --enable-expert-parallel --all2all-backend moebius`.

The only importer of `vllm`. vLLM finds `register` by the entry point `moebius` of `vllm.general_plugins` and calls it
in each of its processes. It makes the name known and changes nothing else; what it takes to run is installed once a
configuration with that name is seen. What is changed, and why: docs/vllm.md.

Imports go down: `communicator`, `batched`, `standard`, `local`, `cpu_experts` -> `patches` -> `choice` -> `points`.
Beside them: `trace`, which records routing, and `gloo`, a baseline that is there to be compared with.
"""

from .choice import NAME, register

__all__ = ["NAME", "register"]
