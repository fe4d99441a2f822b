"""Plots as inline SVG: no library, no script; colours come from the page's style sheet."""

from __future__ import annotations

import dataclasses
import html
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 1000.0
_CHAR = 6.6  # width of a character of 12 px text, about


@dataclasses.dataclass(frozen=True)
class Curve:
    """One distribution: evenly spaced quantiles from 0 to 100 %, in microseconds."""

    name: str
    style: str
    quantiles: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Span:
    """A bar on a lane, in microseconds."""

    label: str
    style: str
    begin: float
    end: float


def _svg(width: float, height: float, label: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{html.escape(label)}">\n'
        + "\n".join(body)
        + "\n</svg>"
    )


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _rect(x: float, y: float, width: float, height: float, style: str, tip: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(width, 0.5):.2f}" height="{height:.1f}" rx="2" class="{style}">'
        f"<title>{html.escape(tip)}</title></rect>"
    )


def short_us(value: float) -> str:
    """Microseconds or milliseconds, three digits that matter."""
    if value >= 999_500.0:
        return f"{value / 1e6:.3g} s"
    if value >= 9999.5:
        return f"{value / 1000:.3g} ms"
    return f"{value:.0f} µs" if value >= 100 else f"{value:.3g} µs"


def tick_us(value: float) -> str:
    """Microseconds, milliseconds or seconds of a tick: the unit changes with the power of 1000, and nowhere else."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} µs"


def nice_ticks(highest: float, count: int = 6) -> list[float]:
    """Round numbers from 0 up to at most `highest`, about `count` of them."""
    if highest <= 0:
        return [0.0]
    raw = highest / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if power * factor >= raw * 0.999)
    return [step * i for i in range(int(highest / step * 1.0001) + 1)]


def log_ticks(lowest: float, highest: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside the range."""
    powers = range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)
    ticks = [10.0**power * factor for power in powers for factor in (1.0, 2.0, 5.0)]
    return [tick for tick in ticks if lowest <= tick <= highest]


