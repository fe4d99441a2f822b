"""What is changed in vLLM once a configuration chose us: all of it, and nothing anywhere else.

In two steps. `install_in_config`, in every process that sees the configuration: what concerns configurations, and the
name of the communicator's class. `install_in_layers`, in processes that make an expert-parallel group: what concerns
the layers, whose modules only workers should have to import.
"""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebius import env

from . import choice, points
from .choice import NAME

if TYPE_CHECKING:
    from collections.abc import Callable

COMMUNICATOR = "moebius.vllm.communicator.MoebiusCommunicator"
LAYER_FORMAT = "moebius_is_batched"  # on the layer's FusedMoEParallelConfig: what was settled for this layer
_installed: dict[str, Any] = {}
_log = logging.getLogger("moebius")


def check() -> None:
    """Refuse a vLLM that is not as expected.

    Raises:
        VersionError: names what has moved.
    """
    import vllm

    points.check(Path(vllm.__file__).parent, vllm.__version__)


def install_in_config() -> None:
    """The first step; see above. May be repeated.

    Raises:
        VersionError: this vLLM lacks something; nothing was changed.
    """
    if "platform_communicator" in _installed:
        return
    check()
    from vllm.config.parallel import ParallelConfig
    from vllm.config.vllm import VllmConfig
    from vllm.platforms import current_platform

    platform = type(current_platform)
    _installed["platform_communicator"] = current_platform.get_device_communicator_cls()
    platform.get_device_communicator_cls = classmethod(lambda cls: COMMUNICATOR)
    ParallelConfig.__reduce_ex__ = choice.reduce
    _widen(ParallelConfig, "use_sequence_parallel_moe", _sends_sequence_parallel)
    _widen(ParallelConfig, "use_batched_dp_moe", _has_batched_tokens)
    VllmConfig.__post_init__ = _accepting_overlap(VllmConfig.__post_init__)


def platform_communicator() -> str:
    """The class that the platform would have used for its groups, by its full name."""
    name: str = _installed["platform_communicator"]
    return name


def install_in_layers() -> None:
    """The second step; see above. May be repeated."""
    if "make_prepare_finalize" in _installed:
        return
    from vllm.model_executor.layers.fused_moe import all2all_utils
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
    from vllm.model_executor.layers.fused_moe.oracle import unquantized
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.platforms import current_platform

    _widen(FusedMoEParallelConfig, "use_batched_activation_format", _takes_batched)
    RoutedExperts._get_quant_method = _settling_format(RoutedExperts._get_quant_method)
    original = all2all_utils.maybe_make_prepare_finalize
    _installed["make_prepare_finalize"] = original
    rebind("maybe_make_prepare_finalize", original, _making_ours(original))
    if current_platform.is_cpu():
        experts = unquantized.backend_to_kernel_cls
        rebind("backend_to_kernel_cls", experts, _with_batched_experts(experts))
        MoERunner._select_forward = _as_operator(MoERunner._select_forward)


def prefers_batched_format() -> bool:
    """Whether experts are first looked for among those that take tokens packed by expert, [L, R*M, H].

    Raises:
        ConfigError: MOEBIUS_VLLM_FORMAT has no valid value.
    """
    from vllm.platforms import current_platform

    return (env.vllm_format() or ("standard" if current_platform.is_cpu() else "batched")) == "batched"


def _sends_sequence_parallel(config: Any) -> bool:
    sizes = (config.tensor_parallel_size, config.data_parallel_size)
    return bool(config.all2all_backend == NAME and config.enable_expert_parallel and min(sizes) > 1)


def _has_batched_tokens(config: Any) -> bool:
    is_ours = config.all2all_backend == NAME and config.enable_expert_parallel and config.data_parallel_size > 1
    return bool(is_ours) and prefers_batched_format()


def _takes_batched(parallel: Any) -> bool:
    if parallel.all2all_backend != NAME or not parallel.use_all2all_kernels:
        return False
    settled: bool | None = vars(parallel).get(LAYER_FORMAT)
    return prefers_batched_format() if settled is None else settled


