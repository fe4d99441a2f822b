"""What a planted mistake is."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One place of csrc changed, or several of a file, in a copy that only the test's own program is built from.

    Attributes:
        name: of the mutant.
        file: below csrc.
        text: stands in the file exactly once.
        replacement: what stands there instead.
        breaks: what goes wrong.
        case: of tests/simt/kernels, in which it shows.
        kernels: it is planted in; if empty, the one of the file, or all of single halves that include it.
        num_seeds: it has to be caught within.
        also: more places of the file, each with what stands there instead.
        timeout_s: what takes longer has been caught: it never ends.
    """

    name: str
    file: str
    text: str
    replacement: str
    breaks: str
    case: str
    kernels: tuple[str, ...] = ()
    num_seeds: int = 60
    also: tuple[tuple[str, str], ...] = ()
    timeout_s: float = 60
