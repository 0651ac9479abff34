"""A latency before it is measured: a model of each layer's time, fitted to a few layers measured on this machine."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass
class LatencyModel:
    """Predicts a model's latency on one runtime from the shapes of its layers; see `fit`.

    `errors` are the relative errors of the predictions that were followed by a measurement; see `track`.
    """

    runtime: str
    threads: int
    batch: int
    errors: list[float] = field(default_factory=list)

    def track(self, predicted_ms: float, measured_ms: float) -> float:
        """Note a prediction beside its measurement and return its relative error, 0.1 for ten percent off."""
        self.errors.append(abs(predicted_ms - measured_ms) / measured_ms)
        return self.errors[-1]

    @property
    def median_error(self) -> float | None:
        """The median relative error of the predictions tracked so far, or None before the first."""
        return statistics.median(self.errors) if self.errors else None