def _widen(owner: type, name: str, is_ours: Callable[[Any], bool]) -> None:
    """Let a property be true for us as well; for any other backend it says what it said."""
    before = vars(owner)[name].fget
    setattr(owner, name, property(functools.wraps(before)(lambda self: bool(before(self)) or is_ours(self))))


def rebind(name: str, before: Any, after: Any) -> None:
    """Replace a function in every module of vLLM that holds it, for they import it by name."""
    for module_name, module in list(sys.modules.items()):
        # vars: an attribute access would set off the lazy imports that some modules have.
        if module_name.startswith("vllm.") and vars(module).get(name) is before:
            setattr(module, name, after)


def _accepting_overlap(before: Callable[..., None]) -> Callable[..., None]:
    """Under another name while vLLM asserts that the backend is one that can overlap micro-batches: ours can."""

    @functools.wraps(before)
    def post_init(self: Any, *args: Any, **kwargs: Any) -> None:
        parallel = self.parallel_config
        if parallel.all2all_backend != NAME or not parallel.use_ubatching:
            before(self, *args, **kwargs)
            return
        parallel.all2all_backend = "deepep_low_latency"
        try:
            before(self, *args, **kwargs)
        finally:
            parallel.all2all_backend = NAME

    return post_init


def _making_ours(before: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(before)
    def maybe_make_prepare_finalize(moe: Any, quant_config: Any, *args: Any, **kwargs: Any) -> Any:
        from . import layers

        made = None
        if moe.moe_parallel_config.all2all_backend == NAME:
            made = layers.make_prepare_finalize(moe, quant_config, kwargs)
        return before(moe, quant_config, *args, **kwargs) if made is None else made

    return maybe_make_prepare_finalize


def _settling_format(before: Callable[..., Any]) -> Callable[..., Any]:
    """The layer's format is that of its experts: vLLM is asked for some of one format, then for some of the other.

    It looks for experts of the format that the layer's configuration names, and raises where there are none. Which
    there are depends on the quantisation, so the answer is kept for each layer. Not with MOEBIUS_VLLM_FORMAT.
    """

    @functools.wraps(before)
    def get_quant_method(self: Any, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        parallel = moe_config.moe_parallel_config
        if parallel.all2all_backend != NAME or not parallel.use_all2all_kernels or env.vllm_format():
            return before(self, prefix, quant_config, moe_config)
        preferred = prefers_batched_format()
        setattr(parallel, LAYER_FORMAT, preferred)
        try:
            made = before(self, prefix, quant_config, moe_config)
        except (NotImplementedError, ValueError) as refusal:
            setattr(parallel, LAYER_FORMAT, not preferred)
            try:
                made = before(self, prefix, quant_config, moe_config)
            except (NotImplementedError, ValueError):
                raise refusal from None
            words = [("standard", "batched")[is_batched] for is_batched in (preferred, not preferred)]
            _log.info("moebius: %s has no %s experts (%s): %s format", prefix or "a layer", words[0], refusal, words[1])
        experts = getattr(made, "experts_cls", None)
        if experts is not None:
            # A --moe-backend may name experts whatever the format that was asked for.
            setattr(parallel, LAYER_FORMAT, experts.activation_format().name == "BatchedExperts")
        return made

    return get_quant_method


def _with_batched_experts(before: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(before)
    def backend_to_kernel_cls(backend: Any) -> Any:
        classes = before(backend)
        if backend.name != "CPU":
            return classes
        from .cpu_experts import MoebiusBatchedCPUExperts

        return [*classes, MoebiusBatchedCPUExperts]

    return backend_to_kernel_cls


def _as_operator(before: Callable[..., Any]) -> Callable[..., Any]:
    """On the CPU vLLM lets torch.compile look into the layer; as elsewhere, it must not when the layer communicates."""

    @functools.wraps(before)
    def select_forward(self: Any) -> Any:
        import torch

        parallel = self.moe_config.moe_parallel_config
        if parallel.all2all_backend != NAME or not parallel.use_ep:
            return before(self)
        operators = torch.ops.vllm
        return operators.moe_forward if self._shared_experts is None else operators.moe_forward_shared

    return select_forward
