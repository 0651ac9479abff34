"""Choose the range that a quantizer covers: by extremes, by percentile, or by least squared error.

All functions work on rows: (rows, n) values give (rows,) ranges, so that a channel or a whole tensor is one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.surgery import weighted_layers

METHODS = ("min-max", "percentile", "mse")
PERCENTILE = 99.9
FRACTIONS = torch.linspace(1.0, 0.3, 36)
SAMPLE = 65_536


def scale_and_zero(low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale (float32) and zero point (int32) so that the integers cover `low` to `high`, and zero exactly."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) / quant_max
        zero = torch.zeros_like(scale)
    else:
        scale = (high - low) / (quant_max - quant_min)
        zero = quant_min - torch.round(low / scale)
    empty = ~(scale > torch.finfo(torch.float32).tiny)
    scale = torch.where(empty, torch.ones_like(scale), scale)
    zero = torch.where(empty, torch.zeros_like(zero), zero).clamp(quant_min, quant_max)
    return scale.float(), zero.to(torch.int32)


def rounded(values: Tensor, scale: Tensor, zero: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Return `values` (rows, n) rounded to the integers' levels, scale and zero point (rows,)."""
    scale, zero = scale[:, None], zero[:, None]
    return (torch.round(values / scale + zero).clamp(quant_min, quant_max) - zero) * scale


def value_range(values: Tensor, method: str, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the (low, high) range of each row of `values` (rows, n) that `method` chooses; both (rows,)."""
    low, high = values.amin(1), values.amax(1)
    if method == "percentile":
        cut = min(values.shape[1] - 1, int(values.shape[1] * (1 - PERCENTILE / 100)))
        ordered = values.sort(1).values
        return ordered[:, cut], ordered[:, -1 - cut]
    if method == "mse":
        return _least_error(values, low, high, quant_min, quant_max, symmetric)
    return low, high


def _least_error(values, low, high, quant_min, quant_max, symmetric):
    """Shrink each row's range by the fraction that gives its least mean squared rounding error."""
    best_error = torch.full_like(low, torch.inf)
    best = torch.ones_like(low)
    for fraction in FRACTIONS.tolist():
        scale, zero = scale_and_zero(low * fraction, high * fraction, quant_min, quant_max, symmetric)
        error = (rounded(values, scale, zero, quant_min, quant_max) - values).square().mean(1)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, fraction, best)
    return low * best, high * best


@dataclass(frozen=True)
class InputSample:
    """What one layer saw during calibration: its smallest and largest input, and a sample of all values, (n,)."""

    low: Tensor
    high: Tensor
    values: Tensor


def input_samples(model: nn.Module, images: Tensor) -> dict[str, InputSample]:
    """Run `images` (N, C, H, W) through the model and return what the input of each weighted layer looked like."""
    seen: dict[str, InputSample] = {}

    def watch(name):
        def hook(layer, args):
            flat = args[0].detach().float().flatten()
            stride = max(1, flat.numel() // SAMPLE)
            seen[name] = InputSample(flat.min(), flat.max(), flat[::stride].clone())

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in weighted_layers(model)]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def input_range(sample: InputSample, method: str, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Return the (low, high) range of a layer's input that `method` chooses; shape ()."""
    if method == "min-max":
        return sample.low, sample.high
    low, high = value_range(sample.values[None], method, quant_min, quant_max, symmetric=False)
    return low[0], high[0]