def distribution(label: str, curves: Sequence[Curve], bound_us: float | None) -> str:
    """Share of samples (up) that took at most so long (to the right, logarithmic). Tails are cut at 99.9 %."""
    width, height, left, right, top, bottom = 480.0, 286.0, 44.0, 16.0, 26.0, 34.0
    shown = [list(curve.quantiles[: max(round(0.999 * (len(curve.quantiles) - 1)), 1) + 1]) for curve in curves]
    values = [value for curve in shown for value in (curve[0], curve[-1])] + ([bound_us] if bound_us else [])
    lowest, highest = max(min(values) * 0.85, 1e-3), max(values) * 1.12
    # The medians' own figures stand beside them, outside of the curves, and want room there.
    medians = [max(curve.quantiles[(len(curve.quantiles) - 1) // 2], lowest) for curve in curves]
    margin = 76.0 / (width - left - right)
    lowest = min(lowest, (min(medians) / highest**margin) ** (1 / (1 - margin)))
    if len(curves) > 1:
        highest = max(highest, (max(medians) / lowest**margin) ** (1 / (1 - margin)))

    def at_x(value: float) -> float:
        share = math.log(max(value, lowest) / lowest) / math.log(highest / lowest)
        return left + share * (width - left - right)

    def at_y(share: float) -> float:
        return height - bottom - share * (height - top - bottom)

    body = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        body.append(_line(left, at_y(share), width - right, at_y(share), "grid"))
        body.append(_text(left - 8, at_y(share) + 4, f"{share:.0%}", "tick", "end"))
    last_end = -math.inf
    for tick in log_ticks(lowest, highest):
        text = tick_us(tick)
        if at_x(tick) - len(text) * _CHAR / 2 > last_end + 6:
            body.append(_line(at_x(tick), at_y(0), at_x(tick), at_y(0) + 4, "axis"))
            body.append(_text(at_x(tick), at_y(0) + 18, text, "tick", "middle"))
            last_end = at_x(tick) + len(text) * _CHAR / 2
    if bound_us:
        body.append(_line(at_x(bound_us), top - 4, at_x(bound_us), at_y(0), "bound"))
        body.append(_text(at_x(bound_us), top - 10, f"bound {short_us(bound_us)}", "bound-label", "middle"))
    for curve, quantiles in zip(curves, shown, strict=True):
        steps = len(curve.quantiles) - 1
        points = " ".join(f"{at_x(value):.1f},{at_y(i / steps):.1f}" for i, value in enumerate(quantiles))
        middle = curve.quantiles[steps // 2]
        tip = f"{curve.name}: median {short_us(middle)}"
        body.append(
            f'<polyline points="{points}" class="curve {curve.style}"><title>{html.escape(tip)}</title></polyline>'
        )
        body.append(f'<circle cx="{at_x(middle):.1f}" cy="{at_y(0.5):.1f}" r="4" class="dot {curve.style}"/>')
        # The fastest is written on its left and higher, the others on their right and lower: they may be close.
        is_first = middle <= min(other.quantiles[steps // 2] for other in curves)
        x, y, anchor = (-10.0, -8.0, "end") if is_first else (10.0, 18.0, "start")
        body.append(_text(at_x(middle) + x, at_y(0.5) + y, short_us(middle), f"value {curve.style}", anchor))
    return _svg(width, height, label, body)


def lanes(label: str, rows: Sequence[tuple[str, Sequence[Span]]], group_size: int) -> str:
    """Bars on a common time axis, a row for each rank; a gap after every `group_size` rows."""
    left, right, lane, gap, bottom = 116.0, 14.0, 26.0, 14.0, 34.0
    top = 8.0
    groups = -(-len(rows) // group_size)
    height = top + len(rows) * lane + (groups - 1) * gap + bottom
    highest = max((span.end for _, spans in rows for span in spans), default=1.0) * 1.02

    def at_x(value: float) -> float:
        return left + value / highest * (WIDTH - left - right)

    body = []
    for tick in nice_ticks(highest, 8):
        body.append(_line(at_x(tick), top, at_x(tick), height - bottom, "grid"))
        body.append(_text(at_x(tick), height - bottom + 18, short_us(tick) if tick else "0", "tick", "middle"))
    for index, (name, spans) in enumerate(rows):
        y = top + index * lane + index // group_size * gap
        body.append(_text(left - 12, y + lane / 2 + 4, name, "lane", "end"))
        for span in spans:
            x, width = at_x(span.begin), at_x(span.end) - at_x(span.begin)
            tip = f"{name}, {span.label}: {short_us(span.end - span.begin)}"
            body.append(_rect(x, y + 3, width, lane - 6, span.style, tip))
            if width > len(span.label) * _CHAR + 8:
                body.append(_text(x + width / 2, y + lane / 2 + 4, span.label, "inside", "middle"))
    return _svg(WIDTH, height, label, body)


def bars(label: str, rows: Sequence[tuple[str, str, Sequence[Span]]]) -> str:
    """Stacked bars from 0: (name, text at the end, parts); `begin` and `end` of a part are in the bar's own unit."""
    left, right, lane, top = 216.0, 110.0, 34.0, 4.0
    height = top + lane * len(rows) + 4
    highest = max((spans[-1].end for _, _, spans in rows if spans), default=1.0) or 1.0
    body = []
    for index, (name, text, spans) in enumerate(rows):
        y = top + index * lane
        body.append(_text(left - 12, y + lane / 2 + 4, name, "lane", "end"))
        for span in spans:
            x = left + span.begin / highest * (WIDTH - left - right)
            width = (span.end - span.begin) / highest * (WIDTH - left - right)
            body.append(_rect(x, y + 5, width, lane - 10, span.style, span.label))
            short = span.label.split(":")[0]
            if width > len(short) * _CHAR + 10:
                body.append(_text(x + width / 2, y + lane / 2 + 4, short, "inside", "middle"))
        end = left + (spans[-1].end if spans else 0.0) / highest * (WIDTH - left - right)
        body.append(_text(end + 10, y + lane / 2 + 4, text, "value-plain"))
    return _svg(WIDTH, height, label, body)


@dataclasses.dataclass(frozen=True)
class Series:
    """Points (x, microseconds) of a chart, by ascending x."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]


def chart(
    label: str, series: Sequence[Series], x_label: str, limit_us: float | None = None, limit_label: str = ""
) -> str:
    """Microseconds (up) over x (to the right), both logarithmic, and a dashed line at `limit_us` if there is one."""
    width, height, left, right, top, bottom = 480.0, 300.0, 62.0, 16.0, 16.0, 48.0
    points = [point for one in series for point in one.points]
    limits = [] if limit_us is None else [limit_us]
    xs, ys = [x for x, _ in points] or [1.0], ([y for _, y in points] + limits) or [1.0]
    x_low, x_high = min(xs) * 0.92, max(xs) * 1.08
    y_low, y_high = max(min(ys) * 0.7, 1e-3), max(ys) * 1.4

    def at_x(value: float) -> float:
        return left + math.log(value / x_low) / math.log(x_high / x_low) * (width - left - right)

    def at_y(value: float) -> float:
        share = math.log(max(value, y_low) / y_low) / math.log(y_high / y_low)
        return height - bottom - share * (height - top - bottom)

    body = []
    for tick in log_ticks(y_low, y_high):
        body.append(_line(left, at_y(tick), width - right, at_y(tick), "grid"))
        if math.log(y_high / y_low) < math.log(400) or math.log10(tick) % 1.0 in (0.0, 1.0):
            body.append(_text(left - 8, at_y(tick) + 4, tick_us(tick), "tick", "end"))
    for tick in log_ticks(x_low, x_high):
        body.append(_line(at_x(tick), height - bottom, at_x(tick), height - bottom + 4, "axis"))
        body.append(_text(at_x(tick), height - bottom + 18, f"{tick:g}", "tick", "middle"))
    body.append(_text((left + width - right) / 2, height - 8, x_label, "tick", "middle"))
    for limit in limits:
        body.append(_line(left, at_y(limit), width - right, at_y(limit), "bound"))
        body.append(_text(width - right, at_y(limit) + 14, limit_label, "bound-label", "end"))
    for one in series:
        path = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in one.points)
        body.append(f'<polyline points="{path}" class="curve {one.style}"/>')
        for x, y in one.points:
            tip = f"<title>{html.escape(f'{one.name} at {x:g}: {short_us(y)}')}</title>"
            body.append(f'<circle cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="4" class="dot {one.style}">{tip}</circle>')
    return _svg(width, height, label, body)
