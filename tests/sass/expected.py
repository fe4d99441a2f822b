"""What the kernels' machine code is meant to hold: one table of registers, one of instructions.

A kernel is named by the beginning of its mangled name without namespaces; template arguments follow it, so
`dispatch_send_kernelILNS_8EncodingE1E` is the one that quantises.
"""

import dataclasses
from collections.abc import Callable

from tests.sass.listing import Kernel
from tests.sass.objects import ARCHS, HOPPER

# Most registers of a thread. Blocks have 512 threads (rank.cuh, kThreadsPerBlock) and a multiprocessor has 65 536
# registers, so 128 is all there is: beyond it a kernel spills. The combine halves take it for the rows that they have
# on their way.
REGISTERS = {
    "dispatch_send_kernel": 120,
    "dispatch_recv_kernel": 116,
    "combine_send_kernel": 128,
    "combine_recv_kernel": 128,
    "dispatch_kernel": 124,
    "combine_kernel": 128,
}
FILES = tuple(name.removesuffix("_kernel") for name in REGISTERS)
HOPPER_ON = HOPPER
ALL = ARCHS
QUANTISES = "dispatch_send_kernelILNS_8EncodingE1E"
COPIES = "dispatch_send_kernelILNS_8EncodingE0E"
MOVES_ROWS = "combine_send_kernelILb1E"  # rows go home as they are
SUMS_ROWS = "combine_send_kernelILb0E"
BOTH_QUANTISES = "dispatch_kernelILNS_8EncodingE1E"
BOTH_COPIES = "dispatch_kernelILNS_8EncodingE0E"
BOTH_MOVES_ROWS = "combine_kernelILb1E"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Something that is meant to be in a kernel, or not to be.

    Attributes:
        kernel: beginning of the names it holds for; "" for all.
        what: in words.
        holds: whether it does.
        archs: where it is meant.
    """

    kernel: str
    what: str
    holds: Callable[[Kernel], bool]
    archs: tuple[str, ...] = ALL

    def applies(self, kernel: str, arch: str) -> bool:
        """Whether it says anything about this kernel on this architecture."""
        return arch in self.archs and kernel.startswith(self.kernel)


def has(pattern: str) -> Callable[[Kernel], bool]:
    """The instruction is there."""
    return lambda kernel: kernel.count(pattern) > 0


def lacks(pattern: str) -> Callable[[Kernel], bool]:
    """The instruction is not there."""
    return lambda kernel: kernel.count(pattern) == 0


BULK_LOAD, BULK_STORE = r"UBLKCP\.S\.G", r"UBLKCP\.G\.S"
TO_E4M3 = r"F2FP\.SATFINITE\.E4M3\.F32\.PACK_AB_MERGE_C"
STREAM_LOAD = r"LDG\.E\.NA\.LTC(128|256)B\.128\.CONSTANT"
STORE_16 = r"STG?\.E\.128"
LOAD_16 = r"LDG?\.E\.(\S+\.)?128"
KEPT_LOAD_16 = r"LDG?\.E\.(?!NA\b)(\S+\.)?128"  # its line stays in the first cache
PROXY_FENCE = r"FENCE\.VIEW\.ASYNC"

RULES = (
    Rule("", "no local memory is touched", lacks(r"(LDL|STL)\b")),
    Rule("", "no arithmetic in double", lacks(r"(DADD|DMUL|DFMA)\b")),
    Rule("", "waits for the kernel before it", has(r"ACQBULK"), HOPPER_ON),
    Rule("", "lets the kernel after it start", has(r"PREEXIT"), HOPPER_ON),
    Rule("", "no bulk copies before sm_90", lacks(r"UBLKCP"), ("80",)),
    Rule("dispatch_send", "signals by a release at system scope", Kernel.has_release_sys),
    Rule("dispatch_send", "closes the old round by an acquire at system scope", Kernel.has_acquire_sys),
    Rule("dispatch_send", "sends by bulk copies", has(BULK_STORE), HOPPER_ON),
    Rule("dispatch_send", "sends 16 bytes a store", has(STORE_16), ("80",)),
    Rule("dispatch_send", "reads x 16 bytes a load, past the first cache", has(STREAM_LOAD)),
    Rule(QUANTISES, "converts to FP8 two numbers an instruction", has(TO_E4M3), HOPPER_ON),
    Rule(COPIES, "converts nothing", lacks(r"F2FP\S*E4M3")),
    # The wide one would wait for each row that the token before it sent to the other ranks.
    Rule("dispatch_send", "fences its stages", has(PROXY_FENCE), HOPPER_ON),
    Rule("dispatch_send", "fences no more than its stages", lambda kernel: not kernel.has_wide_proxy_fence()),
    Rule("dispatch_recv", "fences what peers wrote", Kernel.has_wide_proxy_fence, HOPPER_ON),
    Rule("dispatch_recv", "waits by an acquire at system scope", Kernel.has_acquire_sys),
    Rule("dispatch_recv", "fetches rows by bulk copies", has(BULK_LOAD), HOPPER_ON),
    Rule("dispatch_recv", "writes rows by bulk copies", has(BULK_STORE), HOPPER_ON),
    Rule("dispatch_recv", "moves 16 bytes an instruction", has(LOAD_16), ("80",)),
    Rule("dispatch_recv", "writes 16 bytes a store", has(STORE_16), ("80",)),
    Rule("dispatch_recv", "converts nothing", lacks(r"F2FP\S*E4M3")),
    Rule("combine_send", "signals by a release at system scope", Kernel.has_release_sys),
    Rule("combine_send", "no FP8", lacks(r"F2FP\S*E4M3")),
    Rule(MOVES_ROWS, "fetches rows by bulk copies", has(BULK_LOAD), HOPPER_ON),
    Rule(MOVES_ROWS, "sends rows by bulk copies", has(BULK_STORE), HOPPER_ON),
    Rule(SUMS_ROWS, "reads 16 bytes a load", has(LOAD_16)),
    Rule(SUMS_ROWS, "reads rows that leave the second cache first", Kernel.has_evict_first),
    Rule(SUMS_ROWS, "reads no row into the first cache", lacks(KEPT_LOAD_16)),
    Rule(SUMS_ROWS, "sends 16 bytes a store", has(STORE_16)),
    # Multiplied and added, each rounded once, as on the other engines: fused, the sum has other bits.
    Rule(SUMS_ROWS, "sums without a fused multiply-add", lacks(r"FFMA\b")),
    Rule("combine_recv", "waits by an acquire at system scope", Kernel.has_acquire_sys),
    Rule("combine_recv", "reads 16 bytes a load", has(LOAD_16)),
    Rule("combine_recv", "reads rows that leave the second cache first", Kernel.has_evict_first),
    Rule("combine_recv", "reads no row into the first cache", lacks(KEPT_LOAD_16)),
    Rule("combine_recv", "writes 16 bytes a store", has(STORE_16)),
    Rule("combine_recv", "sums without a fused multiply-add", lacks(r"FFMA\b")),
    Rule("combine_recv", "no FP8", lacks(r"F2FP\S*E4M3")),
    # Both halves in one kernel: what is meant of each, as far as it can be told apart.
    Rule("dispatch_kernel", "signals by a release at system scope", Kernel.has_release_sys),
    Rule("dispatch_kernel", "waits by an acquire at system scope", Kernel.has_acquire_sys),
    Rule("dispatch_kernel", "reads x 16 bytes a load, past the first cache", has(STREAM_LOAD)),
    Rule("dispatch_kernel", "fetches received rows by bulk copies", has(BULK_LOAD), HOPPER_ON),
    Rule("dispatch_kernel", "sends by bulk copies", has(BULK_STORE), HOPPER_ON),
    Rule("dispatch_kernel", "fences what peers wrote", Kernel.has_wide_proxy_fence, HOPPER_ON),
    Rule("dispatch_kernel", "sends 16 bytes a store", has(STORE_16), ("80",)),
    Rule(BOTH_QUANTISES, "converts to FP8 two numbers an instruction", has(TO_E4M3), HOPPER_ON),
    Rule(BOTH_COPIES, "converts nothing", lacks(r"F2FP\S*E4M3")),
    Rule("combine_kernel", "signals by a release at system scope", Kernel.has_release_sys),
    Rule("combine_kernel", "waits by an acquire at system scope", Kernel.has_acquire_sys),
    Rule("combine_kernel", "reads 16 bytes a load", has(LOAD_16)),
    Rule("combine_kernel", "reads rows that leave the second cache first", Kernel.has_evict_first),
    Rule("combine_kernel", "reads no row into the first cache", lacks(KEPT_LOAD_16), HOPPER_ON),
    Rule("combine_kernel", "writes 16 bytes a store", has(STORE_16)),
    Rule("combine_kernel", "sums without a fused multiply-add", lacks(r"FFMA\b")),
    Rule("combine_kernel", "no FP8", lacks(r"F2FP\S*E4M3")),
    Rule(BOTH_MOVES_ROWS, "fetches rows by bulk copies", has(BULK_LOAD), HOPPER_ON),
    Rule(BOTH_MOVES_ROWS, "sends rows by bulk copies", has(BULK_STORE), HOPPER_ON),
)


def short_name(mangled: str) -> str:
    """A kernel's name from its own part on: `combine_recv_kernelILNS_...`."""
    beginnings = [mangled.find(name) for name in REGISTERS]
    begin = max(beginnings)
    return mangled[begin:] if begin >= 0 else mangled
