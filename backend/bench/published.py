"""Times that other libraries publish for one decode shape, and the two-term constants that follow from them.

All for 128 tokens a rank of 7168 channels, top-8, as their documents gave them when they were read in 2026. None of
them was measured by us, and each has its own way of measuring: averages or medians, with or without the routing.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from .cuda.fit import two_terms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moebius.config import Config

READ_IN = "2026"
TOKENS, HIDDEN, TOPK = 128, 7168, 8
PER_NODE = 8  # GPUs of a node, of all who have NICs in the table
FP8_MESSAGE = HIDDEN + 4 * HIDDEN // 128 + 16  # payload, fp32 scales, header: one (token, expert) of DeepEP V1
BF16_ROW = 2 * HIDDEN


@dataclasses.dataclass(frozen=True)
class Published:
    """What one source says of one system.

    Attributes:
        source: document or thread.
        system: GPU and links.
        payload: of dispatch, as `Config.payload`; combine is BF16 everywhere.
        times_us: EP size -> (dispatch, combine); None where the source has only the other.
    """

    source: str
    system: str
    payload: str
    times_us: dict[int, tuple[float | None, float | None]]


DEEPEP_V1 = Published(
    "DeepEP V1, docs/legacy.md",
    "H800, NVLink 160 GB/s + CX7",
    "fp8_e4m3",
    {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)},
)
PUBLISHED = (
    DEEPEP_V1,
    Published("DeepEP PR #173", "H20 + CX7", "fp8_e4m3", {8: (37, 59), 16: (119, 199), 32: (157, 280), 64: (176, 318)}),
    Published("DeepEP PR #500 (Ant, layered)", "H20 class", "fp8_e4m3", {8: (57, 72.5)}),
    Published(
        "pplx-garden, docs/fabric-lib.md",
        "H100/H200 + CX7",
        "fp8_e4m3",
        {8: (50.5, 65.3), 16: (110.2, 185.5), 32: (153.9, 266.3), 64: (187.5, 309.1)},
    ),
    Published(
        "DeepEP in pplx-garden's table",
        "H100/H200 + CX7",
        "fp8_e4m3",
        {8: (42.6, 72.0), 16: (123.9, 203.0), 32: (159.1, 285.0), 64: (177.9, 325.0)},
    ),
    Published(
        "pplx-garden, docs/fabric-lib.md",
        "EFA",
        "fp8_e4m3",
        {8: (49.7, 64.2), 16: (214.8, 241.5), 32: (229.1, 335.0), 64: (266.7, 391.2)},
    ),
    Published("UCCL, ep/README", "H200 + 16 x 200G EFA", "fp8_e4m3", {16: (226, 293), 32: (465, 694)}),
    Published("UCCL, ep/README", "B200 + 8 x 400G EFA", "fp8_e4m3", {16: (228, 318), 32: (406, 617)}),
    Published("UCCL, ep/README", "MI300X + CX7", "fp8_e4m3", {8: (65, 92), 16: (136, 207), 32: (224, 341)}),
    Published(
        "DeepEP V2, AWS RESULTS-b200.md of 2026-08-24",
        "B200 + EFA",
        "fp8_e4m3",
        {16: (185.6, 199.4), 32: (275.7, 370.9)},
    ),
    Published("MoRI, README", "MI300X + CX7", "fp8_e4m3", {8: (35, 47), 16: (76, 122)}),
    Published("MoRI, README", "MI355X + AINIC", "fp8_e4m3", {8: (31, 36), 16: (84, 108), 32: (152, 187)}),
    Published("Triton-distributed, README", "H800", "fp8_e4m3", {32: (137, None)}),
    Published("NIXL PR #1749 (DeepEP LL)", "8 x H100, NVLink", "bf16", {8: (75.21, None)}),
    Published("NIXL PR #1749 (NIXL EP)", "8 x H100, NVLink", "bf16", {8: (74.76, None)}),
    Published(
        "TensorRT-LLM, blog 18",
        "GB200 NVL72",
        "bf16",
        {8: (31.7, 38.1), 16: (34.6, 39.9), 32: (37.8, 41.1), 64: (41.6, 44.5)},
    ),
)

# NIXL PR #1749: DeepEP LL's BF16 dispatch on 8 x H100 over NVLink, tokens a rank -> us.
_NVLINK_TIMES = {16: 32.06, 32: 37.61, 64: 49.38, 128: 75.21, 256: 128.85, 512: 229.28}
_NVLINK_PEERS, _NVLINK_GB_PER_S = PER_NODE - 1, 450.0  # nominal, of an H100 in one direction
_NIC_GB_PER_S = 50.0  # CX7 at 400 Gbit/s


@dataclasses.dataclass(frozen=True)
class Link:
    """Time of one half over a link: fixed_us + bytes / (efficiency * nominal bandwidth).

    Attributes:
        fixed_us: what a half costs without bytes.
        efficiency: share of the nominal bandwidth that is reached.
        worst: largest distance of a published point from the line, as a share of it; 0 where the caller gave both.
        origin: where the two come from.
    """

    fixed_us: float
    efficiency: float
    worst: float
    origin: str

    def us(self, num_bytes: float, gb_per_s: float) -> float:
        """The estimate; 0 where nothing crosses the link."""
        return self.fixed_us + num_bytes / (1e3 * gb_per_s * self.efficiency) if num_bytes else 0.0


@functools.cache
def nvlink() -> Link:
    """NVLink, from the times of one kernel over the number of its tokens.

    Each token goes to 7 other GPUs, once per expert: 7 x 14336 bytes on average at 8 ranks.
    """
    megabytes = [tokens * _NVLINK_PEERS * BF16_ROW / 1e6 for tokens in _NVLINK_TIMES]
    origin = "fit to DeepEP LL's BF16 dispatch on 8 x H100, 16 to 512 tokens (NIXL PR #1749)"
    return _fit(megabytes, list(_NVLINK_TIMES.values()), _NVLINK_GB_PER_S, origin)


@functools.cache
def nic() -> Link:
    """A NIC, from ten times of one library over EP16 to EP256.

    What crosses it there: a message per (token, expert) of another node, T x 8 x (1 - 8 / R) of them.
    """
    megabytes, times = [], []
    for ranks, (dispatch, combine) in DEEPEP_V1.times_us.items():
        if ranks == PER_NODE:
            continue  # nothing crosses a NIC
        for time_us, message in ((dispatch, FP8_MESSAGE), (combine, BF16_ROW)):
            assert time_us is not None  # DEEPEP_V1 has all of them
            megabytes.append(TOKENS * TOPK * (1 - PER_NODE / ranks) * message / 1e6)
            times.append(time_us)
    origin = "fit to DeepEP V1's dispatch and combine on H800 + CX7, EP16 to EP256 (docs/legacy.md)"
    return _fit(megabytes, times, _NIC_GB_PER_S, origin)


def _fit(megabytes: Sequence[float], times_us: Sequence[float], gb_per_s: float, origin: str) -> Link:
    line = two_terms(megabytes, times_us)
    assert line is not None  # the points above are more than enough
    return Link(line.fixed_us, 1e3 / (line.slope_us * gb_per_s), line.worst, origin)


def same_shape(config: Config) -> list[Published]:
    """What is published for the shape of `config`; nothing for any other than the one that all publish."""
    if (config.max_num_tokens, config.hidden, config.num_topk) != (TOKENS, HIDDEN, TOPK):
        return []
    return [one for one in PUBLISHED if one.payload == config.payload]
