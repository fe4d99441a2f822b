"""The engines that run the halves, behind one interface; what they share, and the CPU engine."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from . import heap, native, slots
from .arguments import Place
from .errors import ConfigError, MoebiusError, RoutingError
from .faults import error_of
from .group import VirtualRank
from .rounds import Round, RoundTable
from .wire import Wire, engine_fields, shape_fields, shape_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from .config import Config


# Tensors to receive x and scales into, as the caller gave them.
Given = tuple["Tensor | None", "Tensor | None"]


class Engine(abc.ABC):
    """One rank's memory and halves. The caller has checked the tensors and the stage of the round.

    Each half raises `PeerTimeoutError` or `ProtocolError` when a round is lost, and dispatch send `RoutingError`: the
    CPU engine when it happens, an asynchronous one at the next call.

    Attributes:
        name: "cpu" or "cuda".
        device: where the tensors are.
        place: the same, as `Arguments` wants it.
        heap_bytes: bytes of the memory that is shared.
    """

    name: str
    device: torch.device
    place: Place
    heap_bytes: int

    @property
    @abc.abstractmethod
    def epoch(self) -> int:
        """Rounds that this object has begun; the number of the next one."""

    @abc.abstractmethod
    def send_dispatch(self, sent: tuple[int, ...], num_tokens: int) -> Round:
        """Begin a round; `sent` as `Arguments.dispatch` returns it.

        Raises:
            StateError: the round before it in the slot still expects a receive.
        """

    @abc.abstractmethod
    def receive_dispatch(self, begun: Round, given: Given | None, stats: tuple[int, bool, int]) -> slots.SlotBuffers:
        """Receive into `given`, or into buffers of the engine's for what is None."""

    @abc.abstractmethod
    def send_combine(self, begun: Round, sent: tuple[int, int, int]) -> None:
        """Send the rows; `sent` as `Arguments.expert_out` returns it."""

    @abc.abstractmethod
    def receive_combine(self, begun: Round, out: int, out_stride: int, weights: int, wait_stats: int) -> None:
        """Receive and sum `begun.num_tokens` rows into the memory at `out`."""

    def dispatch(
        self, sent: tuple[int, ...], num_tokens: int, given: Given | None, stats: tuple[int, bool, int]
    ) -> tuple[Round, slots.SlotBuffers]:
        """Both halves of dispatch."""
        begun = self.send_dispatch(sent, num_tokens)
        return begun, self.receive_dispatch(begun, given, stats)

    def combine(self, begun: Round, sent: tuple[int, int, int], received: tuple[int, int, int, int]) -> None:
        """Both halves of combine; `received` is what `receive_combine` takes."""
        self.send_combine(begun, sent)
        self.receive_combine(begun, *received)

    def plain(self) -> Any:
        """The halves in one native call each, for calls without options (`_cuda.Plain`); None without such."""
        return None

    @abc.abstractmethod
    def is_own(self, begun: Round) -> bool:
        """Whether the round is one of this object's last."""

    @abc.abstractmethod
    def dead_ranks(self) -> tuple[int, ...]:
        """The ranks that this one has given up."""

    @abc.abstractmethod
    def mask(self, rank: int, dead: bool) -> None:
        """Give a rank up, or take it back."""

    @abc.abstractmethod
    def remote_bytes(self) -> int:
        """Bytes written to other ranks' memory so far."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raise what an asynchronous engine has recorded."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Wait until all that was called has run, then check."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of the memory."""


