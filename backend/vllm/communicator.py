"""The platform's communicator with our all-to-all manager in the expert-parallel group; else as the platform has it."""

from __future__ import annotations

import logging
from typing import Any

import vllm
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed.device_communicators.all2all import AgRsAll2AllManager
from vllm.distributed.device_communicators.base_device_communicator import Cache
from vllm.utils.import_utils import resolve_obj_by_qualname

from moebius._version import __version__
from moebius.all_to_all import AllToAll
from moebius.config import Config

from . import patches, points
from .choice import NAME

_log = logging.getLogger("moebius")
_PlatformCommunicator: Any = resolve_obj_by_qualname(patches.platform_communicator())


class MoebiusAll2AllManager(AgRsAll2AllManager):  # type: ignore[misc]
    """Hands out exchanges, one for all layers of the same shape.

    Without expert parallelism there is nothing to exchange, and vLLM gathers tokens by collectives over this object:
    that part is inherited.
    """

    def __init__(self, cpu_group: Any, tcp_store_group: Any = None) -> None:
        """Start without exchanges; the first layer of a shape makes one."""
        super().__init__(cpu_group, tcp_store_group)
        self.handle_cache = Cache()

    def get_handle(self, kwargs: dict[str, Any]) -> AllToAll:
        """The exchange for a shape. Collective, as layers are built in the same order on every rank.

        Args:
            kwargs: fields of `moebius.Config`.
        """
        handle: AllToAll = self.handle_cache.get_or_create(kwargs, self._make)
        return handle

    def _make(self, **fields: Any) -> AllToAll:
        return AllToAll(self.cpu_group, Config(**fields))

    def max_sms_used(self) -> int | None:
        """None of the device's multiprocessors are taken away from the model."""
        return 0

    def destroy(self) -> None:
        """Close every exchange."""
        for handle in list(self.handle_cache._cache.values()):
            handle.close()


class MoebiusCommunicator(_PlatformCommunicator):  # type: ignore[misc]
    """Every collective is the platform's; the all-to-all manager of the expert-parallel group is ours."""

    def __init__(
        self,
        cpu_group: Any,
        device: Any = None,
        device_group: Any = None,
        unique_name: str = "",
        *args: Any,
        use_all2all: bool = False,
        **kwargs: Any,
    ) -> None:
        """Let the platform build its own, without a manager where we bring one: it would not know the name."""
        config = get_current_vllm_config_or_none()
        is_expert_group = unique_name.split(":")[0] == "ep"
        is_chosen = config is not None and config.parallel_config.all2all_backend == NAME
        is_ours = is_expert_group and is_chosen and use_all2all
        given = use_all2all and not is_ours
        super().__init__(cpu_group, device, device_group, unique_name, *args, use_all2all=given, **kwargs)
        if is_expert_group and is_chosen:
            patches.install_in_layers()
        if is_ours:
            self.use_all2all = True
            self.all2all_manager = MoebiusAll2AllManager(self.cpu_group, kwargs.get("tcp_store_group"))
            if config.parallel_config.enable_expert_parallel:
                _announce(self.world_size)


def _announce(num_ranks: int) -> None:
    """The one line by which a user sees that we are active."""
    if not _log.hasHandlers():
        # Nobody configured our logger: our line goes where vLLM's go.
        theirs = logging.getLogger("vllm")
        _log.handlers = theirs.handlers
        _log.setLevel(theirs.level)
    untested = "" if points.is_supported(vllm.__version__) else " (a version it was not run with)"
    how = "batched" if patches.prefers_batched_format() else "standard"
    _log.info(
        "moebius %s is the expert-parallel all-to-all of vLLM %s%s: %d ranks, %s format",
        __version__,
        vllm.__version__,
        untested,
        num_ranks,
        how,
    )
