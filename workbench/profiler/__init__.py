"""How big, how right, how fast: `profile` measures a compressed model beside its baseline, on every runtime here."""

from workbench.profiler.comparison import ComparedRuntime, Comparison, compare_profiles, load_profile, save_profile
from workbench.profiler.costs import LayerCost, layer_costs, peak_activation_bytes
from workbench.profiler.environment import Environment, environment
from workbench.profiler.layers import LayerTime, LayerTimes, layer_times, layer_times_of, measure_layers
from workbench.profiler.limits import Limits, limits
from workbench.profiler.maps import WinLoseMap, integer_map, low_rank_map, sparse_map, width_map
from workbench.profiler.memory import Energy, Memory, energy, memory
from workbench.profiler.predict import LatencyModel
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
    "LatencyModel",
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
    "WinLoseMap",
    "accuracy_difference",
    "best",
    "compare",
    "compare_profiles",
    "energy",
    "environment",
    "integer_map",
    "knee",
    "latencies",
    "latency",
    "layer_costs",
    "layer_times",
    "layer_times_of",
    "limits",
    "load_profile",
    "low_rank_map",
    "measure",
    "measure_layers",
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
    "sparse_map",
    "sweep_batches",
    "verdicts",
    "whole_verdict",
    "width_map",
]
