"""Where a fault on a GPU surfaces: before and after each step of a worker.

A half on a GPU records what goes wrong, and the next call of that exchange raises it. Under CUDA graphs there is no
next call: a replay runs kernels, none of our Python. So a worker's methods that run a step look at what was recorded
before they begin, and again once vLLM has waited for the step's tokens: tokens of a lost round are not handed out.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from moebius.all_to_all import AllToAll

METHODS = ("execute_model", "sample_tokens", "execute_dummy_batch")  # of vLLM's worker
_exchanges: weakref.WeakSet[AllToAll] = weakref.WeakSet()


def watch(exchange: AllToAll) -> AllToAll:
    """Look after an exchange as long as it lives; returns it."""
    _exchanges.add(exchange)
    return exchange


def check() -> None:
    """Raise what a half of one of the exchanges has recorded; waits for nothing.

    Raises:
        MoebiusError: as `AllToAll.check`.
    """
    for exchange in tuple(_exchanges):
        if not exchange.closed:
            exchange.check()


def checking(before: Callable[..., Any]) -> Callable[..., Any]:
    """Make a worker's method check before it, and when its result is there: at once, or once vLLM gets it."""

    @functools.wraps(before)
    def step(*args: Any, **kwargs: Any) -> Any:
        check()
        result = before(*args, **kwargs)
        get = getattr(result, "get_output", None)
        if get is None:
            check()
        else:
            # Asynchronous scheduling: the tokens are still being computed; get_output waits for them, in any thread.
            result.get_output = _checking_after(get)
        return result

    return step


def _checking_after(before: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(before)
    def get_output() -> Any:
        output = before()
        check()
        return output

    return get_output
