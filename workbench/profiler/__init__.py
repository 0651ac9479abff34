"""How big, how right, how fast: `profile` measures a compressed model beside its baseline, on every runtime here."""

from workbench.profiler.comparison import ComparedRuntime, Comparison, compare_profiles, load_profile, save_profile
from workbench.profiler.costs import LayerCost, layer_costs, peak_activation_bytes
from workbench.profiler.environment import Environment, environment
from workbench.profiler.layers import LayerTime, LayerTimes, layer_times
from workbench.profiler.limits import Limits, limits
from workbench.profiler.memory import Energy, Memory, energy, memory
from workbench.profiler.profile import profile
from workbench.profiler.report import Difference, Measures, Profile, Run, accuracy_difference
from workbench.profiler.roofline import Roofline, RooflinePoint, measure_roofline, points, roofline
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
from workbench.profiler.software import SoftwareRow, best, software_first
from workbench.profiler.sweeps import BATCHES, SweepPoint, knee, sweep_batches
from workbench.profiler.timing import ClockJumped, Latency, Ratio, compare, latencies, latency, measure
from workbench.profiler.verdicts import KINDS, Taken, Verdict, verdicts, whole_verdict

__all__ = [
    "BATCHES",
    "KINDS",
    "SCENARIOS",
    "ClockJumped",
    "ComparedRuntime",
    "Comparison",
    "Difference",
    "Energy",
    "Environment",
    "Latency",
    "LayerCost",
    "LayerTime",
    "LayerTimes",
    "Limits",
    "Measures",
    "Memory",
    "Profile",
    "Ratio",
    "Roofline",
    "RooflinePoint",
    "Run",
    "ScenarioResult",
    "SoftwareRow",
    "SweepPoint",
    "Taken",
    "Verdict",
    "accuracy_difference",
    "best",
    "compare",
    "compare_profiles",
    "energy",
    "environment",
    "knee",
    "latencies",
    "latency",
    "layer_costs",
    "layer_times",
    "limits",
    "load_profile",
    "measure",
    "measure_roofline",
    "memory",
    "multi_stream",
    "offline",
    "peak_activation_bytes",
    "points",
    "profile",
    "repeated",
    "roofline",
    "save_profile",
    "scenarios",
    "server",
    "single_stream",
    "software_first",
    "sweep_batches",
    "verdicts",
    "whole_verdict",
]
