"""A latency before it is measured: a model of each layer's time, fitted to a few layers measured on this machine.

Each kind of layer has its own line: a fixed cost, and costs for each multiply-add, each byte of weights and each byte
moved, none below zero (after the operator-level predictors of nn-Meter; Zhang et al., 2021,
doi:10.1145/3458864.3467882).
What lies outside layers has one too. Where measured layers of similar size were off that line, the next is corrected.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, nn

from workbench.profiler.layers import LayerTimes, layer_times_of
from workbench.runtimes import bake
from workbench.runtimes.layers import Part, parts_of
from workbench.surgery import remembered, weighted_layers
from workbench.weights import rounded_bits

BLOCK = 16  # channels that kernels compute at once; a part of a block takes as long as a whole one
SHORTEST_MS = 0.002  # times below are not told apart by all clocks, and get no more weight than this one
DOUBT = 0.3  # of a measured layer just as large: how far a correction holds back
OUTSIDE = "outside"
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class LatencyModel:
    """Predicts a model's latency on one runtime from the shapes of its layers; see `fit`.

    `errors` are the relative errors of the predictions that were followed by a measurement; see `track`.
    """

    runtime: str
    threads: int
    batch: int
    errors: list[float] = field(default_factory=list)
    _seen: dict[str, list[tuple[np.ndarray, float]]] = field(default_factory=lambda: defaultdict(list), repr=False)
    _costs: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @classmethod
    def fit(
        cls, models: Sequence[nn.Module], example: Tensor, runtime: str = "eager", threads: int = 1, calls: int = 60
    ) -> LatencyModel:
        """Measure the layers of a few models in turns, say at both ends of a slider and between, and fit to them.

        `example` is float (B, C, H, W). Raises RuntimeFailed if the runtime cannot run one or shows no layers.
        """
        fitted = cls(runtime, threads, len(example))
        for model, times in zip(models, layer_times_of(models, example, runtime, threads, calls), strict=True):
            fitted.learn(model, example, times)
        return fitted

    def learn(self, model: nn.Module, example: Tensor, times: LayerTimes) -> None:
        """Fit to one more model, whose `times` were measured."""
        measured, left = {layer.name: layer.ms for layer in times.layers}, times.total_ms
        shapes = _shapes(model, example)
        for name, (group, features) in shapes.items():
            if name in measured:
                self._seen[group].append((features, measured[name]))
                left -= measured[name]
        self._seen[OUTSIDE].append((_outside(shapes), max(left, SHORTEST_MS)))
        self._costs = {group: _fitted(rows) for group, rows in self._seen.items()}

    def predict_ms(self, model: nn.Module, example: Tensor) -> float:
        """Return the milliseconds that one call with a batch like `example` is expected to take; runs it on one image.

        Layers of a kind that was never measured count as nothing but their part of what lies outside.
        """
        shapes = _shapes(model, example)
        inside = sum(self._layer_ms(*one) for one in shapes.values() if one[0] in self._costs)
        return inside + float(_outside(shapes) @ self._costs[OUTSIDE])

    def _layer_ms(self, group: str, features: np.ndarray) -> float:
        """Return the line's value, corrected by how far the line was off at measured layers of similar size."""
        rows = np.array([row for row, _ in self._seen[group]])
        taken = np.maximum([ms for _, ms in self._seen[group]], SHORTEST_MS)
        off = np.log(taken / np.maximum(rows @ self._costs[group], SHORTEST_MS))
        near = np.exp(-0.5 * ((_sizes(rows) - _sizes(features)) ** 2).sum(-1))
        correction = float(near @ off / (near.sum() + DOUBT))
        return float(features @ self._costs[group]) * math.exp(correction)

    def track(self, predicted_ms: float, measured_ms: float) -> float:
        """Note a prediction beside its measurement and return its relative error, 0.1 for ten percent off."""
        self.errors.append(abs(predicted_ms - measured_ms) / measured_ms)
        return self.errors[-1]

    @property
    def median_error(self) -> float | None:
        """The median relative error of the predictions tracked so far, or None before the first."""
        return statistics.median(self.errors) if self.errors else None


def _shapes(model: nn.Module, example: Tensor) -> dict[str, tuple[str, np.ndarray]]:
    """Return (group, features) of each layer that is called; layers of one group are alike but for their size."""
    return remembered(model, ("layer shapes", tuple(example.shape)), lambda: _counted_shapes(model, example))


def _counted_shapes(model: nn.Module, example: Tensor) -> dict[str, tuple[str, np.ndarray]]:
    integer = {
        name for name, layer in weighted_layers(model) if rounded_bits(layer) <= 8 and hasattr(layer, "input_quantizer")
    }
    plain = bake(model)
    layers, shapes = dict(plain.named_modules()), {}
    for part in parts_of(plain, example[:1]):
        layer = layers[part.name]
        shapes[part.name] = (_group(part, layer, part.name in integer), _features(part, layer, len(example)))
    return shapes


def _group(part: Part, layer: nn.Module, integer: bool) -> str:
    pointwise = " of one pixel" if isinstance(layer, CONVOLUTIONS) and layer.weight[0, 0].numel() == 1 else ""
    grouped = " in groups" if getattr(layer, "groups", 1) > 1 else ""
    return f"{part.kind}{pointwise}{grouped}{' in int8' if integer else ''}"


def _features(part: Part, layer: nn.Module, batch: int) -> np.ndarray:
    """Return 1, millions of multiply-adds, the same in whole blocks of channels, MB of weights, MB moved."""
    macs = part.macs * batch / 1e6
    return np.array([1, macs, macs * _filling(layer), part.weight_bytes / 1e6, part.activation_bytes * batch / 1e6])


def _filling(layer: nn.Module) -> float:
    """Return how many times more channels whole blocks have than the layer: 1 where its widths are multiples."""
    if not isinstance(getattr(layer, "weight", None), Tensor) or layer.weight.dim() < 2:
        return 1.0
    outputs, inputs = layer.weight.shape[:2]
    return -(-outputs // BLOCK) * BLOCK / outputs * -(-inputs // BLOCK) * BLOCK / inputs


def _sizes(features: np.ndarray) -> np.ndarray:
    """Return features on a scale where layers that differ by a factor of two are one apart."""
    return np.log2(np.maximum(features[..., 1:], 1e-6))


def _outside(shapes: dict[str, tuple[str, np.ndarray]]) -> np.ndarray:
    """Return 1, the number of layers, and the MB moved by all of them."""
    return np.array([1, len(shapes), sum(features[-1] for _, features in shapes.values())])


def _fitted(rows: list[tuple[np.ndarray, float]]) -> np.ndarray:
    """Return the costs, none negative, with the least squared relative errors: the best of all subsets of features.

    Relative squares favour too low a line, so it is lifted to where half of the measured times lie above it.
    """
    features = np.array([row for row, _ in rows])
    taken = np.maximum([ms for _, ms in rows], SHORTEST_MS)
    scaled, best, least = features / taken[:, None], np.zeros(features.shape[1]), float(len(rows))
    for count in range(1, min(features.shape) + 1):
        for chosen in map(list, itertools.combinations(range(features.shape[1]), count)):
            costs = np.linalg.lstsq(scaled[:, chosen], np.ones(len(rows)), rcond=None)[0]
            error = float(((scaled[:, chosen] @ costs - 1) ** 2).sum())
            if (costs >= 0).all() and error < least:
                best, least = np.zeros(features.shape[1]), error
                best[chosen] = costs
    return best / max(float(np.median(scaled @ best)), 1e-9)
