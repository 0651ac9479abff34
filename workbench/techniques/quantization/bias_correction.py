"""Bias correction: rounding shifts the mean of a layer's outputs; its bias takes the shift out again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.techniques.moments import watch_inputs


def mean_inputs(model: nn.Module, images: Tensor) -> dict[str, list[Tensor]]:
    """Return the mean input of each weighted layer over `images` (N, C, H, W): one (1, …) tensor a call."""
    seen: dict[str, list[Tensor]] = {}
    watch_inputs(model, [images], lambda name, _, x: seen.setdefault(name, []).append(x.mean(0, keepdim=True)))
    return seen


def mean_shift(layer: nn.Module, error: Tensor, means: list[Tensor]) -> Tensor:
    """Return how far `error`, added to the layer's weight, moves the mean of each output channel, (channels,).

    A layer is linear in its input, so the mean output is the output of the mean input.
    Source: Nagel et al., 2019, arXiv:1906.04721, section 4.2.
    """
    if isinstance(layer, nn.Linear):
        return torch.stack([F.linear(x, error).reshape(-1, len(error)).mean(0) for x in means]).mean(0)
    outputs = [layer._conv_forward(x, error, None) for x in means]
    return torch.stack([out.flatten(2).mean((0, 2)) for out in outputs]).mean(0)


def correct_bias(layer: nn.Module, weight: Tensor, means: list[Tensor]) -> None:
    """Take the shift that rounding `weight` brought out of the layer's bias, in place; it gets one if it has none.

    A bias that is coded already stays as it is.
    """
    if parametrize.is_parametrized(layer, "bias"):
        return
    with torch.no_grad():
        shift = mean_shift(layer, layer.weight - weight, means)
        if layer.bias is None:
            layer.bias = nn.Parameter(-shift)
        else:
            layer.bias.sub_(shift)
