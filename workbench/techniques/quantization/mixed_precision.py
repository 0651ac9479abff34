"""Mixed precision: give each layer as many bits as it needs, within a budget for all.

Idea: some layers hardly notice 2 bits, others need 6. Each layer is rounded alone to 2, 3, … 8 bits, and it is
measured what that does to the network's outputs on calibration images. Of all ways to spend the budget, the one with
the least sum of these errors is taken.

Settings: `average_bits`, the budget: bits of a weight on average, so 4 is half of the size at 8 bits. `sensitivity`
"outputs" measures the error of the network's outputs, "loss" the rise of the loss, which needs labels.
`activation_bits` 8 also rounds the input of each layer; 32 leaves it in fp32.

When it helps: between 2 and 5 bits on average, where layers differ: small first and last layers keep their bits at
almost no bytes.

When it does not: at 8 bits all layers are fine anyway. Layers are measured one at a time, so errors that only come
together are not seen. On the processor every layer up to 8 bits runs on the same int8 kernel: the file shrinks, and the
time stays that of 8 bits.

Source: Dong et al., 2019 (HAWQ), arXiv:1905.03696, whose Hessian is replaced by measured errors as in Cai et al., 2020
(ZeroQ), arXiv:2001.00281.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.surgery import clone, identity, remembered
from workbench.technique import Technique, setting
from workbench.techniques.quantization.post_training import Quantization
from workbench.techniques.quantization.structure import tied_layers
from workbench.techniques.repair import training_images
from workbench.weights import parametrize_weight

BITS = tuple(range(2, 9))
IMAGES = 128
UNITS = 10_000  # that a budget is counted in


def allocate_bits(errors: Sequence[Sequence[float]], sizes: Sequence[int], average_bits: float) -> list[int]:
    """Return the bits of each layer, 2 to 8, that cost at most `average_bits` a weight and have the least summed error.

    `errors` (layers, 7): error with 2, 3, … 8 bits. `sizes` (layers,): weights of each. Dynamic programming over the
    budget: a greedy choice by error per bit can leave a large layer one step short. Never worse than the same bits for
    all. Raises ValueError for a budget below 2 bits.
    """
    if average_bits < BITS[0]:
        raise ValueError(f"The budget is {average_bits} bits a weight; {BITS[0]} is the least there is.")
    budget = (average_bits - BITS[0]) * sum(sizes)
    unit = max(budget / UNITS, 1.0)
    costs = [[math.ceil(level * size / unit - 1e-9) for level in range(len(BITS))] for size in sizes]
    chosen = _cheapest(errors, costs, int(budget / unit + 1e-9))
    even = [min(int(average_bits), BITS[-1]) - BITS[0]] * len(sizes)
    total = lambda levels: sum(row[level] for row, level in zip(errors, levels, strict=True))
    return [BITS[level] for level in (chosen if total(chosen) <= total(even) else even)]


def _cheapest(errors: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Return one level for each layer so that the costs sum to at most `budget` and the errors to the least."""
    least, picks = np.zeros(budget + 1), []  # least error of the layers so far, for every budget up to the whole
    for row, cost in zip(errors, costs, strict=True):
        options = np.full((len(row), budget + 1), np.inf)
        for level, (error, spent) in enumerate(zip(row, cost, strict=True)):
            options[level, spent:] = least[: max(budget + 1 - spent, 0)] + error
        picks.append(options.argmin(0))
        least = options.min(0)
    levels = []
    for pick, cost in zip(reversed(picks), reversed(costs), strict=True):
        levels.append(int(pick[budget]))
        budget -= cost[levels[-1]]
    return levels[::-1]


def output_error(outputs: Tensor, exact: Tensor) -> float:
    """Return the mean squared error of `outputs`, as a part of the mean square of `exact`."""
    return float((outputs - exact).square().mean() / exact.square().mean().clamp_min(1e-30))


