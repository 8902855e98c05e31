"""How numbers are written for people: one spelling for the progress bar, the result table and the report."""

from __future__ import annotations

import math

MISSING = "–"
MODALITY_ORDER = ("text", "audio", "image", "video", "video_audio")


def format_count(count: float | None) -> str:
    """A count with a decimal suffix and three significant digits: 950, 20.5k, 1.23M, 2.26T."""
    if count is None or not math.isfinite(count):
        return MISSING
    count = float(f"{count:.3g}") if abs(count) >= 1e3 else count
    for scale, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= scale:
            value = count / scale
            return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}{suffix}"
    return f"{count:.0f}"


def format_duration(seconds: float | None) -> str:
    """A duration in its two largest units: 42s, 3m 05s, 2h 10m, 4d 03h."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    total = int(round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m {total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h {total % 3600 // 60:02d}m"
    return f"{total // 86400}d {total % 86400 // 3600:02d}h"


def format_value(value: object) -> str:
    """Three decimals from 0.001 on, three significant digits below and from 1,000 on; – for nothing."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.3f}"
    return f"{value:.3g}" if abs(value) < 1e-3 else format_count(value)


def format_change(fraction: float | None) -> str:
    """A relative change in percent with its sign: +4.6 %, −0.3 %; – for nothing."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    return f"{fraction:+.1%}".replace("-", "−").replace("%", " %")


def sort_modalities(names: set[str]) -> list[str]:
    """The names in the order of the sample contract, then what is not a modality (codebooks, rewards) by name."""
    known = [name for name in MODALITY_ORDER if name in names]
    return known + sorted(names.difference(known))
