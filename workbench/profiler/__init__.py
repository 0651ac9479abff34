"""How big, how right, how fast: `profile` measures a compressed model beside its baseline, on every runtime here."""

from workbench.profiler.costs import LayerCost, layer_costs, peak_activation_bytes
from workbench.profiler.environment import Environment, environment
from workbench.profiler.layers import LayerTime, LayerTimes, layer_times, layer_times_of
from workbench.profiler.limits import Limits, limits
from workbench.profiler.maps import WinLoseMap, integer_map, low_rank_map, sparse_map, width_map
from workbench.profiler.predict import LatencyModel
from workbench.profiler.profile import profile
from workbench.profiler.report import Difference, Measures, Profile, Run, accuracy_difference
from workbench.profiler.roofline import Roofline, RooflinePoint, measure_roofline, points, roofline
from workbench.profiler.timing import Latency, Ratio, compare, latencies, latency, measure
from workbench.profiler.verdicts import KINDS, Taken, Verdict, verdicts, whole_verdict

__all__ = [
    "KINDS",
    "Difference",
    "Environment",
    "Latency",
    "LatencyModel",
    "LayerCost",
    "LayerTime",
    "LayerTimes",
    "Limits",
    "Measures",
    "Profile",
    "Ratio",
    "Roofline",
    "RooflinePoint",
    "Run",
    "Taken",
    "Verdict",
    "WinLoseMap",
    "accuracy_difference",
    "compare",
    "environment",
    "integer_map",
    "latencies",
    "latency",
    "layer_costs",
    "layer_times",
    "layer_times_of",
    "limits",
    "low_rank_map",
    "measure",
    "measure_roofline",
    "peak_activation_bytes",
    "points",
    "profile",
    "roofline",
    "sparse_map",
    "verdicts",
    "whole_verdict",
    "width_map",
]
