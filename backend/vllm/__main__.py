"""`python -m moebius.vllm`: whether the installed vLLM is one that the adapter fits, point by point."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from . import points


def main(arguments: list[str]) -> int:
    """Print the points; returns the exit status.

    Args:
        arguments: the package folder of an unpacked vLLM, instead of the installed one.
    """
    if arguments:
        root, version = Path(arguments[0]), "in " + arguments[0]
    else:
        found = importlib.util.find_spec("vllm")
        if found is None or found.origin is None:
            print("vLLM is not installed in this environment")
            return 1
        root = Path(found.origin).parent
        version = importlib.metadata.version("vllm")
    gaps = dict(points.missing(root))
    for point in points.POINTS:
        print(f"{'MOVED' if point in gaps else 'ok':6}{point.module}.{point.name}: {gaps.get(point, point.purpose)}")
    print(f"vLLM {version}: {len(points.POINTS) - len(gaps)} of {len(points.POINTS)} points as expected")
    return 1 if gaps else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
