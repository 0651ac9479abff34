"""What a layer cannot be quicker than on this machine: starting it, moving its bytes, doing its operations.

All three are measured: an empty layer's time on the runtime, and the roofs of the machine (`profiler.roofline`). So is
what a call of a model costs beside its layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from workbench.profiler.layers import LayerTime, layer_times
from workbench.profiler.roofline import Roofline, roofline
from workbench.runtimes import runtime as named_runtime

EMPTY = 32  # layers of each kind in the model that shows what starting one costs
PLAIN = "ReLU"  # stands for every kind that has no weights


@dataclass(frozen=True)
class Limits:
    """The roofs, and what starting takes on `runtime`.

    `launch_ms`: how long an empty layer takes, by the kind of layer; `call_ms`: what a call takes beside its layers.
    """

    roofline: Roofline
    launch_ms: dict[str, float]
    runtime: str
    threads: int
    call_ms: float = 0.0

    def of(self, layer: LayerTime, resting_bytes: int) -> dict[str, float]:
        """Return the milliseconds that each limit alone would take, by the kind of verdict.

        `resting_bytes`, the model's weights, decide which cache they lie in when the next call comes.
        """
        peaks = self.roofline.peaks
        peak = peaks.get(layer.precision, peaks["fp32"])
        weights = layer.weight_bytes / self._bandwidth(resting_bytes)
        activations = layer.activation_bytes / self._bandwidth(layer.activation_bytes)
        return {
            "launch-bound": self.start_ms(layer.kind),
            "memory-bound": (weights + activations) / 1e6,
            "compute-bound": 2 * layer.macs / peak / 1e6,
        }

    def start_ms(self, kind: str) -> float:
        """Return how long an empty layer of this kind takes, or the quickest where this kind was not tried."""
        return self.launch_ms.get(kind, self.launch_ms[PLAIN])

    def starts_ms(self, kinds: Iterable[str]) -> float:
        """Return how long a call takes that starts empty layers of these kinds."""
        return self.call_ms + sum(map(self.start_ms, kinds))

    def _bandwidth(self, nbytes: int) -> float:
        return self.roofline.bandwidths[self.roofline.level(nbytes)]


@lru_cache(maxsize=8)
def limits(runtime: str = "eager", threads: int = 1) -> Limits:
    """Measure what bounds layers on `runtime` here; quick from the second time on, the roofs from the first run on."""
    one = named_runtime(runtime)
    plain = one.for_baseline().name  # the empty layers are dense
    call_ms = _call_ms(plain, threads)
    return Limits(roofline(threads, one.device), _launch_ms(plain, threads, call_ms), runtime, threads, call_ms)


def _call_ms(runtime: str, threads: int) -> float:
    """Return what a call takes beside its layers: the time of a model of one small layer, without that layer's."""
    times = layer_times(nn.Sequential(nn.Linear(16, 16)).eval(), torch.zeros(1, 16), runtime, threads)
    return max(0.0, times.outside_ms)


def _launch_ms(runtime: str, threads: int, call_ms: float) -> dict[str, float]:
    """Return the time of a layer that computes next to nothing, by kind: its own, and its part of what lies outside.

    The second is what a clock of whole microseconds misses, and what the runtime does between two layers.
    """
    times = layer_times(_empty_layers(), torch.zeros(1, 4, 4, 4), runtime, threads)
    around = max(0.0, times.outside_ms - call_ms) / len(times.layers)
    by_kind: dict[str, list[float]] = {}
    for layer in times.layers:
        by_kind.setdefault(layer.kind if layer.weight_bytes else PLAIN, []).append(layer.ms)
    found = {kind: statistics.median(taken) + around for kind, taken in by_kind.items()}
    return {PLAIN: min(found.values())} | found


def _empty_layers() -> nn.Sequential:
    """Return a model of layers that compute next to nothing, with nonlinearities that no runtime fuses away."""
    block = lambda: (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    convolutions = [layer for _ in range(EMPTY) for layer in block()]
    linears = [layer for _ in range(EMPTY) for layer in (nn.Linear(16, 16), nn.ReLU())]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *linears).eval()
