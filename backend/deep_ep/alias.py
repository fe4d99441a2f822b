"""Standing in for `deep_ep` in `sys.modules`."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from moebius.errors import StateError

if TYPE_CHECKING:
    from types import ModuleType

# Upstream's name of a module -> ours. `deep_ep.utils` is where its users import the events from.
_ALIASES = {
    "deep_ep": "moebius.deep_ep",
    "deep_ep.buffer": "moebius.deep_ep.buffer",
    "deep_ep.utils": "moebius.deep_ep.event",
}
_displaced: dict[str, ModuleType] = {}


def install(*, force: bool = False) -> None:
    """Make `import deep_ep` find this package, in this process. Calling it again changes nothing.

    Args:
        force: displace a DeepEP that is already imported; `uninstall()` puts it back. Objects and names that other
            modules took from it stay what they are.

    Raises:
        StateError: another `deep_ep` is already imported, and `force` is not set.
    """
    if is_installed():
        return
    imported = {name: module for name, module in sys.modules.items() if _is_upstream_name(name)}
    if imported and not force:
        where = getattr(imported.get("deep_ep"), "__file__", None) or "an unknown place"
        raise StateError(
            f"`deep_ep` is already imported from {where}: call install() before the first `import deep_ep`, "
            "or displace it with install(force=True)"
        )
    for name in imported:
        _displaced[name] = sys.modules.pop(name)
    for name, ours in _ALIASES.items():
        sys.modules[name] = importlib.import_module(ours)


def uninstall() -> None:
    """Undo `install()`: forget the alias, and put back what it displaced."""
    if not is_installed():
        return
    for name in _ALIASES:
        sys.modules.pop(name, None)
    sys.modules.update(_displaced)
    _displaced.clear()


def is_installed() -> bool:
    """Whether `import deep_ep` finds this package."""
    return sys.modules.get("deep_ep") is sys.modules["moebius.deep_ep"]


def _is_upstream_name(name: str) -> bool:
    return name == "deep_ep" or name.startswith("deep_ep.")
