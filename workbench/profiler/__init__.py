"""How big, how right, how fast: `profile` measures a compressed model beside its baseline, on every runtime here."""

from workbench.profiler.comparison import ComparedRuntime, Comparison
from workbench.profiler.costs import LayerCost, layer_costs, peak_activation_bytes
from workbench.profiler.environment import Environment, environment
from workbench.profiler.memory import Energy, Memory
from workbench.profiler.profile import profile
from workbench.profiler.report import Difference, Measures, Profile, Run, accuracy_difference
from workbench.profiler.scenarios import (
    SCENARIOS,
    ScenarioResult,
    multi_stream,
    offline,
    repeated,
    scenarios,
    server,
    single_stream,
)
from workbench.profiler.software import SoftwareRow
from workbench.profiler.sweeps import BATCHES, SweepPoint, knee, sweep_batches
from workbench.profiler.timing import ClockJumped, Latency, Ratio, compare, latencies, latency, measure

__all__ = [
    "BATCHES",
    "SCENARIOS",
    "ClockJumped",
    "ComparedRuntime",
    "Comparison",
    "Difference",
    "Energy",
    "Environment",
    "Latency",
    "LayerCost",
    "Measures",
    "Memory",
    "Profile",
    "Ratio",
    "Run",
    "ScenarioResult",
    "SoftwareRow",
    "SweepPoint",
    "accuracy_difference",
    "compare",
    "environment",
    "knee",
    "latencies",
    "latency",
    "layer_costs",
    "measure",
    "multi_stream",
    "offline",
    "peak_activation_bytes",
    "profile",
    "repeated",
    "scenarios",
    "server",
    "single_stream",
    "sweep_batches",
]
