"""What of vLLM the adapter leans on, and whether the installed version still has it.

vLLM has no registry for all-to-all backends, so an adapter from outside has to hold on to internals. All of them are
named here, and looked up in vLLM's source rather than in its modules: so a version is checked in a moment, before
anything of it is changed, and without importing it.
"""

from __future__ import annotations

import ast
import dataclasses
from typing import TYPE_CHECKING

from moebius.errors import VersionError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SUPPORTED = ((0, 30), (0, 33))  # first and last minor version that was run
MOE = "model_executor/layers/fused_moe"
COMMUNICATORS = "distributed/device_communicators"


@dataclasses.dataclass(frozen=True)
class Point:
    """One thing of vLLM that has to be where it was.

    Attributes:
        path: source file inside vLLM's package.
        name: of a function, class or assignment; `Class.member` inside a class.
        purpose: what the adapter needs it for.
        parameters: those that it must have, under these names.
        is_patched: whether the adapter replaces it (in a process that chose us).
    """

    path: str
    name: str
    purpose: str
    parameters: tuple[str, ...] = ()
    is_patched: bool = False

    @property
    def module(self) -> str:
        """The module's name."""
        return "vllm." + self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


_PREPARE = (
    "a1",
    "topk_weights",
    "topk_ids",
    "num_experts",
    "expert_map",
    "apply_router_weight_on_input",
    "quant_config",
    "defer_input_quant",
)
_FINALIZE = (
    "output",
    "fused_expert_output",
    "topk_weights",
    "topk_ids",
    "apply_router_weight_on_input",
    "weight_and_reduce_impl",
)
_PREPARE_FINALIZE = "FusedMoEPrepareAndFinalizeModular"

POINTS = (
    Point("config/parallel.py", "All2AllBackend", "the names that --all2all-backend takes", is_patched=True),
    Point("config/parallel.py", "ParallelConfig.all2all_backend", "where the name is checked", is_patched=True),
    Point("engine/arg_utils.py", "_compute_kwargs", "its cache has the command line's choices: emptied"),
    Point(
        "config/parallel.py",
        "ParallelConfig.use_sequence_parallel_moe",
        "with DP and TP each rank sends its own part of the tokens",
        is_patched=True,
    ),
    Point(
        "config/parallel.py",
        "ParallelConfig.use_batched_dp_moe",
        "batched format: vLLM's smaller default for max_num_batched_tokens",
        is_patched=True,
    ),
    Point("config/vllm.py", "VllmConfig.__post_init__", "dual-batch overlap accepts backends by name", is_patched=True),
    Point(
        "platforms/interface.py",
        "Platform.get_device_communicator_cls",
        "our subclass of the platform's communicator",
        is_patched=True,
    ),
    Point("distributed/parallel_state.py", "in_the_same_node_as", "of vLLM's manager"),
    Point(f"{COMMUNICATORS}/base_device_communicator.py", "Cache.get_or_create", "one exchange for all equal layers"),
    Point(f"{COMMUNICATORS}/base_device_communicator.py", "All2AllManagerBase.get_handle", "base of our manager"),
    Point(f"{COMMUNICATORS}/base_device_communicator.py", "All2AllManagerBase.max_sms_used", "base of our manager"),
    Point(f"{COMMUNICATORS}/all2all.py", "AgRsAll2AllManager", "data parallelism without expert parallelism"),
    Point(
        f"{MOE}/config.py",
        "FusedMoEParallelConfig.use_batched_activation_format",
        "makes vLLM pick experts of the format in use",
        is_patched=True,
    ),
    Point(
        f"{MOE}/routed_experts.py",
        "RoutedExperts._get_quant_method",
        "where vLLM picks a layer's experts: of the other format if there are none of the one in use",
        ("prefix", "quant_config", "moe_config"),
        is_patched=True,
    ),
    Point(f"{MOE}/config.py", "FusedMoEParallelConfig.use_all2all_kernels", "whether an exchange is needed"),
    Point(f"{MOE}/config.py", "FusedMoEConfig.hidden_dim", "shape of the exchange"),
    Point(f"{MOE}/config.py", "FusedMoEConfig.experts_per_token", "shape of the exchange"),
    Point(f"{MOE}/config.py", "FusedMoEConfig.num_experts", "shape of the exchange"),
    Point(f"{MOE}/config.py", "FusedMoEConfig.in_dtype", "shape of the exchange"),
    Point(f"{MOE}/config.py", "FusedMoEConfig.max_num_tokens", "shape of the exchange"),
    Point(
        f"{MOE}/all2all_utils.py",
        "maybe_make_prepare_finalize",
        "hands out our prepare/finalize; rebound wherever it was imported by name",
        ("moe", "quant_config"),
        is_patched=True,
    ),
    Point(f"{MOE}/all2all_utils.py", "get_ep_all2all_manager", "the manager of the group"),
    Point(f"{MOE}/modular_kernel.py", "FusedMoEActivationFormat.BatchedExperts", "a format"),
    Point(f"{MOE}/modular_kernel.py", "FusedMoEActivationFormat.Standard", "a format"),
    Point(f"{MOE}/modular_kernel.py", "ExpertTokensMetadata.expert_num_tokens", "counts for batched experts"),
    Point(f"{MOE}/modular_kernel.py", f"{_PREPARE_FINALIZE}.prepare_async", "overridden", _PREPARE),
    Point(f"{MOE}/modular_kernel.py", f"{_PREPARE_FINALIZE}.prepare", "overridden", _PREPARE),
    Point(f"{MOE}/modular_kernel.py", f"{_PREPARE_FINALIZE}.finalize_async", "overridden", _FINALIZE),
    Point(f"{MOE}/modular_kernel.py", f"{_PREPARE_FINALIZE}.finalize", "overridden", _FINALIZE),
    Point(
        f"{MOE}/modular_kernel.py",
        "FusedMoEExpertsModular.apply",
        "overridden by our experts for the CPU",
        ("output", "hidden_states", "w1", "w2", "activation", "expert_tokens_meta"),
    ),
    Point(f"{MOE}/topk_weight_and_reduce.py", "TopKWeightAndReduceDelegate", "tells who weights and reduces"),
    Point(
        f"{MOE}/utils.py",
        "moe_kernel_quantize_input",
        "quantisation after arrival",
        ("A", "A_scale", "quant_dtype", "per_act_token_quant", "block_shape"),
    ),
    Point(
        f"{MOE}/oracle/unquantized.py",
        "backend_to_kernel_cls",
        "CPU: our batched experts, vLLM has none",
        ("backend",),
        is_patched=True,
    ),
    Point(f"{MOE}/oracle/unquantized.py", "UnquantizedMoeBackend.CPU", "CPU: our batched experts"),
    Point(
        f"{MOE}/runner/moe_runner.py",
        "MoERunner._select_forward",
        "CPU: the layer stays one operator, which torch.compile does not look into",
        is_patched=True,
    ),
    Point(f"{MOE}/runner/moe_runner.py", "_moe_forward_shared", "CPU: the operators moe_forward, moe_forward_shared"),
    Point("envs.py", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "how long an exchange waits"),
    Point("forward_context.py", "get_forward_context", "recorded routing"),
    Point("forward_context.py", "ForwardContext.no_compile_layers", "recorded routing: names of layers"),
    Point("forward_context.py", "ForwardContext.attn_metadata", "recorded routing: tells warming up from the rest"),
    Point("v1/worker/ubatching.py", "dbo_current_ubatch_id", "state for each micro-batch"),
    Point("v1/worker/ubatching.py", "dbo_maybe_run_recv_hook", "order of the halves of two micro-batches"),
    Point("utils/import_utils.py", "resolve_obj_by_qualname", "the platform names its communicator by a string"),
)