class CpuEngine(Engine):
    """The halves run in the calling thread."""

    name = "cpu"
    device = torch.device("cpu")
    place = Place()

    def __init__(self, group: heap.Group, config: Config) -> None:
        """Make the memory; see `AllToAll`."""
        self._config = config
        self._wire = Wire.of(config)
        _, num_ranks = heap.rank_and_size(group)
        core = native.core()
        shape = shape_of(config, num_ranks, has_outbox=len(set(heap.hosts(group))) > 1)
        self._layout = core.HeapLayout(shape)
        self.heap_bytes = self._layout.total
        self._heap = heap.allocate(group, self._layout, repr(config))
        self._close_network: Callable[[], None] | None = None
        if not isinstance(group, VirtualRank) and None in self._heap.segments:
            from .hosts.network import join  # only here, for few have several hosts

            self._heap.network = network = join(group, self._heap, self._layout, config.timeout_s)
            self._close_network = network.close
        self._rounds = RoundTable(config.depth, is_in_place=config.layout == "token_major")
        self._slots: list[slots.SlotBuffers | None] = [None] * config.depth
        self._native: Any = core.Engine(
            shape=shape,
            **engine_fields(config),
            num_cores=self._heap.num_cores,
            rank=self._heap.rank,
            heaps=self._heap.segments,
            pids=self._heap.pids,
            simd=native.simd_level(),
            network=self._heap.network,
            chunk_bytes=config.chunk_bytes,
        )

    @property
    def epoch(self) -> int:
        """Read in the heap: the host keeps no count of its own."""
        return int(self._native.num_rounds)

    def send_dispatch(self, sent: tuple[int, ...], num_tokens: int) -> Round:
        """See `Engine`."""
        epoch = self._native.num_rounds
        self._rounds.check_free(epoch)
        if self._native.dispatch_send(*sent[:-2]):  # the rest is for engines that read late
            return self._rounds.begin(epoch, num_tokens)
        error = self._failure("dispatch", "send")
        if isinstance(error, RoutingError):
            raise error
        raise self._rounds.begin(epoch, num_tokens).lose(error)

    def receive_dispatch(self, begun: Round, given: Given | None, stats: tuple[int, bool, int]) -> slots.SlotBuffers:
        """See `Engine`."""
        buffers = self._buffers(begun.epoch % self._config.depth, given)
        if not self._native.dispatch_recv(begun.epoch, *buffers.arguments, *stats):
            self._lose(begun, "dispatch", "recv")
        return buffers

    def send_combine(self, begun: Round, sent: tuple[int, int, int]) -> None:
        """See `Engine`."""
        if not self._native.combine_send(begun.epoch, *sent):
            self._lose(begun, "combine", "send")

    def receive_combine(self, begun: Round, out: int, out_stride: int, weights: int, wait_stats: int) -> None:
        """See `Engine`."""
        if not self._native.combine_recv(begun.epoch, out, out_stride, begun.num_tokens, weights, wait_stats):
            self._lose(begun, "combine", "recv")

    def is_own(self, begun: Round) -> bool:
        """See `Engine`."""
        return self._rounds.find(begun.epoch) is begun

    def dead_ranks(self) -> tuple[int, ...]:
        """See `Engine`."""
        return tuple(rank for rank in range(self._heap.num_ranks) if self._native.is_dead(rank))

    def mask(self, rank: int, dead: bool) -> None:
        """See `Engine`."""
        self._native.mask(rank, dead)

    def remote_bytes(self) -> int:
        """See `Engine`."""
        return int(self._native.remote_bytes)

    def check(self) -> None:
        """Nothing to tell: a half raises what it finds."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def close(self) -> None:
        """Disconnect from other hosts. The memory goes with this object and the results that show it."""
        if self._close_network is not None:
            self._close_network()

    def _buffers(self, slot: int, given: Given | None) -> slots.SlotBuffers:
        config, num_ranks = self._config, self._heap.num_ranks
        if given is not None:
            return slots.expert_major(config, self._wire, num_ranks, self.device, *given).for_cpu()
        made = self._slots[slot]
        if made is None:
            if config.layout == "token_major":
                mine = self._heap.segments[self._heap.rank]
                assert mine is not None  # the own heap is always mapped
                made = slots.token_major(config, self._wire, num_ranks, slot, mine, self._layout).for_cpu()
            else:
                made = slots.expert_major(config, self._wire, num_ranks, self.device).for_cpu()
            self._slots[slot] = made
        return made

    def _failure(self, op: str, half: str) -> MoebiusError:
        return error_of(self._native.fault(), op, half, self._config.num_experts)

    def _lose(self, begun: Round, op: str, half: str) -> NoReturn:
        raise begun.lose(self._failure(op, half))


def resolve(device: torch.device | str | int | None) -> torch.device:
    """The device that is meant, a CUDA device with its index; None is torch's default one.

    Raises:
        ConfigError: it is no device, or one that no engine runs on.
    """
    try:
        found = torch.get_default_device() if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"`device` must be a torch device, its name or None (got {device!r})") from error
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"`device` must be of type cpu or cuda (got {str(found)!r})")
    if found.type == "cuda" and found.index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
        return torch.device("cuda", index)
    return found


def make(group: heap.Group, config: Config, device: torch.device, num_sms: int | None, transport: str) -> Engine:
    """Make the engine of `device` for one rank. Collective.

    Raises:
        ConfigError: the config does not fit the group, or `num_sms` or `transport` the device.
    """
    shape_fields(config, heap.rank_and_size(group)[1])
    if device.type == "cpu":
        if num_sms is not None:
            raise ConfigError(f"`num_sms` belongs to CUDA devices (got {num_sms!r} for the CPU)")
        if transport != "auto":
            raise ConfigError(f"`transport` belongs to CUDA devices (got {transport!r} for the CPU)")
        return CpuEngine(group, config)
    if isinstance(group, VirtualRank) and len(set(heap.hosts(group))) > 1:
        raise ConfigError("ranks on several hosts need the CPU engine")
    from .cuda.engine import CudaEngine

    return CudaEngine.on_device(group, config, device, num_sms, transport)
