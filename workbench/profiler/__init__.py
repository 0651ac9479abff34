"""How big, how right, how fast: `profile` measures a compressed model beside its baseline, on every runtime here."""

from workbench.profiler.costs import LayerCost, layer_costs, peak_activation_bytes
from workbench.profiler.environment import Environment, environment
from workbench.profiler.timing import Latency, Ratio, compare, latencies, latency, measure

__all__ = [
    "Environment",
    "Latency",
    "LayerCost",
    "Ratio",
    "compare",
    "environment",
    "latencies",
    "latency",
    "layer_costs",
    "measure",
    "peak_activation_bytes",
]
