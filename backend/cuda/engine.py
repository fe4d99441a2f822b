"""The CUDA engine behind the interface of `engines.Engine`: which handle and which buffers a half gets."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from moebius import native, slots
from moebius.arguments import Place
from moebius.engines import Engine, Given
from moebius.errors import ConfigError, CudaError, StateError
from moebius.faults import FAULT_ROUTING, HALVES, error_of
from moebius.group import VirtualRank
from moebius.heap import rank_and_size
from moebius.rounds import Round, RoundTable
from moebius.wire import Wire, engine_fields, shape_fields

from . import plain

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from moebius.config import Config
    from moebius.heap import Group

    from .memory import SymmetricMemory

HANDLE_BYTES = 8
ALIGNMENT = 16  # bytes: what a bulk copy moves at least
OTHER_CAPTURE = 2  # csrc/cuda/engine.h, Outcome


@dataclasses.dataclass(frozen=True)
class Machine:
    """What runs the kernels.

    Attributes:
        native: the extension.
        device: of the tensors.
        ordinal: of the device, as the extension counts.
        place: of the tensors, as the checks want it.
        current_stream: the stream that the caller's work goes to, as an address.
    """

    native: Any
    device: torch.device
    ordinal: int
    place: Place
    current_stream: Callable[[], int]

    @classmethod
    def of_device(cls, device: torch.device, extension: Any = None) -> Machine:
        """A CUDA device, run by `_cuda` or by the extension given.

        Raises:
            NativeNotBuiltError: the extension is missing.
            CudaError: there is no GPU or no driver; says which.
            ConfigError: there are GPUs, but not this one, or torch cannot use them.
        """
        extension = extension or native.cuda()
        num_devices = extension.num_devices()
        if device.index >= num_devices:
            raise ConfigError(f"`device` must be one of the {num_devices} CUDA devices here (got {device})")
        if not torch.cuda.is_available():
            raise ConfigError(f"`device` is {device}, but this torch ({torch.__version__}) cannot use CUDA")
        # The documented way makes an object of every answer, which costs more than the half itself.
        raw: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        if raw is None:
            current: Callable[[], int] = lambda: torch.cuda.current_stream(device).cuda_stream  # noqa: E731
        else:
            current = functools.partial(raw, device.index)
        return cls(extension, device, device.index, Place(device.index, ALIGNMENT, reads_late=True), current)


class _Sequence:
    """Rounds that follow one another: those called eagerly (capture 0), or those of one capture.

    The host counts them to check the order of calls and to choose a handle and buffers. The device has its own count:
    replays of graphs come in between.
    """

    __slots__ = ("capture", "next", "table")

    def __init__(self, capture: int, depth: int) -> None:
        self.capture = capture
        self.next = 0
        self.table = RoundTable(depth, is_in_place=False)

    def begin(self, num_tokens: int, handle: int, own: object) -> Round:
        """The next round, which has been enqueued."""
        begun = self.table.begin(self.next, num_tokens, handle, self.capture, own)
        self.next += 1
        return begun


class CudaEngine(Engine):
    """A half enqueues one kernel on the current stream, and so do, eagerly, both at once; nothing waits for the device.

    Eager rounds take turns with `depth` handles and `depth` sets of buffers. A round inside a capture has its own,
    from the graph's memory: they live as long as what the calls returned, and then are the graph's.
    """

    name = "cuda"

    def __init__(self, config: Config, machine: Machine, memory: SymmetricMemory, num_sms: int = 0) -> None:
        """Run rank `memory.rank` on `machine` over memory that is mapped already.

        Args:
            config: the shape of everything.
            machine: that launches the kernels.
            memory: the heaps of all ranks.
            num_sms: most blocks of a kernel; 0 is one for each SM.
        """
        num_ranks = len(memory.addresses)
        self.device = machine.device
        self.place = machine.place
        self.heap_bytes = memory.num_bytes
        self._config = config
        self._wire = Wire.of(config)
        self._num_ranks = num_ranks
        self._machine = machine
        self._stream = machine.current_stream
        self._capture_id = machine.native.capture_id
        self._memory = memory
        # Not torch's memory: a stream that it knows nothing of may be the first to use it.
        self._handles: Any = machine.native.Memory(machine.ordinal, config.depth * HANDLE_BYTES)
        self._eager_handles = [self._handles.address + HANDLE_BYTES * slot for slot in range(config.depth)]
        self._eager = _Sequence(0, config.depth)
        self._captured: _Sequence | None = None
        self._slots: list[slots.SlotBuffers | None] = [None] * config.depth
        self._given: list[slots.SlotBuffers | None] = [None] * config.depth
        self._native: Any = machine.native.Engine(
            **shape_fields(config, num_ranks),
            **engine_fields(config),
            num_sms=num_sms,
            device=machine.ordinal,
            rank=memory.rank,
            heaps=memory.addresses,
        )

    @classmethod
    def on_device(
        cls, group: Group, config: Config, device: torch.device, num_sms: int | None, transport: str
    ) -> CudaEngine:
        """Make the memory of one rank and its engine; collective. See `AllToAll`."""
        from .transports import connect, machine_for  # they need this module

        machine = machine_for(group, device, transport)
        most = machine.native.num_multiprocessors(device.index)
        if num_sms is not None and (not isinstance(num_sms, int) or not 1 <= num_sms <= most):
            raise ConfigError(f"`num_sms` must be None or an int in [1, {most}] (got {num_sms!r})")
        _, num_ranks = rank_and_size(group)
        if num_sms is None and isinstance(group, VirtualRank):
            # Kernels of ranks that wait for one another have to fit on the device together.
            num_sms = max(1, most // num_ranks)
        machine, memory = connect(group, config, machine, transport)
        return cls(config, machine, memory, num_sms or 0)

    def plain(self) -> Any:
        """See `Engine`."""
        machine = self._machine
        return machine.native.plain(
            engine=self._native,
            device_index=self.place.device_index,
            current_stream=None if self.device.type == "cuda" else machine.current_stream,
            inputs=plain.inputs(self._config),
            sequence=self._eager,
            rounds=self._eager.table.slots,
            handles=self._eager_handles,
            shown=self._slots,
            stages=plain.STAGES,
            classes=plain.classes(self._eager),
        )

    @property
    def epoch(self) -> int:
        """Rounds begun by calls: eagerly, or, while capturing, in the capture."""
        return self._sequence(self._capture_id(self._stream())).next

    def send_dispatch(self, sent: tuple[int, ...], num_tokens: int) -> Round:
        """See `Engine`."""
        stream = self._stream()
        sequence, handle, own = self._next_round(stream)
        outcome = self._native.dispatch_send(stream, sequence.capture, handle, *sent)
        if outcome:
            self._refuse(outcome, "dispatch")
        return sequence.begin(num_tokens, handle, own)

    def receive_dispatch(self, begun: Round, given: Given | None, stats: tuple[int, bool, int]) -> slots.SlotBuffers:
        """See `Engine`."""
        buffers = self._buffers(begun.capture, begun.epoch, given)
        outcome = self._native.dispatch_recv(
            self._stream(), begun.capture, begun.handle, buffers.native, stats[0], stats[1], stats[2]
        )
        if outcome:
            self._refuse(outcome, "dispatch receive", begun)
        return buffers

    def send_combine(self, begun: Round, sent: tuple[int, int, int]) -> None:
        """See `Engine`."""
        address, expert_stride, row_stride = sent
        outcome = self._native.combine_send(
            self._stream(), begun.capture, begun.handle, address, expert_stride, row_stride
        )
        if outcome:
            self._refuse(outcome, "combine", begun)

    def receive_combine(self, begun: Round, out: int, out_stride: int, weights: int, wait_stats: int) -> None:
        """See `Engine`."""
        outcome = self._native.combine_recv(
            self._stream(), begun.capture, begun.handle, out, out_stride, begun.num_tokens, weights, wait_stats
        )
        if outcome:
            self._refuse(outcome, "combine receive", begun)

    def dispatch(
        self, sent: tuple[int, ...], num_tokens: int, given: Given | None, stats: tuple[int, bool, int]
    ) -> tuple[Round, slots.SlotBuffers]:
        """See `Engine`. In a graph, where launches cost little, two kernels take less time than one that does both."""
        stream = self._stream()
        if self._capture_id(stream) != 0:
            return super().dispatch(sent, num_tokens, given, stats)
        sequence, handle, own = self._next_round(stream)
        buffers = self._buffers(sequence.capture, sequence.next, given)
        outcome = self._native.dispatch(stream, sequence.capture, handle, *sent, buffers.native, *stats)
        if outcome:
            self._refuse(outcome, "dispatch")
        return sequence.begin(num_tokens, handle, own), buffers

    def combine(self, begun: Round, sent: tuple[int, int, int], received: tuple[int, int, int, int]) -> None:
        """See `Engine`; one kernel or two, as `dispatch`."""
        if begun.capture != 0:
            super().combine(begun, sent, received)
            return
        out, out_stride, *rest = received
        outcome = self._native.combine(self._stream(), 0, begun.handle, *sent, out, out_stride, begun.num_tokens, *rest)
        if outcome:
            self._refuse(outcome, "combine", begun)

    def is_own(self, begun: Round) -> bool:
        """See `Engine`; a round of another capture than the last is nobody's."""
        sequence = self._eager if begun.capture == 0 else self._captured
        return sequence is not None and begun.capture == sequence.capture and sequence.table.find(begun.epoch) is begun

    def dead_ranks(self) -> tuple[int, ...]:
        """See `Engine`; reads the device's memory."""
        return tuple(rank for rank, is_dead in enumerate(self._native.dead()) if is_dead)

    def mask(self, rank: int, dead: bool) -> None:
        """See `Engine`; waits for the current stream, for the device's memory is written at once."""
        self._native.synchronize(self._stream())
        self._native.mask(rank, dead)

    def remote_bytes(self) -> int:
        """See `Engine`; reads the device's memory, so what has run so far."""
        return int(self._native.remote_bytes())

    def check(self) -> None:
        """Raise the first fault that a kernel has recorded since the last look."""
        fault = self._native.take_fault()
        if fault is None:
            return
        error = error_of(fault, *HALVES[fault["half"]], self._config.num_experts)
        if fault["kind"] != FAULT_ROUTING and self._capture_id(self._stream()) == 0:
            # Which round of ours it was: the device knows its own number of each. Not while capturing, when reading is
            # not allowed; the kernels know that the round is lost in any case.
            for begun in self._eager.table.live():
                if self._native.round_of(begun.handle) == fault["epoch"]:
                    begun.lose(error)
        raise error

    def synchronize(self) -> None:
        """Wait for the work of the current stream, then check.

        Not for the device's: kernels of other ranks may be on it, and wait for what this thread has yet to launch.
        """
        self._native.synchronize(self._stream())
        self.check()

    def close(self) -> None:
        """Wait for kernels that use the memory, and free it. Graphs that hold our calls must not be replayed again."""
        # It fails when a kernel of the process did, or while capturing: freeing is then all that is left to do.
        with contextlib.suppress(CudaError):
            self._native.synchronize(self._stream())
        self._native = self._handles = None
        self._memory.close()

    def _sequence(self, capture: int) -> _Sequence:
        if capture == 0:
            return self._eager
        if self._captured is None or self._captured.capture != capture:
            self._captured = _Sequence(capture, self._config.depth)
        return self._captured

    def _next_round(self, stream: int) -> tuple[_Sequence, int, Tensor | None]:
        """Its sequence, its handle, and what the handle is kept alive by; refused while its slot is in use."""
        capture = self._capture_id(stream)
        sequence = self._eager if capture == 0 else self._sequence(capture)
        sequence.table.check_free(sequence.next)
        if capture == 0:
            return sequence, self._eager_handles[sequence.next % len(self._eager_handles)], None
        own = torch.empty(1, dtype=torch.int64, device=self.device)
        return sequence, own.data_ptr(), own

    def _buffers(self, capture: int, epoch: int, given: Given | None) -> slots.SlotBuffers:
        """Of a round's result."""
        if capture != 0:
            return self._make_buffers(*given or (None, None))
        slot = epoch % len(self._slots)
        if given is None:
            kept = self._slots[slot]
            if kept is None:
                kept = self._slots[slot] = self._make_buffers()
            return kept
        x, scales = given
        found = self._given[slot]
        if found is None or (x is None) or (scales is None and self._wire.scale_dtype is not None):
            made = self._make_buffers(x, scales)
        else:
            made = dataclasses.replace(found, x=x, scales=scales).for_device(self._machine.native)
        self._given[slot] = made
        return made

    def _make_buffers(self, x: Tensor | None = None, scales: Tensor | None = None) -> slots.SlotBuffers:
        if self._config.layout == "token_major":
            made = slots.token_major_copies(self._config, self._wire, self._num_ranks, self.device)
        else:
            made = slots.expert_major(self._config, self._wire, self._num_ranks, self.device, x, scales)
        return made.for_device(self._machine.native)

    def _refuse(self, outcome: int, call: str, begun: Round | None = None) -> NoReturn:
        """Raise why the extension launched nothing."""
        if outcome == OTHER_CAPTURE and begun is not None:
            began = "eagerly" if begun.capture == 0 else "in a capture"
            raise StateError(
                f"{call}: round {begun.epoch} began {began}; all halves of a round belong to one and the same capture, "
                "or to none"
            )
        self.check()
        raise StateError(f"{call}: another thread uses this object")