@dataclass(frozen=True)
class MixedPrecision(Technique):
    """Choose the bits of each layer by how much the network's outputs suffer, within a budget."""

    family: ClassVar[str] = "quantization"
    source: ClassVar[str] = "Dong et al., 2019, arXiv:1905.03696; Cai et al., 2020, arXiv:2001.00281"

    average_bits: float = setting(4.0, low=2.0, high=8.0, step=0.25, unit="bits on average", neutral=32.0)
    activation_bits: int = setting(
        8, choices=(8, 32), unit="bits", neutral=32, help="8 rounds each layer's input too; 32 leaves it in fp32."
    )
    sensitivity: str = setting(
        "outputs", choices=("outputs", "loss"), help="Measure the error of the outputs, or the rise of the loss."
    )

    def compress(self, model, data=None, watch=None):
        """Return a copy with rounded weights and inputs.

        `data` is a `Data` (128 of its training images are used) or a batch of images (N, C, H, W). Raises ValueError
        without it, for a batch without labels where the loss is to be measured, or where a weight is not finite.
        """
        small = Quantization(weight_bits=32, activation_bits=self.activation_bits).compress(model, data)
        if self.average_bits <= BITS[-1]:
            for names, bits in self.bits(model, data):
                for name in names:
                    parametrize_weight(small.get_submodule(name), _quantization(bits).layer_quantizer(model, name))
        return small

    def bits(self, model: nn.Module, data: Any) -> list[tuple[list[str], int]]:
        """Return the bits that each layer gets, those that share a weight together."""
        groups = tied_layers(model)
        if not groups:
            raise ValueError(f"MixedPrecision found no linear or convolution layer in {type(model).__name__}.")
        sizes = [model.get_submodule(names[0]).weight.numel() for names in groups]
        compute = lambda: (self._sensitivities(model, groups, data), data)  # holding the data keeps its id its own
        errors, _ = remembered(model, ("sensitivities", self.sensitivity, identity(data)), compute)
        return list(zip(groups, allocate_bits(errors, sizes, self.average_bits), strict=True))

    def _sensitivities(self, model: nn.Module, groups: list[list[str]], data: Any) -> list[list[float]]:
        """Return the error of the network with each group of layers alone rounded to each number of bits."""
        images, labels = _images(data)
        images = images.to(next(model.parameters()))
        measure = _measure(clone(model), images, labels, self.sensitivity)
        return [[measure(_rounded(model, names, bits)) for bits in BITS] for names in groups]


def _quantization(bits: int) -> Quantization:
    return Quantization(weight_bits=bits, activation_bits=32)


def _rounded(model: nn.Module, names: list[str], bits: int) -> nn.Module:
    small = clone(model)
    for name in names:
        parametrize_weight(small.get_submodule(name), _quantization(bits).layer_quantizer(model, name))
    return small


def _measure(model: nn.Module, images: Tensor, labels: Tensor | None, sensitivity: str):
    """Return the function that says how far a model is from `model`: by its outputs, or by its loss."""
    if sensitivity == "loss" and labels is None:
        raise ValueError("MixedPrecision needs labels to measure the loss: pass data, or set sensitivity='outputs'.")
    with torch.no_grad():
        exact = model(images).float()
    if not exact.isfinite().all():
        raise ValueError("MixedPrecision: the model answers NaN or infinity; look for such values in the images.")

    def distance(small: nn.Module) -> float:
        with torch.no_grad():
            outputs = small(images).float()
        if sensitivity == "outputs":
            return output_error(outputs, exact)
        return float(F.cross_entropy(outputs, labels) - F.cross_entropy(exact, labels))

    return distance


def _images(data: Any) -> tuple[Tensor, Tensor | None]:
    """Return calibration images, and their labels where they are known."""
    if isinstance(data, Tensor):
        return data, None
    if data is None:
        raise ValueError("MixedPrecision measures errors on images: pass data from load_data, or a batch of images.")
    return training_images(data).take(IMAGES, seed=0).batch(slice(None))
