"""A case: a configuration, a routing and a seed, from which every tensor of every round follows."""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

from moebius import Config
from moebius.reference import DTYPES, RankDispatched, RankInput, quantize_fp8
from tests.helpers.payload import labelled, labelled_bytes
from tests.helpers.routing import ROUTINGS, Shape

PAYLOAD_BYTES = 80  # of the opaque cases: no power of two
SCALE_BYTES = 12


@dataclasses.dataclass(frozen=True)
class Payload:
    """One way to send tokens.

    Attributes:
        name: part of the case's id.
        options: of the config.
        dtype: of x.
        quantized: x and its scales come quantised.
    """

    name: str
    options: dict[str, object]
    dtype: torch.dtype
    quantized: bool = False


PAYLOADS = {
    payload.name: payload
    for payload in (
        Payload("bf16", {"payload": "bf16"}, torch.bfloat16),
        Payload("fp16", {"payload": "fp16"}, torch.float16),
        Payload("fp32", {"payload": "fp32"}, torch.float32),
        Payload("fp32-to-bf16", {"payload": "fp32", "output": "bf16"}, torch.float32),
        Payload("fp8", {"payload": "fp8_e4m3"}, torch.bfloat16),
        Payload("fp8-from-fp32", {"payload": "fp8_e4m3", "output": "fp32"}, torch.float32),
        Payload("fp8-pow2", {"payload": "fp8_e4m3", "scale_format": "pow2"}, torch.float16),
        Payload("fp8-ue8m0", {"payload": "fp8_e4m3", "scale_format": "ue8m0"}, torch.bfloat16),
        Payload("fp8-as-is", {"payload": "fp8_e4m3", "output": "fp16"}, torch.bfloat16, quantized=True),
        Payload(
            "opaque", {"payload": "opaque", "payload_bytes": PAYLOAD_BYTES, "scale_bytes": SCALE_BYTES}, torch.uint8
        ),
        Payload("opaque-bare", {"payload": "opaque", "payload_bytes": PAYLOAD_BYTES}, torch.int16),
    )
}

MODES: dict[str, dict[str, object]] = {
    "expert": {"layout": "expert_major", "weights_at": "dispatch"},
    "expert-late": {"layout": "expert_major", "weights_at": "combine"},
    "token": {"layout": "token_major", "weights_at": "dispatch"},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration, a routing and a seed; see `id`.

    Attributes:
        payload: key of `PAYLOADS`.
        mode: key of `MODES`: layout, and where the weights are given.
        routing: key of `ROUTINGS`.
        padded: the last rows of each rank are padding, told by `num_valid_tokens`.
    """

    num_ranks: int = 2
    num_experts: int = 8
    num_topk: int = 3
    hidden: int = 128
    max_num_tokens: int = 12
    payload: str = "bf16"
    mode: str = "expert"
    routing: str = "uniform"
    depth: int = 2
    padded: bool = False
    timeout_s: float = 20.0

    @property
    def id(self) -> str:
        """As R4-E32-K8-H512-fp8-expert-hot-D2."""
        text = (
            f"R{self.num_ranks}-E{self.num_experts}-K{self.topk}-H{self.hidden}-{self.payload}-{self.mode}-"
            f"{self.routing}-D{self.depth}"
        )
        return f"{text}-padded" if self.padded else text

    @property
    def topk(self) -> int:
        return ROUTINGS[self.routing].num_topk or self.num_topk

    def config(self) -> Config:
        return Config(
            num_experts=self.num_experts,
            num_topk=self.topk,
            hidden=self.hidden,
            max_num_tokens=self.max_num_tokens,
            depth=self.depth,
            timeout_s=self.timeout_s,
            **PAYLOADS[self.payload].options,  # type: ignore[arg-type]
            **MODES[self.mode],  # type: ignore[arg-type]
        )

    def generator(self, *about: object) -> torch.Generator:
        """Random numbers that depend on the case and on what they are for, and not on the order of asking."""
        digest = hashlib.sha256(repr((self.id, about)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def inputs(self, number: int) -> list[RankInput]:
        """What every rank dispatches in round `number`."""
        shape = Shape(self.num_ranks, self.num_experts, self.topk, self.max_num_tokens)
        routed = ROUTINGS[self.routing].make(shape, self.generator("ids", number))
        return [self._input(rank, number, ids) for rank, ids in enumerate(routed)]

    def _input(self, rank: int, number: int, ids: Tensor) -> RankInput:
        generator = self.generator("x", number, rank)
        payload = PAYLOADS[self.payload]
        num_tokens = ids.shape[0]
        scales = None
        if payload.options["payload"] == "opaque":
            rows = labelled_bytes(rank, num_tokens, PAYLOAD_BYTES, generator)
            x = rows.view(payload.dtype)
            if "scale_bytes" in payload.options:
                scales = labelled_bytes(rank, num_tokens, SCALE_BYTES, generator)
        else:
            x = labelled(rank, num_tokens, self.hidden, payload.dtype, generator)
            if payload.quantized:
                x, scales = quantize_fp8(x)
        weights = torch.randn(num_tokens, self.topk, generator=generator)
        return RankInput(
            x=x,
            topk_ids=ids if rank % 2 else ids.to(torch.int32),
            topk_weights=weights,
            scales=scales,
            num_valid_tokens=num_tokens * 2 // 3 if self.padded else None,
        )

    def expert_out(self, number: int, dispatched: list[RankDispatched]) -> list[Tensor]:
        """What the experts of every rank give back: random rows, NaN where no token is, so that reading those shows."""
        config = self.config()
        outputs = []
        for rank, received in enumerate(dispatched):
            rows = received.x.shape[:-1]
            values = torch.randn(*rows, self.hidden, generator=self.generator("experts", number, rank))
            if config.layout == "token_major":
                used = torch.zeros(rows, dtype=torch.bool)
                for source, tokens in enumerate(received.sent):
                    used[source * self.max_num_tokens :][: tokens.numel()] = True
            else:
                used = torch.arange(rows[1]) < received.expert_num_tokens[:, None]
            values[~used] = torch.nan
            outputs.append(values.to(DTYPES[config.output_dtype]))
        return outputs
