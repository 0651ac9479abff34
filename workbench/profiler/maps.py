"""Where compression wins time and where it loses: maps of measured ratios over two quantities."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class WinLoseMap:
    """Times faster than the uncompressed operation, measured in turns; below 1 is slower, NaN is not yet measured.

    `ratio`, `low` and `high` (its 95 % interval) are float (len(y), len(x)). `what` says in one sentence what was
    measured against what.
    """

    title: str
    x_name: str
    x: tuple
    y_name: str
    y: tuple
    ratio: np.ndarray
    low: np.ndarray
    high: np.ndarray
    what: str

    def to_dict(self) -> dict:
        """Return the figures as JSON can hold them; None where nothing was measured yet."""
        tables = {name: _plain(getattr(self, name)) for name in ("ratio", "low", "high")}
        names = ("title", "x_name", "y_name", "what")
        return {name: getattr(self, name) for name in names} | {"x": list(self.x), "y": list(self.y)} | tables


def _plain(table: np.ndarray) -> list[list[float | None]]:
    return [[float(value) if np.isfinite(value) else None for value in row] for row in table]
