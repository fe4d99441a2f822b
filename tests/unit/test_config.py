"""Every field of the config, by itself and against the others; the message says field, expected and got."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

import moebius
from moebius import Config, ConfigError, MoebiusError
from tests.helpers.bad import BAD_FIELDS, GOOD_FIELDS

BAD = [(name, value) for name, values in BAD_FIELDS.items() for value in values]


def test_fields_are_all_covered() -> None:
    assert set(BAD_FIELDS) == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda part: str(part)[:20])
def test_a_bad_field_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"`{name}`.*\(got ") as caught:
        Config(**{**GOOD_FIELDS, name: value})
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, MoebiusError)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_topk": 9}, r"`num_topk` must be at most `num_experts` = 8 \(got 9\)"),
        ({"layout": "token_major", "weights_at": "combine"}, "`layout` 'token_major' needs `weights_at` 'dispatch'"),
        ({"payload": "opaque"}, r"`payload_bytes` must be a positive multiple of 16.*\(got 0\)"),
        ({"payload": "opaque", "payload_bytes": 24}, r"`payload_bytes`.*\(got 24\)"),
        ({"payload": "opaque", "payload_bytes": 32, "scale_bytes": 6}, r"`scale_bytes`.*multiple of 4 \(got 6\)"),
        ({"payload": "fp8_e4m3", "hidden": 192}, r"`hidden` must be a multiple of 128.*\(got 192\)"),
        (
            {"payload": "fp8_e4m3", "scale_format": "ue8m0", "hidden": 640},
            r"`hidden` must be a multiple of 512.*\(got 640\)",
        ),
        ({"scale_format": "pow2"}, r"`scale_format` 'pow2' belongs to payload 'fp8_e4m3' \(got 'bf16'\)"),
        ({"hidden": 12}, r"`hidden` must make rows of a multiple of 16 bytes for payload bf16.*\(got 12\)"),
        ({"payload": "fp32", "output": "bf16", "hidden": 12}, r"`hidden`.*for output bf16.*\(got 12\)"),
        ({"payload": "opaque", "payload_bytes": 32, "hidden": 4}, r"`hidden`.*for output bf16.*\(got 4\)"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**{**GOOD_FIELDS, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 1, "num_topk": 1, "hidden": 8, "max_num_tokens": 1},
        {"payload": "fp32", "hidden": 4},
        {"num_experts": 64, "num_topk": 32, "depth": 8},
        {"timeout_s": 1},
        {"payload": "fp8_e4m3", "hidden": 128, "scale_format": "pow2"},
        {"payload": "fp8_e4m3", "hidden": 512, "scale_format": "ue8m0", "output": "fp32"},
        {"payload": "opaque", "payload_bytes": 16, "scale_bytes": 4, "output": "fp16"},
        {"layout": "token_major"},
        {"weights_at": "combine"},
    ],
)
def test_limits_are_legal(fields: dict[str, Any]) -> None:
    config = Config(**{**GOOD_FIELDS, **fields})
    assert dataclasses.replace(config) == config
    assert hash(dataclasses.replace(config)) == hash(config)


def test_config_is_frozen_and_by_keyword() -> None:
    config = Config(**GOOD_FIELDS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden = 128  # type: ignore[misc]
    with pytest.raises(TypeError):
        Config(8, 2, 64, 4)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Config(**GOOD_FIELDS, colour="red")  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        Config()  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({}, "bf16"),
        ({"payload": "fp16"}, "fp16"),
        ({"payload": "fp32"}, "fp32"),
        ({"payload": "fp8_e4m3", "hidden": 128}, "bf16"),
        ({"payload": "opaque", "payload_bytes": 16}, "bf16"),
        ({"payload": "fp32", "output": "fp16"}, "fp16"),
    ],
)
def test_output_dtype(fields: dict[str, Any], dtype: str) -> None:
    assert Config(**{**GOOD_FIELDS, **fields}).output_dtype == dtype


@pytest.mark.parametrize(
    ("num_ranks", "message"),
    [
        (0, r"`num_ranks` must be an int of at least 1 \(got 0\)"),
        (-1, r"`num_ranks`.*\(got -1\)"),
        (2.0, r"`num_ranks`.*\(got 2\.0\)"),
        (True, r"`num_ranks`.*\(got True\)"),
        (3, r"`num_experts`.*3 ranks \(got 8\)"),
        (16, r"`num_experts`.*16 ranks \(got 8\)"),
    ],
)
def test_ranks_that_do_not_divide_the_experts(num_ranks: Any, message: str) -> None:
    config = Config(**GOOD_FIELDS)
    with pytest.raises(ConfigError, match=message):
        config.num_local_experts(num_ranks)
    with pytest.raises(ConfigError, match=message):
        moebius.plan(config, num_ranks)
    assert config.num_local_experts(4) == 2


@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, "2", [2]], ids=str)
def test_virtual_ranks_take_a_count(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"`num_ranks` must be an int of at least 1 \(got " + re.escape(repr(value))):
        moebius.virtual_ranks(value)


@pytest.mark.parametrize(
    "value", [None, 0, "gloo", object(), [], moebius.VirtualRank], ids=lambda value: str(value)[:12]
)
def test_a_group_is_a_group(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"`group` must be .*got"):
        moebius.AllToAll(value, Config(**GOOD_FIELDS))


@pytest.mark.parametrize("value", [None, 0, {}, Config, GOOD_FIELDS], ids=lambda value: str(value)[:12])
def test_a_config_is_a_config(value: Any) -> None:
    group = moebius.virtual_ranks(1)[0]
    with pytest.raises(ConfigError, match=r"`config` must be a moebius\.Config .got"):
        moebius.AllToAll(group, value)


def test_ranks_must_agree_and_may_try_again() -> None:
    config = Config(**GOOD_FIELDS)
    first, second = moebius.virtual_ranks(2)
    with moebius.AllToAll(first, config) as a2a:
        with pytest.raises(ConfigError, match=r"ranks must agree.*depth=2.*\(got .*depth=3"):
            moebius.AllToAll(second, dataclasses.replace(config, depth=3))
        with pytest.raises(ConfigError, match="`num_experts`"):
            moebius.AllToAll(second, dataclasses.replace(config, num_experts=9))
        with moebius.AllToAll(second, config) as other:
            assert (a2a.rank, other.rank) == (0, 1)
            assert a2a.num_ranks == other.num_ranks == 2
