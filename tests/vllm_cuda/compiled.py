"""Stand-ins for compiled modules that vLLM imports on CUDA before anything else; none is called by these tests."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

OPERATORS = "vllm._C_stable_libtorch"  # imported by its platform, for the operators that it registers
ATTENTION = "vllm.vllm_flash_attn"  # imported with the attention layers, which come with the experts
ASKED_AT_IMPORT = "cutlass_scaled_mm_supports_block_fp8"
_libraries: list[Any] = []


class _Nothing(types.ModuleType):
    """Whatever is imported from it is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def stand_in() -> bool:
    """Put them in place where vLLM's Python files are alone, see `carry`; returns whether that was needed."""
    if OPERATORS in sys.modules:
        return isinstance(sys.modules[OPERATORS], _Nothing)
    if importlib.util.find_spec(OPERATORS) is not None:
        return False
    import torch

    for name in (OPERATORS, ATTENTION):
        sys.modules[name] = _Nothing(name)
    library: Any = torch.library.Library("_C", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(f"{ASKED_AT_IMPORT}(int cuda_device_capability) -> bool")
    library.impl(ASKED_AT_IMPORT, lambda capability: False, "CompositeExplicitAutograd")
    _libraries.append(library)  # its operators go with it
    return True
