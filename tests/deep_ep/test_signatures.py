"""The names, parameters and defaults that users of DeepEP V1 rely on."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

EMPTY = inspect.Parameter.empty

SIGNATURES: dict[str, dict[str, Any]] = {
    "__init__": {
        "self": EMPTY,
        "group": EMPTY,
        "num_nvl_bytes": 0,
        "num_rdma_bytes": 0,
        "low_latency_mode": False,
        "num_qps_per_rank": 24,
        "allow_nvlink_for_low_latency_mode": True,
        "allow_mnnvl": False,
        "explicitly_destroy": False,
        "enable_shrink": False,
        "comm": None,
    },
    "destroy": {"self": EMPTY},
    "is_sm90_compiled": {},
    "set_num_sms": {"new_num_sms": EMPTY},
    "capture": {},
    "get_low_latency_rdma_size_hint": {
        "num_max_dispatch_tokens_per_rank": EMPTY,
        "hidden": EMPTY,
        "num_ranks": EMPTY,
        "num_experts": EMPTY,
    },
    "get_comm_stream": {"self": EMPTY},
    "get_local_buffer_tensor": {
        "self": EMPTY,
        "dtype": EMPTY,
        "size": None,
        "offset": 0,
        "use_rdma_buffer": False,
    },
    "clean_low_latency_buffer": {
        "self": EMPTY,
        "num_max_dispatch_tokens_per_rank": EMPTY,
        "hidden": EMPTY,
        "num_experts": EMPTY,
    },
    "low_latency_dispatch": {
        "self": EMPTY,
        "x": EMPTY,
        "topk_idx": EMPTY,
        "num_max_dispatch_tokens_per_rank": EMPTY,
        "num_experts": EMPTY,
        "cumulative_local_expert_recv_stats": None,
        "dispatch_wait_recv_cost_stats": None,
        "use_fp8": True,
        "round_scale": False,
        "use_ue8m0": False,
        "async_finish": False,
        "return_recv_hook": False,
    },
    "low_latency_combine": {
        "self": EMPTY,
        "x": EMPTY,
        "topk_idx": EMPTY,
        "topk_weights": EMPTY,
        "handle": EMPTY,
        "use_logfmt": False,
        "zero_copy": False,
        "async_finish": False,
        "return_recv_hook": False,
        "out": None,
        "combine_wait_recv_cost_stats": None,
    },
    "low_latency_update_mask_buffer": {"self": EMPTY, "rank_to_mask": EMPTY, "mask": False},
    "low_latency_query_mask_buffer": {"self": EMPTY, "mask_status": EMPTY},
    "low_latency_clean_mask_buffer": {"self": EMPTY},
    "get_next_low_latency_combine_buffer": {"self": EMPTY, "handle": EMPTY},
    "get_dispatch_config": {"num_ranks": EMPTY},
    "get_combine_config": {"num_ranks": EMPTY},
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(subject: Any, name: str) -> None:
    parameters = inspect.signature(getattr(subject.Buffer, name)).parameters
    assert {key: parameter.default for key, parameter in parameters.items()} == SIGNATURES[name]
    assert list(parameters) == list(SIGNATURES[name]), "they are passed by position"
    kinds = {parameter.kind for parameter in parameters.values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize(
    "name", ["is_sm90_compiled", "set_num_sms", "capture", "get_low_latency_rdma_size_hint", "get_dispatch_config"]
)
def test_called_without_an_object(subject: Any, name: str) -> None:
    assert isinstance(inspect.getattr_static(subject.Buffer, name), staticmethod) or any(
        isinstance(vars(base).get(name), staticmethod) for base in subject.Buffer.__mro__
    )


@pytest.mark.parametrize("name", ["get_dispatch_layout", "dispatch", "combine"])
def test_normal_mode_has_its_names(subject: Any, name: str) -> None:
    assert callable(getattr(subject.Buffer, name))


def test_size_hint(subject: Any) -> None:
    hint = subject.Buffer.get_low_latency_rdma_size_hint
    few = hint(128, 2048, 8, 64)
    assert isinstance(few, int)
    assert 0 < few <= hint(256, 2048, 8, 64)
    assert few <= hint(128, 4096, 8, 64)
    # Upstream's own formula gives 1.9e9 here; callers only ever allocate what the hint says.
    assert hint(num_max_dispatch_tokens_per_rank=128, hidden=7168, num_ranks=8, num_experts=256) < 2.0e9


def test_config(subject: Any) -> None:
    config = subject.Config(24, 8, 256, 6, 128)
    assert config.get_nvl_buffer_size_hint(7168 * 2, 8) >= 0
    assert config.get_rdma_buffer_size_hint(7168 * 2, 8) >= 0
    for of in (subject.Buffer.get_dispatch_config(8), subject.Buffer.get_combine_config(8)):
        assert isinstance(of, subject.Config)


def test_num_sms(subject: Any) -> None:
    before = subject.Buffer.num_sms
    assert before == 20
    try:
        subject.Buffer.set_num_sms(24)
        assert subject.Buffer.num_sms == 24
    finally:
        subject.Buffer.set_num_sms(before)


def test_ids_dtype(subject: Any) -> None:
    assert subject.topk_idx_t in (torch.int64, torch.int32)


def test_event(subject: Any) -> None:
    event = subject.EventOverlap()
    assert event.event is None
    with event as entered:
        assert entered is event
