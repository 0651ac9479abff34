"""The roofs of this machine, measured: how many operations and how many bytes a second it really reaches.

Williams, Waterman and Patterson, 2009, doi:10.1145/1498765.1498785: a layer that does few operations for each byte it
moves is bound by bandwidth, one that does many by the processor's peak.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Roofline:
    """Highest rates seen on this machine; a multiply-add counts as two operations.

    `peaks`: 10⁹ operations a second by precision, "fp32", "bf16", "int8" (those that ran). `bandwidths`: 10⁹ bytes a
    second by the level that holds the data, "L1", "L2", "L3", "memory" (those that are known). `tried`: each
    measurement that the maxima were taken from, in words, with its rate.
    """

    peaks: dict[str, float]
    bandwidths: dict[str, float]
    threads: int
    machine: str
    tried: dict[str, float]

    def attainable(self, intensity: float, precision: str = "fp32", level: str = "memory") -> float:
        """Return the 10⁹ operations a second under both roofs at `intensity` operations a byte."""
        return min(self.peaks[precision], intensity * self.bandwidths[level])

    def to_dict(self) -> dict:
        """Return the figures as JSON can hold them."""
        return asdict(self)


@dataclass(frozen=True)
class RooflinePoint:
    """A layer under the roofs: operations for each byte of weights and activations, and 10⁹ operations a second."""

    name: str
    intensity: float
    gflops: float
    precision: str
