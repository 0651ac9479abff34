"""Latency and throughput as different things: MLPerf-like scenarios, and sweeps over batch sizes and threads.

The scenarios follow Reddi et al. (2020), "MLPerf Inference Benchmark", arXiv:1911.02549; multi stream follows the rules
of its later rounds, a query of several images as soon as the last one is answered. They are like MLPerf's, not MLPerf's
own: runs are short, and accuracy is not part of them.

    single stream   one image, and the next as soon as it is answered        a phone's camera: latency
    multi stream    one image of each of several streams in every query      a car's cameras: latency
    server          queries arrive at random times and wait in one queue     a service: latency under load, p99
    offline         all images are there at once, in large batches           an archive: images a second
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from workbench.profiler.timing import Latency

SCENARIOS = ("single stream", "multi stream", "server", "offline")


@dataclass(frozen=True, eq=False)
class ScenarioResult:
    """What one scenario measured so far. `latencies_ms`, float (queries,): from a query's arrival to its answer.

    `seconds` is the time the run took on its own clock, which stands still while the caller draws; `images` were
    answered in it. Only a server has `offered_per_second`, queries that arrive a second on average, `bound_ms`, which
    99 % of its queries must keep, and `waiting`: queries not yet answered at the end, which count with their wait so far.
    """

    scenario: str
    runtime: str
    precision: str
    batch: int
    threads: int
    latencies_ms: np.ndarray = field(repr=False)
    seconds: float
    images: int
    offered_per_second: float | None = None
    bound_ms: float | None = None
    waiting: int = 0

    @property
    def queries(self) -> int:
        return len(self.latencies_ms)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else float("nan")

    @property
    def p50_ms(self) -> float:
        return self._percentile(50, fewest=1, otherwise=float("nan"))

    @property
    def p90_ms(self) -> float | None:
        """The 90th percentile, or None below 100 queries, which are too few to know it."""
        return self._percentile(90, fewest=100)

    @property
    def p99_ms(self) -> float | None:
        """The 99th percentile, or None below 1,000 queries, which are too few to know it."""
        return self._percentile(99, fewest=1000)

    @property
    def kept(self) -> bool | None:
        """Whether 99 % of the queries were answered within the bound; None without a bound or a p99."""
        return None if self.bound_ms is None or self.p99_ms is None else self.p99_ms <= self.bound_ms

    def _percentile(self, percent: float, fewest: int, otherwise: float | None = None) -> float | None:
        return float(np.percentile(self.latencies_ms, percent)) if self.queries >= fewest else otherwise


@dataclass(frozen=True)
class SweepPoint:
    """The latency of one batch size on one number of threads."""

    batch: int
    threads: int
    latency: Latency

    @property
    def images_per_second(self) -> float:
        return self.latency.images_per_second
