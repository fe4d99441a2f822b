"""The errors: one base, the builtin that callers may know, and attributes that say who is to blame."""

from __future__ import annotations

import inspect
import pickle

import pytest

from moebius import errors
from moebius.errors import MoebiusError, PeerTimeoutError

FIELDS = {"op": "combine", "half": "recv", "rank": 3, "epoch": 7, "waited_us": 2e6, "expected": 7, "observed": 5}


def test_all_are_moebius_errors_and_documented() -> None:
    found = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]
    assert len(found) >= 9
    for kind in found:
        assert issubclass(kind, MoebiusError)
        assert kind.__doc__


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("ShapeError", ValueError),
        ("RoutingError", ValueError),
        ("NativeNotBuiltError", ImportError),
        ("PeerTimeoutError", TimeoutError),
        ("StateError", RuntimeError),
        ("ProtocolError", RuntimeError),
        ("PeerAccessError", RuntimeError),
    ],
)
def test_errors_are_builtins_too(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), builtin)


@pytest.mark.parametrize(
    ("reason", "via", "words"),
    [
        ("deadline", -1, "rank 3 did not arrive within the deadline after 2000000 us"),
        ("died", -1, "rank 3 died"),
        ("reported", 1, "rank 3 was given up by rank 1"),
        ("deadline", 1, "seen through rank 1"),
    ],
)
def test_a_timeout_says_who_what_and_when(reason: str, via: int, words: str) -> None:
    error = PeerTimeoutError(**FIELDS, reason=reason, via=via)  # type: ignore[arg-type]
    for name, value in {**FIELDS, "reason": reason, "via": via}.items():
        assert getattr(error, name) == value
    assert words in str(error)
    assert "combine recv of round 7" in str(error)
    assert "expected epoch 7, observed 5" in str(error)


def test_a_timeout_travels_between_processes() -> None:
    """Launchers pickle what a rank raised; an error that cannot be unpickled hides itself behind a TypeError."""
    error = PeerTimeoutError(**FIELDS, reason="died")  # type: ignore[arg-type]
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert vars(again) == vars(error)
