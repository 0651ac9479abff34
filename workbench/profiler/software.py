"""Software first: the same fp32 model made faster without compressing it, so that compression meets its best rival."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.profiler.timing import Latency, Ratio


@dataclass(frozen=True)
class SoftwareRow:
    """One way to run the same weights. `ratio`: times faster than plain eager, timed in turns with it.

    `difference` is the largest one between its outputs and plain eager's on the example, relative to the largest
    output. A way that cannot be gone here has no latency, ratio or difference, and `note` says why.
    """

    name: str
    what: str
    latency: Latency | None = None
    ratio: Ratio | None = None
    difference: float | None = None
    note: str = ""

    @property
    def ran(self) -> bool:
        return self.latency is not None
