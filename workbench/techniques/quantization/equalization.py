"""Cross-layer equalization: move factors between layers until their channels use the range of a quantizer alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.techniques.quantization.structure import (
    NORMS,
    channels_of,
    input_magnitudes,
    scale_inputs,
    scale_outputs,
    scale_pairs,
)

SWEEPS = 20
CLOSE = 1e-3


def equalizing_factors(first: Tensor, second: Tensor) -> Tensor:
    """Return s (channels,) so that first / s and second · s have equal ranges; channels without weights get 1.

    `first`, `second`: largest magnitudes of a channel's weights in the layer that makes it and in the one that reads
    it. Source: Nagel et al., 2019, arXiv:1906.04721, equation 11.
    """
    factors = torch.sqrt(first / second)
    return torch.where((first > 0) & (second > 0), factors, torch.ones_like(factors))


def equalize_layers(model: nn.Module) -> nn.Module:
    """Equalize all pairs of linear and convolution layers of `model`, in place; its outputs stay the same.

    Fold BatchNorm first: a layer that is followed by one has no pair. Raises TracingError where the model cannot be
    followed.
    """
    layers = [(model.get_submodule(pair.source), model.get_submodule(pair.reader)) for pair in scale_pairs(model)]
    layers = [(first, second) for first, second in layers if not isinstance(first, NORMS)]
    for _ in range(SWEEPS):
        moved = [_equalize(first, second) for first, second in layers]
        if max(moved, default=0.0) < CLOSE:
            break
    return model


def _equalize(first: nn.Module, second: nn.Module) -> float:
    """Equalize one pair and return how far its factors were from 1."""
    made = first.weight.detach().abs().flatten(1).amax(1)
    factors = equalizing_factors(made, input_magnitudes(second, channels_of(first)))
    scale_outputs(first, 1 / factors)
    scale_inputs(second, factors)
    return float((factors - 1).abs().max())