def missing(root: Path) -> list[tuple[Point, str]]:
    """The points that the vLLM whose package folder is `root` does not have, each with what was found instead."""
    trees: dict[str, ast.Module | None] = {}
    found = []
    for point in POINTS:
        if point.path not in trees:
            path = root / point.path
            trees[point.path] = ast.parse(path.read_bytes()) if path.exists() else None
        tree = trees[point.path]
        problem = "the module is not there" if tree is None else _problem(tree, point)
        if problem:
            found.append((point, problem))
    return found


def check(root: Path, version: str) -> None:
    """Refuse a vLLM that lacks one of the points.

    Raises:
        VersionError: names the first missing point, the version, and what to do.
    """
    gaps = missing(root)
    if gaps:
        point, problem = gaps[0]
        raise VersionError(
            f"vLLM {version} is not one that this moebius can be an all-to-all backend of: {point.module}."
            f"{point.name} ({point.purpose}): {problem}; {len(gaps)} of {len(POINTS)} points moved. Use vLLM "
            f"{_version(SUPPORTED[0])} to {_version(SUPPORTED[1])}, or a moebius made for {version}, or another "
            "--all2all-backend"
        )


def is_supported(version: str) -> bool:
    """Whether the version is in the range that was run."""
    parts = version.split(".")
    if len(parts) < 2 or not all(part.isdigit() for part in parts[:2]):
        return False
    return SUPPORTED[0] <= (int(parts[0]), int(parts[1])) <= SUPPORTED[1]


def _version(of: tuple[int, int]) -> str:
    return ".".join(map(str, of))


def _problem(tree: ast.Module, point: Point) -> str:
    *owners, name = point.name.split(".")
    scope: list[ast.stmt] = tree.body
    for owner in owners:
        classes = [node for node in _statements(scope) if isinstance(node, ast.ClassDef) and node.name == owner]
        if not classes:
            return f"there is no class {owner}"
        scope = classes[0].body
    for node in _statements(scope):
        if name in _names(node):
            has = _parameters(node)
            lacking = [wanted for wanted in point.parameters if wanted not in has]
            return f"it has no parameter {', '.join(lacking)}" if lacking else ""
    return "it is not there"


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a scope, those under an `if` or `try` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)
            yield from _statements(node.orelse)
            if isinstance(node, ast.Try):
                for handler in node.handlers:
                    yield from _statements(handler.body)


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _parameters(node: ast.stmt) -> set[str]:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return set()
    arguments = node.args
    return {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
