"""The shape of an all-to-all, validated once, equal on all ranks."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

from .errors import ConfigError

Payload = Literal["bf16", "fp16", "fp32", "fp8_e4m3", "opaque"]
OutputDtype = Literal["bf16", "fp16", "fp32"]
ScaleFormat = Literal["fp32", "pow2", "ue8m0"]
Layout = Literal["expert_major", "token_major"]
WeightsAt = Literal["dispatch", "combine"]

SCALE_GROUP = 128  # channels that share one FP8 scale; the granularity of DeepSeek-V3 and DeepGEMM
MAX_TOPK = 32
MAX_TOKENS = 1 << 20  # a signal's count has 23 bits; far above any decode or prefill batch
MAX_DEPTH = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What every rank agrees on before the first round.

    Attributes:
        num_experts: E, experts over all ranks; a multiple of the number of ranks.
        num_topk: K, choices per token, 1 to 32.
        hidden: H, elements of a token; H times the element size is a multiple of 16 bytes, and H of 128 for FP8
            (512 when the scales are packed UE8M0).
        max_num_tokens: M, most tokens a rank may send in one dispatch.
        payload: what travels in dispatch. "bf16", "fp16", "fp32" travel as they are; "fp8_e4m3" is quantised on
            the way out, with a scale per 128 channels; "opaque" is bytes that the caller quantised.
        scale_format: of FP8: "fp32"; "pow2" (fp32 rounded up to a power of two); "ue8m0" (the exponent byte of
            those, four packed in an int32).
        layout: "expert_major" packs the rows of each local expert; "token_major" shows the received tokens in place.
        weights_at: "dispatch" sends the router's weights along, and combine is summed on the expert's rank;
            "combine" takes them at combine, where each expert's row travels alone (the contract of DeepEP).
        output: dtype of the experts' outputs and of combine's result; None takes the payload's own (bf16 for FP8
            and opaque).
        payload_bytes: bytes of one opaque token, a multiple of 16.
        scale_bytes: bytes of scales that travel beside one opaque token, a multiple of 4; 0 for none.
        depth: D, rounds that may be open at once.
        chunk_bytes: most bytes of one message of dispatch to a rank on another host, so that the network carries the
            first while the next are written; 0 sends one message to each rank. CPU engine; on CUDA the last block posts
            each rank's message when all are written, and there is nothing to overlap.
        timeout_s: deadline of every wait, in seconds.

    Raises:
        ConfigError: names the field, what was expected and what came.

    Source: DESIGN.md, "Memory".
    """

    num_experts: int
    num_topk: int
    hidden: int
    max_num_tokens: int
    payload: Payload = "bf16"
    scale_format: ScaleFormat = "fp32"
    layout: Layout = "expert_major"
    weights_at: WeightsAt = "dispatch"
    output: OutputDtype | None = None
    payload_bytes: int = 0
    scale_bytes: int = 0
    depth: int = 2
    chunk_bytes: int = 0
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        """Check every field by itself and the fields against each other."""
        self._check_int("num_experts", 1, 1 << 20)
        self._check_int("num_topk", 1, MAX_TOPK)
        self._check_int("hidden", 1, 1 << 24)
        self._check_int("max_num_tokens", 1, MAX_TOKENS)
        self._check_int("depth", 2, MAX_DEPTH)
        self._check_int("payload_bytes", 0, 1 << 26)
        self._check_int("scale_bytes", 0, 1 << 20)
        self._check_int("chunk_bytes", 0, 1 << 30)
        for name, choices in (
            ("payload", get_args(Payload)),
            ("scale_format", get_args(ScaleFormat)),
            ("layout", get_args(Layout)),
            ("weights_at", get_args(WeightsAt)),
            ("output", (None, *get_args(OutputDtype))),
        ):
            value = getattr(self, name)
            if (value is not None and not isinstance(value, str)) or value not in choices:
                raise ConfigError(f"`{name}` must be one of {', '.join(map(repr, choices))} (got {value!r})")
        self._check_timeout()
        self._check_payload()

    def _check_int(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(f"`{name}` must be an int in [{low}, {high}] (got {value!r})")

    def _check_timeout(self) -> None:
        value = self.timeout_s
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not 1e-6 <= value <= 1e6:
            raise ConfigError(f"`timeout_s` must be a number of seconds in [1e-6, 1e6] (got {value!r})")

    def _check_payload(self) -> None:
        if self.num_topk > self.num_experts:
            raise ConfigError(f"`num_topk` must be at most `num_experts` = {self.num_experts} (got {self.num_topk})")
        if self.layout == "token_major" and self.weights_at != "dispatch":
            raise ConfigError("`layout` 'token_major' needs `weights_at` 'dispatch': its rows return already weighted")
        if self.payload == "opaque":
            if self.payload_bytes < 16 or self.payload_bytes % 16:
                raise ConfigError(
                    f"`payload_bytes` must be a positive multiple of 16 for payload 'opaque' (got {self.payload_bytes})"
                )
            if self.scale_bytes % 4:
                raise ConfigError(f"`scale_bytes` must be a multiple of 4 (got {self.scale_bytes})")
        elif self.payload_bytes or self.scale_bytes:
            raise ConfigError(f"`payload_bytes` and `scale_bytes` belong to payload 'opaque' (got {self.payload!r})")
        if self.payload == "fp8_e4m3":
            multiple = 4 * SCALE_GROUP if self.scale_format == "ue8m0" else SCALE_GROUP
            if self.hidden % multiple:
                raise ConfigError(
                    f"`hidden` must be a multiple of {multiple} for {self.payload} with {self.scale_format} scales "
                    f"(got {self.hidden})"
                )
        elif self.scale_format != "fp32":
            raise ConfigError(
                f"`scale_format` {self.scale_format!r} belongs to payload 'fp8_e4m3' (got {self.payload!r})"
            )
        for what, dtype in (("payload", self.payload), ("output", self.output_dtype)):
            size = {"bf16": 2, "fp16": 2, "fp32": 4}.get(dtype)
            if size and self.hidden * size % 16:
                raise ConfigError(
                    f"`hidden` must make rows of a multiple of 16 bytes for {what} {dtype} of {size} bytes "
                    f"(got {self.hidden})"
                )

    @property
    def output_dtype(self) -> OutputDtype:
        """Dtype of the experts' outputs and of combine's result."""
        if self.output is not None:
            return self.output
        if self.payload in ("bf16", "fp16", "fp32"):
            return self.payload
        return "bf16"

    def num_local_experts(self, num_ranks: int) -> int:
        """L, the experts of one rank.

        Raises:
            ConfigError: `num_ranks` is below 1 or does not divide `num_experts`.
        """
        if not isinstance(num_ranks, int) or isinstance(num_ranks, bool) or num_ranks < 1:
            raise ConfigError(f"`num_ranks` must be an int of at least 1 (got {num_ranks!r})")
        if self.num_experts % num_ranks:
            raise ConfigError(f"`num_experts` must be a multiple of the {num_ranks} ranks (got {self.num_experts})")
        return self.num_experts // num_ranks
