"""Text for a terminal: tables, sizes, a progress bar."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_BAR_CELLS = 28


def out(text: str = "") -> None:
    """Write a line of the result. Where nobody reads it any more (`| head`), the program ends."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Or Python would try to write the rest when it ends, and say that it could not.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Align columns: the first `left` to the left, numbers to the right; a rule under the header."""
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def us(value: float | None) -> str:
    """Microseconds with three digits that matter; a dash for None."""
    if value is None or value != value:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def size(num_bytes: float) -> str:
    """Bytes in decimal units, three digits."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000.0
    digits = 0 if unit == "B" or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"


class Progress:
    """A bar on stderr; where that is no terminal, a line now and then."""

    def __init__(self, label: str) -> None:
        """Start the clock."""
        self._label, self._begin = label, time.monotonic()
        self._live = sys.stderr.isatty()
        self._shown = -1.0

    def show(self, fraction: float, note: str = "") -> None:
        """Draw the state: `fraction` of the work is done."""
        elapsed = time.monotonic() - self._begin
        left = f"{elapsed / fraction * (1.0 - fraction):.0f} s left" if fraction > 0.02 else ""
        if self._live:
            full = round(fraction * _BAR_CELLS)
            bar = "█" * full + "░" * (_BAR_CELLS - full)
            sys.stderr.write(f"\r\x1b[2K{self._label:<10} {bar} {fraction:4.0%}  {note}  {left}")
            sys.stderr.flush()
        elif fraction - self._shown >= 0.25 or fraction >= 1.0 > self._shown:
            self._shown = fraction
            sys.stderr.write(f"{self._label}: {fraction:.0%}  {note}\n")

    def done(self, note: str = "") -> None:
        """End the line."""
        if self._live:
            sys.stderr.write(f"\r\x1b[2K{self._label:<10} done in {time.monotonic() - self._begin:.1f} s  {note}\n")
            sys.stderr.flush()
