"""DeepEP's normal (high-throughput) mode: its calls are not covered, and say so; its settings are kept."""

from __future__ import annotations

from typing import Any, NoReturn

from moebius.deep_ep.config import Config
from moebius.deep_ep.keywords import strict_keywords
from moebius.errors import ConfigError, UnsupportedError


def _refuse(name: str) -> NoReturn:
    raise UnsupportedError(
        f"Buffer.{name} belongs to the normal (high-throughput) mode, which this package does not cover; it covers the "
        "low-latency mode: low_latency_dispatch, low_latency_combine and what goes with them"
    )


class NormalMode:
    """The names of the normal mode. What would communicate raises `UnsupportedError`.

    Attributes:
        num_sms: as last set; without effect.
    """

    num_sms: int = 20

    def get_dispatch_layout(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not covered."""
        _refuse("get_dispatch_layout")

    def dispatch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not covered."""
        _refuse("dispatch")

    def combine(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not covered."""
        _refuse("combine")

    def internode_dispatch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not covered."""
        _refuse("internode_dispatch")

    def internode_combine(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not covered."""
        _refuse("internode_combine")

    @staticmethod
    @strict_keywords
    def set_num_sms(new_num_sms: int) -> None:
        """Keep the SMs of the normal mode; without effect.

        Raises:
            ConfigError: not an even number, as upstream requires.
        """
        if new_num_sms < 0 or new_num_sms % 2:
            raise ConfigError(f"`new_num_sms` must be even (got {new_num_sms})")
        NormalMode.num_sms = new_num_sms

    @staticmethod
    @strict_keywords
    def get_dispatch_config(num_ranks: int) -> Config:
        """A config of the normal mode, for callers that size a buffer by it."""
        return Config(NormalMode.num_sms)

    @staticmethod
    @strict_keywords
    def get_combine_config(num_ranks: int) -> Config:
        """As `get_dispatch_config`."""
        return Config(NormalMode.num_sms)
