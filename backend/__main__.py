"""`python -m moebius`: demo, bench, load, serve-bench, plan, doctor."""

from __future__ import annotations

import sys

from .bench.cli import main

if __name__ == "__main__":  # ranks are spawned, and import this module again
    sys.exit(main())
