"""Numbers as a reader wants them: few digits, and the unit."""

from __future__ import annotations

import math
from typing import Any


def plain(value: float) -> str:
    """Write a factor with the digits it deserves: 1.34, 2.8, 140."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.1f}" if value >= 1.995 else f"{value:.2f}"


def times(value: float) -> str:
    """Write a factor with its sign: 2.8×."""
    return f"{plain(value)}×"


def size(count: float) -> str:
    """Write a number of bytes with three digits: 412 kB, 2.18 MB, 13.0 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            value = count / factor
            return f"{value:.{max(0, 2 - int(math.log10(value)))}f} {unit}"
    return f"{count:.0f} bytes"


def duration(ms: float) -> str:
    """Write a time with three digits: 2.36 ms, 14.6 µs."""
    return f"{ms:.3g} ms" if ms >= 0.1 else f"{1000 * ms:.3g} µs"


def listed(names: list[str]) -> str:
    """Join names as a sentence does: a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def finite(figures: Any) -> Any:
    """Return figures as JSON can hold them: None for NaN and infinity, inside dicts and lists too."""
    if isinstance(figures, dict):
        return {name: finite(value) for name, value in figures.items()}
    if isinstance(figures, list | tuple):
        return [finite(value) for value in figures]
    return None if isinstance(figures, float) and not math.isfinite(figures) else figures


def counted(count: int, one: str, many: str = "") -> str:
    """Write a count with its noun: 1 image, 1,024 images, 2 queries."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"
