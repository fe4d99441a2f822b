"""moebius: low-latency expert-parallel all-to-all for MoE decode.

Layers; imports go down only: `deep_ep`, `vllm`, `bench` -> `all_to_all`, `ops` -> `heap`, `group`, `slots`, `results`,
`rounds`, `arguments`, `engines`, `cuda`, `plan`, `virtual_network` -> `wire`, `checks`, `faults` -> `native` ->
`config`, `errors`, `env`.
"""

from ._version import __version__
from .all_to_all import AllToAll
from .config import Config
from .errors import (
    ConfigError,
    CudaError,
    MoebiusError,
    NativeNotBuiltError,
    PeerAccessError,
    PeerTimeoutError,
    ProtocolError,
    RoutingError,
    ShapeError,
    StateError,
    UnknownKeywordError,
    UnsupportedError,
    VersionError,
)
from .group import VirtualRank, virtual_ranks
from .plan import Plan, plan
from .results import Dispatched, PendingCombine, PendingDispatch
from .virtual_network import VirtualNetwork

__all__ = [
    "AllToAll",
    "Config",
    "ConfigError",
    "CudaError",
    "Dispatched",
    "MoebiusError",
    "NativeNotBuiltError",
    "PeerAccessError",
    "PeerTimeoutError",
    "PendingCombine",
    "PendingDispatch",
    "Plan",
    "ProtocolError",
    "RoutingError",
    "ShapeError",
    "StateError",
    "UnknownKeywordError",
    "UnsupportedError",
    "VersionError",
    "VirtualNetwork",
    "VirtualRank",
    "__version__",
    "plan",
    "virtual_ranks",
]
