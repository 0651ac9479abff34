"""Parametrizations that stack on a weight, and the one description that training, storage and speed share.

A mask or a quantizer is registered with `torch.nn.utils.parametrize` on a layer's weight. They stack in any order,
train through straight-through gradients, and `describe` reads them back as symbols and levels for the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.surgery import weighted_layers

MOST_LEVELS = 257  # of a codebook: 256, and zero
SMALLEST_SCALE = 2.0**-40  # what a learned scale cannot fall below
FLOATS = (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
NF4 = torch.tensor(  # quantiles of the normal distribution, as published in appendix E of QLoRA
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


class Mask(nn.Module):
    """Keep the weights where `mask` is true and hold the others at exactly zero.

    `mask`: boolean tensor of the weight's shape.
    """

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask.bool())

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight, torch.zeros_like(weight))


class FakeQuantize(nn.Module):
    """Round a weight to `bits`-bit integers and back: w -> (clamp(round(w / scale) + zero_point) - zero_point) * scale.

    `scale`, `zero_point`: shape () with `axis=None` (per tensor), (channels,) with `axis=0` (per output channel), or
    (channels, groups) with `axis=0` and `group_size`: each channel's numbers, flattened, in groups of that size; the
    last group may be smaller. A `scale` that is an nn.Parameter is learned with the gradient of LSQ (Esser et al.,
    2020, arXiv:1902.08153). Symmetric codes use -(2**(bits-1) - 1) … 2**(bits-1) - 1, so that zero point is 0 and both
    signs reach equally far; asymmetric ones use the full range. Gradients of the weight pass straight through inside
    the range (Bengio et al., 2013, arXiv:1308.3432). Source: Jacob et al., 2018, arXiv:1712.05877.
    """

    kind = "quantized"

    def __init__(
        self,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        axis: int | None,
        symmetric: bool = True,
        group_size: int | None = None,
    ):
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"A weight quantizer takes 2 to 8 bits, not {bits}.")
        _check_groups(scale, axis, group_size)
        if isinstance(scale, nn.Parameter):
            self.scale = scale
        else:
            self.register_buffer("scale", scale.detach().float())
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32))
        self.bits, self.axis, self.symmetric, self.group_size = bits, axis, symmetric, group_size
        self.quant_max = 2 ** (bits - 1) - 1
        self.quant_min = -self.quant_max if symmetric else -self.quant_max - 1

    @property
    def step(self) -> Tensor:
        """The distance between two levels: `scale`, held above zero while it is learned."""
        if isinstance(self.scale, nn.Parameter):
            return self.scale.clamp(min=SMALLEST_SCALE)
        return self.scale

    def forward(self, weight: Tensor) -> Tensor:
        if self.group_size is None:
            return self._round(weight)
        length = prod(weight.shape[1:])
        rows = split_groups(weight.reshape(-1, length), self.group_size)
        return join_groups(self._round(rows), length).reshape(weight.shape)

    def _round(self, rows: Tensor) -> Tensor:
        scale, zero = self.step, self.zero_point
        if self.axis is not None:
            scale, zero = scale.flatten(), zero.flatten()
        learned = scale.requires_grad and torch.is_grad_enabled()
        if not learned and self.axis is None:
            return torch.fake_quantize_per_tensor_affine(rows, scale, zero, self.quant_min, self.quant_max)
        if not learned:
            return torch.fake_quantize_per_channel_affine(rows, scale, zero, self.axis, self.quant_min, self.quant_max)
        return self._round_learning(rows, scale, zero)

    def _round_learning(self, rows: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Round as the fixed operators do, to the bit, and give the scale its gradient, weighted as LSQ does."""
        factor = (scale.numel() / max(rows.numel(), 1) / self.quant_max) ** 0.5
        ends = (self.quant_min, self.quant_max, factor)
        if self.axis is None:
            scale, zero = scale.reshape(1), zero.reshape(1).float()
            return torch._fake_quantize_learnable_per_tensor_affine(rows, scale, zero, *ends)
        return torch._fake_quantize_learnable_per_channel_affine(rows, scale, zero.float(), self.axis, *ends)

    def along_weight(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Reshape scale or zero point so that it broadcasts against a weight of `shape`."""
        if self.axis is None:
            return values
        if self.group_size is not None:
            spread = values.repeat_interleave(self.group_size, 1)[:, : prod(shape[1:])]
            return spread.reshape(shape)
        around = [1] * len(shape)
        around[self.axis] = -1
        return values.reshape(around)

    def symbols(self, weight: Tensor) -> Tensor:
        """Return the integer codes of `weight`, int32, same shape; computed as torch's operator computes them."""
        inverse = self.along_weight(1.0 / self.step.detach(), weight.shape)
        zero = self.along_weight(self.zero_point, weight.shape)
        codes = torch.round(weight * inverse).to(torch.int32) + zero
        return codes.clamp(self.quant_min, self.quant_max)

    def values(self, symbols: Tensor) -> Tensor:
        """Return the weights that the codes stand for, float32, same shape."""
        scale = self.along_weight(self.step.detach(), symbols.shape)
        zero = self.along_weight(self.zero_point, symbols.shape)
        return (symbols - zero).float() * scale


def _check_groups(scale: Tensor, axis: int | None, group_size: int | None) -> None:
    if group_size is None:
        return
    if group_size < 1 or axis != 0 or scale.dim() != 2:
        raise ValueError(
            f"Groups of {group_size} need axis=0 and scales of shape (channels, groups), not axis={axis} and "
            f"{tuple(scale.shape)}."
        )


def split_groups(rows: Tensor, group_size: int) -> Tensor:
    """Cut rows (channels, n) into (channels · groups, group_size); a last group that is too short ends in zeros."""
    missing = -rows.shape[1] % group_size
    if missing:
        rows = nn.functional.pad(rows, (0, missing))
    return rows.reshape(-1, group_size)


def join_groups(groups: Tensor, length: int) -> Tensor:
    """Put the groups of `split_groups` together again to rows (channels, length)."""
    padded = -(-length // groups.shape[1]) * groups.shape[1]
    return groups.reshape(-1, padded)[:, :length]


class Codebook(nn.Module):
    """Let every weight take one of a few levels: w -> levels[symbols], and 0 where the weight below is 0.

    `levels`: (K,), trained: each level gets the summed gradient of its weights, and one that is exactly 0 stays 0.
    `symbols`: whole numbers from 0 to K - 1 of the weight's shape. Source: Han et al., 2016, arXiv:1510.00149.
    """

    kind, whole = "clustered", ("levels",)

    def __init__(self, levels: Tensor, symbols: Tensor):
        super().__init__()
        if levels.dim() != 1 or not 1 <= len(levels) <= MOST_LEVELS:
            raise ValueError(f"A codebook has 1 to {MOST_LEVELS} levels, not {tuple(levels.shape)}.")
        if symbols.numel() and not 0 <= int(symbols.min()) <= int(symbols.max()) < len(levels):
            raise ValueError(f"The symbols of a codebook of {len(levels)} levels go from 0 to {len(levels) - 1}.")
        self.levels = levels if isinstance(levels, nn.Parameter) else nn.Parameter(levels.detach().clone().float())
        self.register_buffer("assigned", symbols.detach().to(torch.int32))

    @property
    def bits(self) -> int:
        """The bits of one symbol."""
        return max(1, (len(self.levels) - 1).bit_length())

    @property
    def zero_symbol(self) -> int:
        """The symbol of exact zero; one past the last if no level is zero."""
        zeros = (self.levels.detach() == 0).nonzero()
        return int(zeros[0]) if len(zeros) else len(self.levels)

    def forward(self, weight: Tensor) -> Tensor:
        levels = torch.where(self.levels == 0, torch.zeros_like(self.levels), self.levels)  # no gradient moves a zero
        chosen = levels.index_select(0, self.assigned.flatten()).view(weight.shape).to(weight.dtype)
        return torch.where(weight == 0, torch.zeros_like(chosen), chosen)

    def symbols(self, weight: Tensor) -> Tensor:
        """Return the symbol of each number of `weight`, int32, same shape; zeros have the symbol of zero."""
        zero = torch.full_like(self.assigned, self.zero_symbol)
        return torch.where(weight == 0, zero, self.assigned)

    def values(self, symbols: Tensor) -> Tensor:
        """Return the weights that the symbols stand for, float32, same shape."""
        levels = torch.cat([self.levels.detach(), self.levels.new_zeros(1)])
        return levels[symbols.long()]


class Cast(nn.Module):
    """Round a weight to a short floating-point type and back: w -> dtype(w / scale) · scale; too large ones saturate.

    `dtype`: one of FLOATS. `scale`: None, shape (), or (channels,) for the first dimension. Gradients pass straight
    through where nothing saturates. Source: Micikevicius et al., 2022, arXiv:2209.05433 (the two types of 8 bits).
    """

    kind = "cast"

    def __init__(self, dtype: torch.dtype, scale: Tensor | None = None):
        super().__init__()
        if dtype not in FLOATS:
            raise ValueError(f"A weight can be cast to {', '.join(map(str, FLOATS))}, not to {dtype}.")
        self.dtype, self.bits, self.axis = dtype, 8 * dtype.itemsize, 0
        self.register_buffer("scale", None if scale is None else scale.detach().float())

    def along_weight(self, dims: int) -> Tensor | float:
        """Return the scale so that it broadcasts against a weight of `dims` dimensions."""
        if self.scale is None:
            return 1.0
        return self.scale.reshape(-1, *[1] * (dims - 1)) if self.scale.dim() else self.scale

    def _coded(self, weight: Tensor) -> Tensor:
        most = torch.finfo(self.dtype).max
        return (weight.float() / self.along_weight(weight.dim())).clamp(-most, most).to(self.dtype)

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            coded = self._coded(weight)
            rounded = (coded.float() * self.along_weight(weight.dim())).to(weight.dtype)
            inside = coded.float().abs() < torch.finfo(self.dtype).max
        return _StraightThrough.apply(weight, rounded, inside)

    def symbols(self, weight: Tensor) -> Tensor:
        """Return the bits of each number in the short type, int32, same shape; negative zero is zero."""
        coded = self._coded(weight).contiguous()
        bits = coded.view(torch.uint8 if self.bits == 8 else torch.int16).to(torch.int32) & (2**self.bits - 1)
        return torch.where(weight == 0, torch.zeros_like(bits), bits)

    def values(self, symbols: Tensor) -> Tensor:
        """Return the weights that the bits stand for, float32, same shape."""
        short = symbols.to(torch.uint8 if self.bits == 8 else torch.int16).contiguous()
        return short.view(self.dtype).float() * self.along_weight(symbols.dim())


class NormalFloat(nn.Module):
    """Round a weight to 16 levels that suit a normal distribution, times the largest magnitude of each group.

    `absmax`: one number for every `group_size` numbers of the flattened weight; the last group may be smaller.
    Gradients pass straight through. Source: Dettmers et al., 2023 (QLoRA), arXiv:2305.14314.
    """

    kind, bits = "normal-float", 4

    def __init__(self, absmax: Tensor, group_size: int = 64):
        super().__init__()
        if group_size < 1:
            raise ValueError(f"A group has at least one weight, not {group_size}.")
        self.register_buffer("absmax", absmax.detach().float().flatten())
        self.group_size = group_size

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            rounded = self.values(self.symbols(weight)).to(weight.dtype)
        return _StraightThrough.apply(weight, rounded, torch.ones_like(rounded, dtype=torch.bool))

    def symbols(self, weight: Tensor) -> Tensor:
        """Return the number of the nearest level, 0 to 15, int32, same shape."""
        groups = split_groups(weight.detach().float().reshape(1, -1), self.group_size)
        inverse = torch.where(self.absmax > 0, 1.0 / self.absmax, torch.zeros_like(self.absmax))
        middles = ((NF4[1:] + NF4[:-1]) / 2).to(weight.device)
        codes = torch.bucketize(groups * inverse[:, None], middles).to(torch.int32)
        return join_groups(codes, weight.numel()).reshape(weight.shape)

    def values(self, symbols: Tensor) -> Tensor:
        """Return the weights that the numbers of the levels stand for, float32, same shape."""
        groups = NF4.to(symbols.device)[split_groups(symbols.reshape(1, -1), self.group_size).long()]
        return join_groups(groups * self.absmax[:, None], symbols.numel()).reshape(symbols.shape)


class _StraightThrough(torch.autograd.Function):
    """Give `rounded` forwards, and backwards pass the gradient to `weight` where `inside` is true."""

    @staticmethod
    def forward(ctx, weight: Tensor, rounded: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return rounded

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (inside,) = ctx.saved_tensors
        return torch.where(inside, gradient, torch.zeros_like(gradient)), None, None


CODERS = (FakeQuantize, Codebook, Cast, NormalFloat)


class InputQuantizer(nn.Module):
    """Round a layer's input to unsigned 8-bit integers and back, with one scale and zero point for the whole tensor."""

    bits = 8
    quant_min, quant_max = 0, 255

    def __init__(self, scale: Tensor, zero_point: Tensor):
        super().__init__()
        self.register_buffer("scale", scale.detach().float().reshape(()))
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32).reshape(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.quant_min, self.quant_max)


def _quantize_input(layer: nn.Module, args: tuple, named: dict) -> tuple[tuple, dict]:
    if args:
        return (layer.input_quantizer(args[0]), *args[1:]), named
    name, x = next(iter(named.items()))
    return args, {**named, name: layer.input_quantizer(x)}


def attach_input_quantizer(layer: nn.Module, quantizer: InputQuantizer) -> None:
    """Quantize the input of `layer` from now on; replaces a quantizer that is already there."""
    if not hasattr(layer, "input_quantizer"):
        layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    layer.input_quantizer = quantizer


def parametrize_weight(layer: nn.Module, parametrization: nn.Module, name: str = "weight") -> None:
    """Stack `parametrization` on the layer's weight, or on another parameter of it, such as "bias"."""
    parametrize.register_parametrization(layer, name, parametrization)


def weight_parametrizations(layer: nn.Module, name: str = "weight") -> list[nn.Module]:
    """Return the parametrizations stacked on the layer's weight (or another parameter), innermost first."""
    if not parametrize.is_parametrized(layer, name):
        return []
    return list(layer.parametrizations[name])


def stored_tensor(layer: nn.Module, name: str = "weight") -> Tensor | None:
    """Return what lies below everything stacked on the layer's weight (or another parameter); None if it has none.

    It also tells whether two layers share a weight. Of the two tensors that `weight_norm` keeps it is the first.
    """
    if not parametrize.is_parametrized(layer, name):
        return getattr(layer, name, None)
    stack = layer.parametrizations[name]
    return stack.original if hasattr(stack, "original") else stack.original0


def rounded_bits(layer: nn.Module) -> int:
    """Return how many bits the layer's weight is rounded to, 32 where it is not."""
    return min((one.bits for one in weight_parametrizations(layer) if isinstance(one, FakeQuantize)), default=32)


def finite_weight(name: str, weight: Tensor) -> Tensor:
    """Return the weight of layer `name`, or raise ValueError if it holds NaN or infinity."""
    if not torch.isfinite(weight).all():
        raise ValueError(f"The weight of layer {name!r} holds NaN or infinity; train or load the model again first.")
    return weight


def bake_weights(model: nn.Module, keep_quantizers: bool = False) -> nn.Module:
    """Make all weights plain tensors, in place: masks and rounding are applied once, and the parametrizations go.

    `keep_quantizers` leaves the layers that are only masked and rounded to integers, for which a runtime has kernels.
    Not `parametrize.remove_parametrizations`: deep copies share their class, and it would take the weight of the
    model that they were copied from too.
    """
    for layer in model.modules():
        if "parametrizations" in layer._modules and not (keep_quantizers and _is_quantized(layer)):
            _bake_layer(layer)
    return model


def _is_quantized(layer: nn.Module) -> bool:
    stacks = [list(stack) for stack in layer.parametrizations.values()]
    known = all(isinstance(p, (Mask, FakeQuantize)) for stack in stacks for p in stack)
    return known and any(isinstance(p, FakeQuantize) for stack in stacks for p in stack) and not _is_padded(layer)


def _is_padded(layer: nn.Module) -> bool:
    """Return whether groups do not fill the rows of a weight: from a file, OpenVINO (2026.4) computes that wrongly."""
    for stack in layer.parametrizations.values():
        row = prod(stack.original.shape[1:])
        if any(row % (getattr(p, "group_size", None) or 1) for p in stack):
            return True
    return False


def _bake_layer(layer: nn.Module) -> None:
    with torch.no_grad():
        baked = {name: getattr(layer, name).detach().clone() for name in layer.parametrizations}
    buffers = {name for name, stack in layer.parametrizations.items() if "original" in stack._buffers}
    layer.__class__ = type(layer).__bases__[0]
    del layer._modules["parametrizations"]
    for name, value in baked.items():
        if name in buffers:
            layer.register_buffer(name, value)
        else:
            layer.register_parameter(name, nn.Parameter(value))


@dataclass(frozen=True)
class WeightCode:
    """What a weight is made of: symbols and what they stand for.

    kind "dense": `values`. kind "masked": `mask` bool and `values` (zero outside the mask). Kinds "quantized",
    "clustered", "cast" and "normal-float": `symbols` int32 of the weight's shape and the `coder`, one of CODERS, whose
    `values(symbols)` are exactly the weight; `mask` too when one lies on the same weight, since a masked weight is
    the symbol of zero.
    """

    kind: str
    values: Tensor
    mask: Tensor | None = None
    symbols: Tensor | None = None
    coder: FakeQuantize | Codebook | Cast | NormalFloat | None = None


def describe(layer: nn.Module, name: str = "weight") -> WeightCode:
    """Describe the layer's weight (or another parameter) as it is used in `forward`, whatever is stacked on it.

    Of several coders that say it exactly, the one with the fewest bits, and the outermost of equals; none if a weight
    is NaN, or if something on top moves it off the levels.
    """
    with torch.no_grad():
        weight = getattr(layer, name).detach()
        stack = weight_parametrizations(layer, name)
        masks = [p.mask for p in stack if isinstance(p, Mask)]
        mask = torch.stack(masks).all(0) if masks else None
        coders = [p for p in reversed(stack) if isinstance(p, CODERS)]
        for coder in sorted(coders, key=lambda p: p.bits):
            symbols = coder.symbols(weight)
            if torch.equal(coder.values(symbols).to(weight.dtype), weight):
                return WeightCode(coder.kind, weight, mask, symbols, coder)
    return WeightCode("dense" if mask is None else "masked", weight, mask)


def sparsity(model: nn.Module) -> float:
    """Return the fraction of exact zeros among the weights of linear and convolution layers."""
    weights = [layer.weight.detach() for _, layer in weighted_layers(model)]
    total = sum(w.numel() for w in weights)
    return sum(int((w == 0).sum()) for w in weights) / max(total, 1)
