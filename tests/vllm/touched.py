"""What becomes of vLLM's objects, step by step: `python -m tests.vllm.touched MODEL` prints it as JSON.

In a process of its own, as nothing of it can be undone. Objects are told apart by identity: a function that was
replaced is another object, even if it does the same.
"""

import contextlib
import importlib
import inspect
import json
import sys
from typing import Any

from moebius.vllm import points


def objects() -> dict[str, Any]:
    """Every function, class and member of a class that vLLM has loaded, by name."""
    found: dict[str, Any] = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] != "vllm":
            continue
        for name, value in list(vars(module).items()):
            found[f"{module_name}.{name}"] = value
            if inspect.isclass(value) and value.__module__ == module_name:
                for member, inner in list(vars(value).items()):
                    found[f"{module_name}.{name}.{member}"] = inner
    is_code = (type, property, classmethod, staticmethod)
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, is_code) or callable(value) or "Literal" in str(value)[:20]
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names that are new in a class that was there before, or that hold another object now."""
    changed = [name for name, value in before.items() if name in after and after[name] is not value]
    added = [name for name in after.keys() - before.keys() if name.rpartition(".")[0] in before]
    removed = list(before.keys() - after.keys())
    return sorted(changed + added + removed)


def main(model: str) -> None:
    for point in points.POINTS:
        importlib.import_module(point.module)
    from vllm.engine.arg_utils import EngineArgs, ParallelConfig

    from moebius.vllm import patches, register

    def configure(backend: str) -> None:
        EngineArgs(model=model, all2all_backend=backend, data_parallel_size=1).create_engine_config()

    with contextlib.suppress(ImportError):
        configure("allgather_reducescatter")  # loads what is loaded lazily
    told = {}
    clean = objects()
    register()
    register()
    told["registered"] = differences(clean, objects())
    registered = objects()
    configure("allgather_reducescatter")
    ParallelConfig(all2all_backend="deepep_low_latency")
    told["another chosen"] = differences(registered, objects())
    registered = objects()
    ParallelConfig(all2all_backend="moebius")
    told["ours chosen"] = differences(registered, objects())
    chosen = objects()
    patches.install_in_layers()
    told["group made"] = differences(chosen, objects())
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
