"""vLLM's kernel over the CUDA engine's kernels, which the host executor runs: what stands in for a stream.

On a GPU torch's kernels wait in the stream for ours. Here torch computes at once and our kernels run when they are told
to: so they are, by all ranks together, after each receive, and only our calls decide what was enqueued by then.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moebius import Config
from tests.helpers import simt

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moebius.results import Dispatched

LIMIT_S = 60.0  # for the threads of all ranks to meet
# What makes the host wait for a device, or copies to it, by torch's names: of functions, and of what they come down to.
WAITING = {"item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "allclose"}
WAITING |= {"__bool__", "__int__", "__float__", "__index__"}
WAITING_BELOW = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"}
HALVES = {"dispatch_send", "dispatch_recv", "combine_send", "combine_recv"}


class Meeting:
    """Where the ranks' threads meet for the kernels enqueued so far to be run."""

    def __init__(self, num_ranks: int) -> None:
        self._barrier = threading.Barrier(num_ranks, lambda: simt.extension().run_until_idle())

    def run(self) -> None:
        self._barrier.wait(LIMIT_S)


class Asked:
    """Passes on what is asked of the extension's engine, and keeps the names."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return getattr(self._native, name)


class Plain:
    """The extension's own calls: keeps the names of those that it makes, and tells the exchange of receives."""

    def __init__(self, plain: Any, exchange: EmulatedExchange) -> None:
        self._plain, self._exchange = plain, exchange

    def __getattr__(self, name: str) -> Callable[..., Any]:
        half = getattr(self._plain, name)

        def call(*arguments: Any) -> Any:
            result = half(*arguments)
            if result is not None:
                self._exchange.asked.add(name)
                if name.endswith("_recv"):
                    self._exchange.enqueued(name, result)
            return result

        return call


class EmulatedExchange(simt.SimtAllToAll):
    """An exchange whose kernels run when all ranks have enqueued a receive, or by hand without a meeting.

    Attributes:
        order: the halves, in the order in which they were enqueued.
        asked: names of what was asked of the extension's engine.
        results: kept, as a graph's memory would be.
    """

    def __init__(self, group: Any, config: Config, meeting: Meeting | None = None) -> None:
        super().__init__(group, config)
        self.order: list[str] = []
        self.results: list[Any] = []
        self._meeting = meeting
        engine: Any = self._engine
        engine._native = native = Asked(engine._native)
        self.asked = native.names
        if self.plain is not None:
            self.plain = Plain(self.plain, self)

    def dispatch_send(self, *args: Any, **kwargs: Any) -> Any:
        self.order.append("dispatch_send")
        sent = super().dispatch_send(*args, **kwargs)
        self.results.append(sent)
        return sent

    def combine_send(self, *args: Any, **kwargs: Any) -> Any:
        self.order.append("combine_send")
        sent = super().combine_send(*args, **kwargs)
        self.results.append(sent)
        return sent

    def _receive_dispatch(self, *args: Any) -> Dispatched:
        recv = super()._receive_dispatch(*args)
        self.enqueued("dispatch_recv", recv)
        return recv

    def _receive_combine(self, *args: Any) -> Tensor:
        out = super()._receive_combine(*args)
        self.enqueued("combine_recv", out)
        return out

    def enqueued(self, half: str, result: Any) -> None:
        self.order.append(half)
        self.results.append(result)
        if self._meeting is not None:
            self._meeting.run()

    def synchronize(self) -> None:
        self.asked.add("synchronize")
        super().synchronize()


class EmulatedManager:
    """Stands in for the group's manager.

    Attributes:
        made: the exchange, once a layer has asked for it.
    """

    def __init__(self, group: Any, meeting: Meeting | None = None) -> None:
        self.world_size = group.size
        self.made: EmulatedExchange | None = None
        self._group = group
        self._meeting = meeting

    def get_handle(self, fields: dict[str, Any]) -> EmulatedExchange:
        assert self.made is None, "one shape for each manager"
        self.made = EmulatedExchange(self._group, Config(**fields), self._meeting)
        return self.made


class _Functions(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITING:
            self._found.append(name)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, found: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        takes_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype.itemsize == 1 for index in args[1]
        )
        if name in WAITING_BELOW or takes_mask:
            self._found.append(f"aten.{name}")
        return func(*args, **(kwargs or {}))


def waits_of(call: Callable[..., Any], found: list[str]) -> Callable[..., Any]:
    """The call, adding to `found` what of it would make the host wait for a device; so do the callables it returns."""

    def watched(*args: Any, **kwargs: Any) -> Any:
        with _Functions(found), _Operators(found):
            result = call(*args, **kwargs)
        if isinstance(result, tuple) and result and all(callable(part) for part in result):
            return tuple(waits_of(part, found) for part in result)
        return result

    return watched


def watch(prepare_finalize: Any) -> list[str]:
    """Watch the halves that vLLM calls; returns where what would wait is told."""
    found: list[str] = []
    for name in ("prepare_async", "finalize_async"):
        setattr(prepare_finalize, name, waits_of(getattr(prepare_finalize, name), found))
    return found
