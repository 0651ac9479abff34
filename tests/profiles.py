"""Profiles made up for tests of figures and pages: every shape that the profiler's results can take."""

from dataclasses import replace

import numpy as np
import torch

from workbench.profiler import (
    Latency,
    LayerCost,
    Measures,
    Memory,
    Profile,
    Ratio,
    Run,
    ScenarioResult,
    SoftwareRow,
    SweepPoint,
    environment,
)
from workbench.profiler.layers import LayerTime, LayerTimes
from workbench.profiler.maps import WinLoseMap
from workbench.profiler.roofline import Roofline, RooflinePoint
from workbench.profiler.verdicts import Verdict
from workbench.reports import Report


def latency(median=1.0, batch=1, threads=1, runtime="eager", precision="fp32"):
    samples = median * (1 + 0.04 * np.sin(np.arange(120)))
    return Latency(tuple(tuple(part) for part in samples.reshape(20, 6)), runtime, precision, batch, threads, 1)


def layer_times(scale=1.0, split=False, runtime="eager"):
    shapes = [
        ("features.conv1", "Conv2d", 0.21),
        ("features.conv2", "Conv2d", 0.9),
        ("features.bn", "BatchNorm2d", 0.1),
    ]
    shapes += [("fc", "Linear", 0.3), ("pool", "MaxPool2d", 0.05)]
    if split:
        shapes[1:2] = [("features.conv2.0", "Conv2d", 0.3), ("features.conv2.1", "Conv2d", 0.2)]
    whole = 1.1 * scale * sum(ms for _, _, ms in shapes)
    rows = [
        LayerTime(name, kind, scale * ms, scale * ms / whole, int(1e7 * ms), int(4e5 * ms), int(2e5), "fp32", "")
        for name, kind, ms in shapes
    ]
    return LayerTimes(tuple(rows), whole, whole / 11, runtime, "fp32", 1, 1, noisy=False)


def roofline():
    bandwidths = {"L1": 310.0, "L2": 120.0, "L3": 31.0, "memory": 14.0}
    return Roofline({"fp32": 118.0, "bf16": 1100.0, "int8": 2100.0}, bandwidths, 1, "a test", {"fp32 512": 118.0})


def roofline_points(gain=1.0, split=False):
    second = ["conv2.0", "conv2.1"] if split else ["conv2"]
    names = [("conv1", 9.0, 40.0), *((name, 35.0, 90.0) for name in second), ("fc", 0.5, 6.0)]
    return [RooflinePoint(name, x / gain, y * gain**0.5, "fp32") for name, x, y in names]


def scenarios():
    return {
        "single stream": scenario("single stream", 3000, 0.2),
        "multi stream": scenario("multi stream", 500, 1.1, batch=8),
        "server": scenario("server", 2400, 0.6, offered_per_second=2400.0, bound_ms=4.0),
        "offline": scenario("offline", 90, 7.9, batch=64),
    }


def scenario(name, queries, ms, batch=1, **more):
    latencies = ms * (1 + np.random.default_rng(0).exponential(0.3, queries))
    return ScenarioResult(name, "openvino", "int8", batch, 1, latencies, 1.0, queries * batch, **more)


def sweep_points():
    return [SweepPoint(b, t, latency((0.15 + 0.1 * b) / t**0.7, b, t)) for t in (1, 2) for b in (1, 2, 4, 8, 16, 32)]


def software():
    return [
        SoftwareRow("eager", "torch as it is", latency(2.7), Ratio(1.0, (1.0, 1.0)), 0.0),
        SoftwareRow("channels last", "memory layout", latency(2.2), Ratio(1.22, (1.2, 1.25)), 1e-7),
        SoftwareRow("bf16", "half the bits", latency(1.1), Ratio(2.4, (2.3, 2.5)), 4e-3),
        SoftwareRow(
            "torch.compile", "kernels made for this model", note="no C++ compiler on this machine; install g++"
        ),
        SoftwareRow("OpenVINO", "Intel's inference engine", latency(1.5), Ratio(1.8, (1.7, 1.9)), 1e-6),
        SoftwareRow("2 threads", "eager on two threads", latency(2.65), Ratio(1.02, (0.97, 1.06)), 0.0),
    ]


def memories():
    stages = {"before": 310_000_000, "prepared": 330_000_000, "peak while running": 345_000_000}
    return {
        "baseline": Memory("eager", 1, 2_180_000, 1_200_000, stages),
        "now": Memory("eager", 1, 410_000, 800_000, stages),
    }


def win_lose_map():
    ratio = np.array([[0.4, 0.8, 1.01, np.nan], [0.9, 1.6, 3.2, 6.1], [1.0, 2.2, 7.5, 14.0]])
    return WinLoseMap(
        "CSR against dense", "batch", (1, 8, 64, 256), "zeros", ("70 %", "90 %", "95 %"), ratio, 0.95 * ratio,
        1.05 * ratio, "A linear layer of 1024×1024 whose smallest weights are zero, as CSR and dense, both in torch.",
    )  # fmt: skip


def verdicts():
    return [
        Verdict(None, "launch-bound", "Starting 12 layers takes 61 % of 0.3 ms.", "Try a larger batch."),
        Verdict("fc", "memory-bound", "It reads 4 MB for 1 M multiply-adds.", "Store its weights in fewer bits."),
    ]


def report(baseline=True, **changes):
    """A whole report, as `investigate` would return it."""
    single, large = latency(0.4, runtime="openvino"), latency(9.0, 64, runtime="openvino")
    rivals = (
        {"baseline": latency(0.8, runtime="openvino"), "baseline_throughput": latency(20.0, 64)} if baseline else {}
    )
    runs = (Run("openvino", "cpu", "", (), 0.0, single, large, **rivals),)
    layers = (LayerCost("fc", "Linear", 1010, 1000, 900, 1000, (1, 10)),)
    small = Measures(410_000, 600_000, 150_000, 9_000_000, 0.1, 800_000, layers, torch.arange(100) > 8)
    full = Measures(2_180_000, 2_200_000, 540_000, 39_000_000, 0.0, 1_200_000, layers, torch.arange(100) > 7)
    profile = Profile(small, full if baseline else None, runs, {}, "val", environment())
    found = Report("small", "glyphs-cnn" if baseline else "", profile, "openvino", "2030-01-01 12:00 UTC")
    rest = {
        "layers": layer_times(0.6, split=True),
        "baseline_layers": layer_times() if baseline else None,
        "roofline": roofline(),
        "verdicts": tuple(verdicts()),
        "scenarios": scenarios(),
        "sweep": tuple(sweep_points()),
        "software": tuple(software()),
        "memory": memories(),
        "energy": "not available on this machine",
        "maps": (win_lose_map(),),
    }
    return replace(found, **{**rest, **changes})
