"""Refusal of keywords outside DeepEP's signatures, by name and with what is supported instead."""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from moebius.errors import UnknownKeywordError

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
T = TypeVar("T")

_DIALECTS = {
    "NVFP4 dispatch": ("use_nvfp4", "x_global_scale"),
    "single-batch overlap": (
        "overlap",
        "packed_recv_count",
        "comp_signal",
        "block_m",
        "threshold",
        "num_sms",
        "src_signals",
        "src_signal_expect_value",
    ),
    "hybrid-ep": ("topk_weights", "use_ue8m0_for_sf"),
    "DeepEP V2": (
        "num_bytes",
        "num_max_tokens_per_rank",
        "hidden",
        "num_topk",
        "use_fp8_dispatch",
        "expert_alignment",
        "num_qps",
        "previous_event",
        "async_with_compute_stream",
        "allocate_on_comm_stream",
        "do_handle_copy",
        "do_cpu_sync",
        "do_expand",
        "do_zero_padding",
        "use_tma_aligned_col_major_sf",
        "defer_epilogue",
        "bias",
    ),
}
_DIALECT_OF = {keyword: dialect for dialect, keywords in _DIALECTS.items() for keyword in keywords}


def strict_keywords(call: Callable[P, T]) -> Callable[P, T]:
    """Make `call` raise `UnknownKeywordError` for a keyword it has not, `inspect.signature` staying its own."""
    supported = [name for name in inspect.signature(call).parameters if name != "self"]
    known = frozenset(supported)

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if not known.issuperset(kwargs):
            unknown = [name for name in kwargs if name not in known]
            named = ", ".join(
                f"`{name}`" + (f" (of {_DIALECT_OF[name]})" if name in _DIALECT_OF else "") for name in unknown
            )
            raise UnknownKeywordError(f"{call.__qualname__} has no {named}; supported: {', '.join(supported)}")
        return call(*args, **kwargs)

    return checked
