"""Choose the range that a quantizer covers: by extremes, percentile, least squared error, or least divergence.

All functions work on rows: (rows, n) values give (rows,) ranges, so that a channel or a whole tensor is one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.techniques.moments import watch_inputs

METHODS = ("min-max", "percentile", "mse", "kl")
OUTERMOST = 1000  # of so many values the percentile leaves out one at each end
FRACTIONS = torch.linspace(1.0, 0.3, 36)
SAMPLE = 65_536  # of a layer's inputs, drawn at random: any fixed step would see the same few places of each image
BINS = 2048  # of the histogram that divergence is measured on, and how many of them a candidate grows by
BIN_STEP = 8
LEAST_COUNT = 1e-4  # of a bin that only holds what was cut off, where the divergence would be infinite


def scale_and_zero(low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale (float32) and zero point (int32) so that the integers cover `low` to `high`, and zero exactly."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) / quant_max
        zero = torch.zeros_like(scale)
    else:
        scale = high / (quant_max - quant_min) - low / (quant_max - quant_min)  # the difference may be too large
        zero = quant_min - torch.round(low / scale)
    empty = ~(scale > torch.finfo(torch.float32).tiny)
    scale = torch.where(empty, torch.ones_like(scale), scale)
    zero = torch.where(empty, torch.zeros_like(zero), zero).clamp(quant_min, quant_max)
    return scale.float(), zero.to(torch.int32)


def rounding_errors(
    values: Tensor, scale: Tensor, zero: Tensor, quant_min: int, quant_max: int, room: Tensor | None = None
) -> Tensor:
    """Return the mean squared error (rows,) of rounding `values` (rows, n) to levels of `scale` and `zero` (rows,).

    `room`: a tensor like `values` to work in, which spares a search of many ranges most of its time.
    """
    scale, zero = scale[:, None], zero[:, None]
    room = torch.div(values, scale, out=room)
    room.add_(zero).round_().clamp_(quant_min, quant_max).sub_(zero).mul_(scale).sub_(values)
    return room.square_().mean(1)


def value_range(values: Tensor, method: str, quant_min: int, quant_max: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the (low, high) range of each row of `values` (rows, n) that `method` chooses; both (rows,).

    "kl" means "mse" here: it compares histograms, and the weights of a channel are too few to fill one.
    """
    low, high = values.amin(1), values.amax(1)
    if method == "percentile":
        cut = values.shape[1] // OUTERMOST
        ordered = values.sort(1).values
        return ordered[:, cut], ordered[:, -1 - cut]
    if method in ("mse", "kl"):
        return _least_error(values, low, high, quant_min, quant_max, symmetric)
    return low, high


def _least_error(values, low, high, quant_min, quant_max, symmetric):
    """Shrink each row's range by the fraction that gives its least mean squared rounding error."""
    best_error = torch.full_like(low, torch.inf)
    best = torch.ones_like(low)
    room = torch.empty_like(values)
    for fraction in FRACTIONS.tolist():
        scale, zero = scale_and_zero(low * fraction, high * fraction, quant_min, quant_max, symmetric)
        error = rounding_errors(values, scale, zero, quant_min, quant_max, room)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, fraction, best)
    return low * best, high * best


def entropy_threshold(magnitudes: Tensor, levels: int) -> float:
    """Return where to cut `magnitudes` (n,), none negative, so that `levels` levels keep most of their information.

    For each cut, the histogram below it (with what lies above added to its last bin) is compared with itself after it
    was merged into `levels` bins; the cut of the least Kullback-Leibler divergence wins. Exact zeros do not count,
    since every range holds them. Source: Migacz, 2017, "8-bit inference with TensorRT", GTC.
    """
    found = magnitudes[magnitudes > 0].float()
    top = float(found.max()) if found.numel() else 0.0
    if not top > torch.finfo(torch.float32).tiny:
        return top
    counts = torch.histc(found, BINS, 0, top).double()
    stops = range(BINS, levels - 1, -BIN_STEP)
    divergences = torch.stack([_divergence(counts, stop, levels) for stop in stops])
    return top * stops[int(divergences.argmin())] / BINS


def _divergence(counts: Tensor, stop: int, levels: int) -> Tensor:
    """Return the divergence of the first `stop` bins from themselves, merged into `levels` bins and spread again."""
    kept = counts[:stop]
    clipped = kept.clone()
    clipped[-1] += counts[stop:].sum()
    filled = (clipped > 0).double()
    merged = torch.arange(stop) * levels // stop
    totals = torch.bincount(merged, kept, minlength=levels) / torch.bincount(merged, filled, minlength=levels)
    spread = torch.where(filled > 0, totals[merged].clamp(min=LEAST_COUNT), torch.zeros_like(kept))
    p, q = clipped / clipped.sum(), spread / spread.sum()
    return torch.where(p > 0, p * (p / q).log(), torch.zeros_like(p)).sum()


@dataclass(frozen=True)
class InputSample:
    """What one layer saw during calibration: its smallest and largest input, and a sample of all values, (n,)."""

    low: Tensor
    high: Tensor
    values: Tensor

    @classmethod
    def of(cls, x: Tensor) -> InputSample:
        """Look at one input of any shape."""
        flat = x.float().flatten()
        if len(flat) <= SAMPLE:
            return cls(flat.min(), flat.max(), flat.clone())
        drawn = torch.randint(len(flat), (SAMPLE,), generator=torch.Generator().manual_seed(0))
        return cls(flat.min(), flat.max(), flat[drawn.to(flat.device)])

    def __add__(self, other: InputSample) -> InputSample:
        values = torch.cat([self.values, other.values])
        return InputSample(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high), values)


def input_samples(model: nn.Module, images: Tensor) -> dict[str, InputSample]:
    """Run `images` (N, C, H, W) through the model and return what the input of each weighted layer looked like.

    A layer that is called several times has seen all of these inputs. Raises ValueError where one is not finite.
    """
    seen: dict[str, InputSample] = {}

    def note(name, _layer, x):
        found = InputSample.of(x)
        seen[name] = seen[name] + found if name in seen else found

    watch_inputs(model, [images], note)
    return seen


def input_range(sample: InputSample, method: str, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Return the (low, high) range of a layer's input that `method` chooses; shape ()."""
    if method == "min-max":
        return sample.low, sample.high
    if method == "kl":
        return _entropy_range(sample, quant_max - quant_min + 1)
    low, high = value_range(sample.values[None], method, quant_min, quant_max, symmetric=False)
    return low[0], high[0]


def _entropy_range(sample: InputSample, levels: int) -> tuple[Tensor, Tensor]:
    """Cut a layer's inputs by divergence; where they have both signs, each side has half of the levels."""
    cut = entropy_threshold(sample.values.abs(), levels if sample.low >= 0 else levels // 2)
    return sample.low.clamp(min=-cut), sample.high.clamp(max=cut)
