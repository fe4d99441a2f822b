"""What nvcc, ptxas and cuobjdump say of an object, as data. Pure: from text."""

import dataclasses
import re

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<text>[A-Z][^;]*?)\s*;")
_RESOURCES = re.compile(
    r"Function (?P<name>\S+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) .*?LOCAL:(?P<local>\d+)"
)
_PTXAS = re.compile(
    r"entry function '(?P<name>\S+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads",
    re.DOTALL,
)
_QUIET = ("ptxas info", "bytes stack frame", "Function properties")


@dataclasses.dataclass
class Kernel:
    """One kernel for one architecture.

    Attributes:
        name: mangled.
        code: its instructions in order, without predicates and encodings.
        registers: of a thread.
        stack: bytes of a thread.
        local: bytes of a thread.
        spilled: bytes stored and loaded because registers ran out.
    """

    name: str
    code: list[str]
    registers: int = -1
    stack: int = -1
    local: int = -1
    spilled: int = -1

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches from its start."""
        return sum(re.match(pattern, line) is not None for line in self.code)

    def has_acquire_sys(self) -> bool:
        """A load at system scope, after which what was cached is dropped."""
        return self._follows(r"LDG?\.E(\.64)?\.STRONG\.SYS", r"CCTL\.IVALL", 4)

    def has_release_sys(self) -> bool:
        """A fence at system scope, and then a store at system scope."""
        return self._follows(r"MEMBAR\.(ALL|SC)\.SYS", r"STG?\.E(\.64)?\.STRONG\.SYS", 24)

    def has_evict_first(self) -> bool:
        """A load of 16 bytes that its lines do not outlive in the second cache.

        The policy is in the descriptor: written down whole for sm_80, put together from 0x120 and 0xf0 after it.
        """
        return self._follows(r"\S*MOV\S* U?R\d+, (RZ, RZ, )?0x(12f00000|120)$", r"LDG\.E\.NA\.128", 32)

    def has_wide_proxy_fence(self) -> bool:
        """A fence between ordinary accesses and bulk copies that is for global memory, too: it waits for stores."""
        return self._follows(r"MEMBAR\.\w+\.(GPU|SYS)", r"FENCE\.VIEW\.ASYNC", 2)

    def _follows(self, first: str, second: str, within: int) -> bool:
        return any(
            re.match(first, line)
            and any(re.match(second, later) for later in self.code[index + 1 : index + 1 + within])
            for index, line in enumerate(self.code)
        )


def kernels(sass: str, resources: str, log: str) -> list[Kernel]:
    """The kernels of an object.

    Args:
        sass: of `cuobjdump --dump-sass`.
        resources: of `cuobjdump --dump-resource-usage`.
        log: of nvcc with `-Xptxas -v`.
    """
    found: dict[str, Kernel] = {}
    now: Kernel | None = None
    for line in sass.splitlines():
        if "Function :" in line:
            now = found.setdefault(name := line.split()[-1], Kernel(name, []))
        elif now is not None and (match := _INSTRUCTION.match(line)):
            now.code.append(match["text"])
    for match in _RESOURCES.finditer(resources):
        kernel = found[match["name"]]
        kernel.registers, kernel.stack, kernel.local = (int(match[key]) for key in ("registers", "stack", "local"))
    for match in _PTXAS.finditer(log):
        if match["name"] in found:
            found[match["name"]].spilled = int(match["stores"]) + int(match["loads"])
    return list(found.values())


def complaints(log: str) -> list[str]:
    """Lines of nvcc's output that are more than the report it was asked for."""
    return [line for line in log.splitlines() if line.strip() and not any(quiet in line for quiet in _QUIET)]
