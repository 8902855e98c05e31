"""Line charts as inline SVG: a few points and numbers in, one ``<figure>`` out. Colours come from the page's CSS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape

from omni_train.reporting.formatting import MODALITY_ORDER, format_count

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26
MAX_POINTS = 400
SMOOTH_FROM = 40
NUM_COLORS = 8


@dataclass(slots=True)
class Series:
    """One named line; ``points`` are (x, y) in the order of x. A y that is not finite interrupts the line."""

    name: str
    points: list[tuple[float, float]]


def line_chart(title: str, series: list[Series], *, x_label: str = "tokens") -> str:
    """The figure of ``series``, or "" where no point is finite. The legend gives each line's last value.

    A line of 40 points or more is drawn twice: as it is, faint, and smoothed by an exponential mean over 5 % of it.
    """
    finite = [(x, y) for line in series for x, y in line.points if math.isfinite(y)]
    if not finite:
        return ""
    x_ticks = nice_ticks(min(x for x, _ in finite), max(x for x, _ in finite), 4)
    y_ticks = nice_ticks(min(y for _, y in finite), max(y for _, y in finite), 5)
    frame = Frame(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    parts = [_axes(frame, x_ticks, y_ticks, x_label)]
    legend = []
    for number, line in enumerate(series):
        color = color_of(line.name, number)
        parts.append(_line(frame, line, color))
        last = next((y for _, y in reversed(line.points) if math.isfinite(y)), None)
        value = "–" if last is None else f"{last:.4g}"
        legend.append(f'<li><i style="background:var({color})"></i>{escape(line.name)} <b>{value}</b></li>')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    return f'<figure><figcaption>{escape(title)}</figcaption>{svg}<ul class="legend">{"".join(legend)}</ul></figure>'


@dataclass(slots=True)
class Frame:
    """The data range that the plot area shows."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` numbers from at most ``low`` to at least ``high``, 1, 2, 2.5 or 5 times a power of ten apart."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = abs(low) * 0.1 or 1.0
        low, high = (0.0, high + pad) if 0 <= low < pad else (low - pad, high + pad)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def smooth(values: list[float]) -> list[float]:
    """The exponential mean of ``values`` over a span of 5 % of them, without start-up bias; skips non-finite ones."""
    decay = math.exp(-1 / max(len(values) * 0.05, 1.0))
    total = weight = 0.0
    smoothed = []
    for value in values:
        if not math.isfinite(value):
            smoothed.append(value)
            continue
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(total / weight)
    return smoothed


def thin(points: list[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most ``limit`` of the points, evenly spaced, the first and the last among them."""
    if len(points) <= limit:
        return points
    return [points[round(number * (len(points) - 1) / (limit - 1))] for number in range(limit)]


def color_of(name: str, number: int) -> str:
    """The CSS variable of a line: a modality has its own colour in every chart, other lines go by position."""
    index = MODALITY_ORDER.index(name) if name in MODALITY_ORDER else number
    return f"--c{index % NUM_COLORS}"


def format_tick(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1e4:
        return format_count(value)
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def _axes(frame: Frame, x_ticks: list[float], y_ticks: list[float], x_label: str) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in y_ticks:
        y = frame.y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{format_tick(tick)}</text>')
    for number, tick in enumerate(x_ticks):
        is_last = number == len(x_ticks) - 1
        label = f"{format_tick(tick)} {x_label}" if is_last else format_tick(tick)
        anchor = "end" if is_last else "start" if number == 0 else "middle"
        parts.append(f'<text x="{frame.x(tick):.1f}" y="{bottom + 16}" text-anchor="{anchor}">{escape(label)}</text>')
    return "".join(parts)


def _line(frame: Frame, line: Series, color: str) -> str:
    xs, ys = [x for x, _ in line.points], [y for _, y in line.points]
    if len(ys) < SMOOTH_FROM:
        dots = "".join(
            f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.2" fill="var({color})">'
            f"<title>{escape(line.name)} {y:.4g} at {format_count(x)}</title></circle>"
            for x, y in line.points
            if math.isfinite(y)
        )
        return _path(frame, line.points, color, "line") + (dots if len(ys) <= SMOOTH_FROM // 2 else "")
    smoothed = list(zip(xs, smooth(ys), strict=True))
    return _path(frame, thin(line.points), color, "raw") + _path(frame, thin(smoothed), color, "line")


def _path(frame: Frame, points: list[tuple[float, float]], color: str, css_class: str) -> str:
    commands, is_drawing = [], False
    for x, y in points:
        if math.isfinite(y):
            commands.append(f"{'L' if is_drawing else 'M'}{frame.x(x):.1f} {frame.y(y):.1f}")
        is_drawing = math.isfinite(y)
    return f'<path class="{css_class}" style="stroke:var({color})" d="{"".join(commands)}"/>'
