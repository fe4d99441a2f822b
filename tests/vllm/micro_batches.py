"""Two micro-batches by vLLM's own contexts: a thread each, of which one runs until vLLM's kernel lets the other."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

LIMIT_S = 60.0


class Contexts:
    """vLLM's table of the contexts: of each rank its own, as to vLLM a rank is a process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm import forward_context
        from vllm.v1.worker import ubatching

        self._here = threading.local()
        self._of: dict[tuple[int, int], Any] = {}
        monkeypatch.setattr(ubatching, "_CURRENT_CONTEXTS", self)
        monkeypatch.setattr(forward_context, "_forward_context", None)

    def __getitem__(self, number: int) -> Any:
        return self._of[self._here.rank, number]

    def __setitem__(self, number: int, context: Any) -> None:
        self._of[self._here.rank, number] = context

    def __len__(self) -> int:
        return 2

    def in_turn(self, rank: int, run: Callable[[int], None], stream: Any) -> None:
        """Call `run` for both micro-batches of a rank, on the stream; raises what it raised."""
        from vllm.v1.worker.ubatching import make_ubatch_contexts

        ready = threading.Barrier(3)
        made = make_ubatch_contexts(2, stream, stream, [None, None], ready)  # type: ignore[list-item,unused-ignore]
        errors: list[BaseException] = []

        def micro_batch(number: int) -> None:
            self._here.rank = rank
            is_cuda = isinstance(stream, torch.cuda.Stream)
            try:
                with torch.cuda.stream(stream) if is_cuda else contextlib.nullcontext(), made[number]:
                    run(number)
            except BaseException as error:  # noqa: BLE001  # raised below
                errors.append(error)

        threads = [threading.Thread(target=micro_batch, args=(number,), daemon=True) for number in range(2)]
        for thread in threads:
            thread.start()
        ready.wait(LIMIT_S)
        made[0].cpu_wait_event.set()
        for thread in threads:
            while thread.is_alive() and not errors:
                thread.join(0.01)
        if errors:
            raise errors[0]
