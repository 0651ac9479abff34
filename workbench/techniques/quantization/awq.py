"""AWQ: protect the weights that meet large activations, by scaling them up before they are rounded.

Idea: a weight matters as much as the input it is multiplied with. Multiplying the weights of a busy input channel by a
factor makes their rounding error smaller beside them; dividing the layer before (or its BatchNorm) by the same factor
keeps the outputs. The factors are the channels' activation magnitudes to a power from 0 to 1; the power of the
least output error wins.

Settings: `weight_bits`. `granularity` "channel" or "group", with `group_size` weights to a scale.

When it helps: 3 and 4 bits for layers whose input channels differ much in size, as in transformers; in groups most of
all. No code is learned, so little can overfit to the calibration images.

When it does not: where input channels are of a size, or a layer has no layer directly before it that can be divided
(after a residual sum, say): those are rounded to nearest. On the glyph network, whose input channels are alike after
BatchNorm, it gains next to nothing, and GPTQ and AdaRound lose less. Activations stay in fp32: add
Quantization(weight_bits=32) behind it. No kernel here computes with fewer than 8 bits, so the file shrinks and the
time does not.

Source: Lin et al., 2024, arXiv:2306.00978.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from workbench.surgery import clone, remembered, weighted_layers
from workbench.techniques.quantization.layerwise import (
    LayerwiseRounding,
    Moments,
    damped,
    layer_moments,
)
from workbench.techniques.quantization.post_training import weight_quantizer
from workbench.techniques.quantization.structure import (
    Pair,
    channels_of,
    scale_inputs,
    scale_outputs,
    scale_pairs,
)
from workbench.weights import FakeQuantize, finite_weight, parametrize_weight

POWERS = torch.linspace(0, 1, 11)
DIRECTIONS = 128  # of the inputs that the search tells apart, those of most energy
EXACT = 1536  # inputs up to which these are computed exactly: beyond, that takes many seconds


class Energy(NamedTuple):
    """The second moment (n, n) of a layer's inputs, as `directions`·`directions`ᵀ and a diagonal `rest` for the others.

    `directions`: (n, k), float32, the k of most energy, exact where n is at most EXACT. `rest`: (n,), float32. The
    whole moment of a large layer is too slow to try dozens of factors on.
    """

    directions: Tensor
    rest: Tensor

    @classmethod
    def of(cls, moment: Tensor) -> Energy:
        """Find the main directions of `moment`, float64."""
        lifted = damped(moment, 1e-4).float()
        if len(lifted) <= EXACT:
            values, vectors = torch.linalg.eigh(lifted)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                vectors, values, _ = torch.svd_lowrank(lifted, DIRECTIONS)
            values, vectors = values.flip(0), vectors.flip(1)
        directions = vectors[:, -DIRECTIONS:] * values[-DIRECTIONS:].clamp_min(0).sqrt()
        return cls(directions, (lifted.diagonal() - directions.square().sum(1)).clamp_min(0))

    def error(self, change: Tensor) -> float:
        """Return the squared error of the outputs when the weight is off by `change` (m, n)."""
        return float((change @ self.directions).square().sum() + (change.square() @ self.rest).sum())


def awq_factors(weight: Tensor, magnitudes: Tensor, energy: Energy, bits: int, grid: dict) -> Tensor:
    """Return the factors (n,) by which the columns of `weight` (m, n) are to be multiplied before rounding to `bits`.

    `magnitudes` (n,): size of each input. `energy`: of the inputs. `grid`: the granularity and group size of
    `weight_quantizer`. Factors are all 1 where none lowers the output error. Source: Lin et al., 2024,
    arXiv:2306.00978, equations 4 and 5.
    """
    error = lambda factors, calibration: energy.error(_nearest(weight, factors, bits, grid, calibration) - weight)
    best = min((_balanced(magnitudes, power) for power in POWERS.tolist()), key=lambda each: error(each, "min-max"))
    ones = torch.ones_like(best)
    return best if error(best, "mse") < error(ones, "mse") else ones


def _balanced(magnitudes: Tensor, power: float) -> Tensor:
    factors = magnitudes.clamp_min(1e-4 * magnitudes.max().clamp_min(1e-12)).pow(power)
    return factors / (factors.max() * factors.min()).sqrt()


def _nearest(weight: Tensor, factors: Tensor, bits: int, grid: dict, calibration: str) -> Tensor:
    scaled = weight * factors
    return weight_quantizer(scaled, bits, calibration=calibration, **grid)(scaled) / factors


@dataclass(frozen=True)
class AWQ(LayerwiseRounding):
    """Scale weights by the size of the activations that they meet, then round to nearest."""

    family: ClassVar[str] = "quantization"
    source: ClassVar[str] = "Lin et al., 2024, arXiv:2306.00978"

    def compress(self, model, data=None, watch=None):
        """Return a copy with rounded weights; its BatchNorm layers, or layers before, take up the factors.

        `data` is a `Data` (128 of its training images are used) or a batch of images (N, C, H, W). Raises ValueError
        without it, or where a weight is not finite, and TracingError where the model cannot be followed.
        """
        small = clone(model)
        if self.is_neutral:
            return small
        pairs = remembered(model, "scale pairs", lambda: scale_pairs(model))
        found = self._searched(model, pairs, layer_moments(model, data, "AWQ"))
        quantizers = {name: clone(self._quantizer(model, name, found)) for name, _ in weighted_layers(small)}
        for pair in pairs:
            factors = found[pair.reader][0] if pair.reader in found else None
            if factors is not None:
                _move(small, pair, factors, quantizers)
        for name, quantizer in quantizers.items():
            parametrize_weight(small.get_submodule(name), quantizer)
        return small

    def _quantizer(self, model: nn.Module, name: str, found: dict) -> FakeQuantize:
        return found[name][1] if name in found else self.quantizer(model, name)

    def _searched(self, model: nn.Module, pairs: list[Pair], moments: Moments) -> dict:
        """Return (factors, quantizer) of each reader of a pair for these settings; all numbers of bits at once."""
        grid = {"granularity": self.granularity, "group_size": self.group_size}
        compute = lambda: {bits: _search(model, pairs, moments, bits, grid) for bits in range(2, 9)}
        return moments.derive(("awq", self.granularity, self.group_size), compute)[self.weight_bits]


def _search(model: nn.Module, pairs: list[Pair], moments: Moments, bits: int, grid: dict) -> dict:
    found = {}
    for pair in pairs:
        if pair.reader not in moments:
            continue
        layer, moment = model.get_submodule(pair.reader), moments[pair.reader]
        weight = finite_weight(pair.reader, layer.weight.detach()).float()
        channels = channels_of(model.get_submodule(pair.source))
        sizes = moment.diagonal().reshape(channels, -1).mean(1).sqrt().float()
        spread = sizes.repeat_interleave(len(moment) // channels)
        energy = moments.derive(("energy", pair.reader), partial(Energy.of, moment))
        factors = awq_factors(weight.flatten(1), spread, energy, bits, grid)
        scaled = (weight.flatten(1) * factors).reshape(weight.shape)
        quantizer = weight_quantizer(scaled, bits, calibration="mse", **grid)
        found[pair.reader] = (factors.reshape(channels, -1)[:, 0], quantizer)
    return found


def _move(small: nn.Module, pair: Pair, factors: Tensor, quantizers: dict[str, FakeQuantize]) -> None:
    """Multiply the reader's inputs by `factors` (channels,) and divide the source's outputs, and its scales, by
    them."""
    scale_inputs(small.get_submodule(pair.reader), factors)
    scale_outputs(small.get_submodule(pair.source), 1 / factors)
    if pair.source in quantizers:
        scale = quantizers[pair.source].scale
        scale.div_(factors.reshape(-1, *[1] * (scale.dim() - 1)))
