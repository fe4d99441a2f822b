"""Drop-in for the low-latency half of `deep_ep`, thin over `moebius.AllToAll`.

`install()` makes `import deep_ep` find this package, so code written for DeepEP runs unchanged. What is honoured,
what differs and what is not covered: docs/deep_ep.md.

    import moebius.deep_ep

    moebius.deep_ep.install()
    import deep_ep  # this package
"""

from __future__ import annotations

from moebius.deep_ep.alias import install, uninstall
from moebius.deep_ep.buffer import Buffer, topk_idx_t
from moebius.deep_ep.config import Config
from moebius.deep_ep.event import EventHandle, EventOverlap

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "install", "topk_idx_t", "uninstall"]
