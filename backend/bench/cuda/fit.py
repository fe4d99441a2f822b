"""A fixed cost and a cost per token, fitted to times over the number of tokens."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

FEWEST_POINTS = 3


@dataclasses.dataclass(frozen=True)
class Fit:
    """time = fixed_us + slope_us * tokens.

    Attributes:
        fixed_us: what a call costs without tokens.
        slope_us: what each token a rank adds.
        worst: largest distance of a point from the line, as a share of the point.
        points: how many there were.
    """

    fixed_us: float
    slope_us: float
    worst: float
    points: int


def two_terms(tokens: Sequence[float], times_us: Sequence[float]) -> Fit | None:
    """The line with the least sum of squared relative errors; None for fewer than three sizes.

    Relative, for absolute ones would be those of the largest size, and say nothing of the fixed cost.
    """
    if len(set(tokens)) < FEWEST_POINTS or min(times_us) <= 0.0:
        return None
    weights = [1.0 / time**2 for time in times_us]
    total = sum(weights)
    x = sum(w * t for w, t in zip(weights, tokens, strict=True)) / total
    y = sum(w * t for w, t in zip(weights, times_us, strict=True)) / total
    spread = sum(w * (t - x) ** 2 for w, t in zip(weights, tokens, strict=True))
    slope = sum(w * (t - x) * (u - y) for w, t, u in zip(weights, tokens, times_us, strict=True)) / spread
    fixed = y - slope * x
    worst = max(abs(fixed + slope * t - u) / u for t, u in zip(tokens, times_us, strict=True))
    return Fit(round(fixed, 3), round(slope, 5), round(worst, 4), len(tokens))
