"""Profiles as files, and two of them side by side: another machine, another day, another model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ComparedRuntime:
    """One runtime in two profiles. A side without it has None; `versus` says how the second compares with the first."""

    runtime: str
    precisions: tuple[str | None, str | None]
    medians_ms: tuple[float | None, float | None]
    quartiles_ms: tuple[tuple[float, float] | None, tuple[float, float] | None]
    images_per_second: tuple[float | None, float | None]
    ratio: float | None  # times faster in the second profile; below 1 is slower
    distinguishable: bool
    versus: str


@dataclass(frozen=True)
class Comparison:
    """Two profiles side by side: their runtimes, what differs between the machines, and what to know before reading."""

    names: tuple[str, str]
    rows: tuple[ComparedRuntime, ...]
    differences: tuple[tuple[str, str, str], ...]  # (what, in the first, in the second)
    notes: tuple[str, ...]
