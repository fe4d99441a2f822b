"""What a config means in bytes and dtypes: the bridge from `Config` to the layout in csrc/layout.h."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from . import native
from .config import SCALE_GROUP, Config
from .errors import ConfigError

if TYPE_CHECKING:
    from . import _core

TORCH_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# csrc/formats.h, Dtype and ScaleFormat.
DTYPE_CODE = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
SCALE_FORMAT_CODE = {"fp32": 0, "pow2": 1, "ue8m0": 2}


@dataclasses.dataclass(frozen=True)
class Wire:
    """One token and one reply as they travel.

    Attributes:
        dtype: of the payload.
        payload_len: elements of the payload.
        scale_dtype: of the scales, None without.
        scale_len: elements of the scales.
        output_dtype: of the experts' outputs and of the result.
    """

    dtype: torch.dtype
    payload_len: int
    scale_dtype: torch.dtype | None
    scale_len: int
    output_dtype: torch.dtype
    hidden: int

    @classmethod
    def of(cls, config: Config) -> Wire:
        """Read it off the config."""
        output = TORCH_DTYPE[config.output_dtype]
        if config.payload == "opaque":
            scale_dtype = torch.uint8 if config.scale_bytes else None
            return cls(torch.uint8, config.payload_bytes, scale_dtype, config.scale_bytes, output, config.hidden)
        if config.payload == "fp8_e4m3":
            num_groups = config.hidden // SCALE_GROUP
            if config.scale_format == "ue8m0":
                scale_dtype, scale_len = torch.int32, num_groups // 4
            else:
                scale_dtype, scale_len = torch.float32, num_groups
            return cls(torch.float8_e4m3fn, config.hidden, scale_dtype, scale_len, output, config.hidden)
        return cls(TORCH_DTYPE[config.payload], config.hidden, None, 0, output, config.hidden)

    @property
    def payload_bytes(self) -> int:
        """Bytes of one token's payload."""
        return self.payload_len * self.dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        """Bytes of one token's scales."""
        return self.scale_len * self.scale_dtype.itemsize if self.scale_dtype is not None else 0

    @property
    def reply_bytes(self) -> int:
        """Bytes of one row that combine sends."""
        return self.hidden * self.output_dtype.itemsize


def shape_fields(config: Config, num_ranks: int) -> dict[str, Any]:
    """What the layout is computed from, by name.

    Raises:
        ConfigError: `config` is none, or `num_ranks` does not divide the experts.
    """
    if not isinstance(config, Config):
        raise ConfigError(f"`config` must be a moebius.Config (got {type(config).__name__})")
    config.num_local_experts(num_ranks)
    wire = Wire.of(config)
    return {
        "num_ranks": num_ranks,
        "num_experts": config.num_experts,
        "num_topk": config.num_topk,
        "max_num_tokens": config.max_num_tokens,
        "depth": config.depth,
        "payload_bytes": wire.payload_bytes,
        "scale_bytes": wire.scale_bytes,
        "reply_bytes": wire.reply_bytes,
        "has_weights": config.weights_at == "dispatch",
        "has_positions": config.layout == "expert_major",
    }


def shape_of(config: Config, num_ranks: int, *, has_outbox: bool = False) -> _core.Shape:
    """The shape that the layout is computed from; raises as `shape_fields`.

    Args:
        config: the shape of the traffic.
        num_ranks: R.
        has_outbox: some rank is remote to another, so messages leave from an outbox.

    Raises:
        NativeNotBuiltError: the extension is missing.
    """
    shape: _core.Shape = native.core().Shape(**shape_fields(config, num_ranks), has_outbox=has_outbox)
    return shape


def engine_fields(config: Config) -> dict[str, Any]:
    """What an engine is told of a config beside the shape, by name."""
    return {
        "is_token_major": config.layout == "token_major",
        "scale_format": SCALE_FORMAT_CODE[config.scale_format],
        "output_dtype": DTYPE_CODE[Wire.of(config).output_dtype],
        "hidden": config.hidden,
        "timeout_ns": round(config.timeout_s * 1e9),
    }
