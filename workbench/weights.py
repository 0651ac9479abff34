"""Parametrizations that stack on a weight, and the one description that training, storage and speed share.

A mask or a quantizer is registered with `torch.nn.utils.parametrize` on a layer's weight. They stack in any order,
train through straight-through gradients, and `describe` reads them back as symbols and levels for the file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.surgery import weighted_layers


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

    `scale`, `zero_point`: shape () with `axis=None` (per tensor), or (channels,) with `axis=0` (per output channel).
    Symmetric codes use -(2**(bits-1) - 1) … 2**(bits-1) - 1, so that zero point is 0 and both signs reach equally
    far; asymmetric ones use the full range. Gradients pass straight through inside the range (Bengio et al., 2013,
    arXiv:1308.3432). Source: Jacob et al., 2018, arXiv:1712.05877.
    """

    def __init__(self, scale: Tensor, zero_point: Tensor, bits: int, axis: int | None, symmetric: bool = True):
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"A weight quantizer takes 2 to 8 bits, not {bits}.")
        self.register_buffer("scale", scale.detach().float())
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32))
        self.bits, self.axis, self.symmetric = bits, axis, symmetric
        self.quant_max = 2 ** (bits - 1) - 1
        self.quant_min = -self.quant_max if symmetric else -self.quant_max - 1

    def forward(self, weight: Tensor) -> Tensor:
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(
                weight, self.scale, self.zero_point, self.quant_min, self.quant_max
            )
        return torch.fake_quantize_per_channel_affine(
            weight, self.scale, self.zero_point, self.axis, self.quant_min, self.quant_max
        )

    def along_weight(self, values: Tensor, dims: int) -> Tensor:
        """Reshape scale or zero point so that it broadcasts against a weight of `dims` dimensions."""
        if self.axis is None:
            return values
        shape = [1] * dims
        shape[self.axis] = -1
        return values.reshape(shape)

    def symbols(self, weight: Tensor) -> Tensor:
        """Return the integer codes of `weight`, int32, same shape; computed as torch's operator computes them."""
        inverse = self.along_weight(1.0 / self.scale, weight.dim())
        zero = self.along_weight(self.zero_point, weight.dim())
        codes = torch.round(weight * inverse).to(torch.int32) + zero
        return codes.clamp(self.quant_min, self.quant_max)

    def values(self, symbols: Tensor) -> Tensor:
        """Return the weights that the codes stand for, float32, same shape."""
        scale = self.along_weight(self.scale, symbols.dim())
        zero = self.along_weight(self.zero_point, symbols.dim())
        return (symbols - zero).float() * scale


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


def _quantize_input(layer: nn.Module, args: tuple) -> tuple:
    return (layer.input_quantizer(args[0]), *args[1:])


def attach_input_quantizer(layer: nn.Module, quantizer: InputQuantizer) -> None:
    """Quantize the input of `layer` from now on; replaces a quantizer that is already there."""
    if not hasattr(layer, "input_quantizer"):
        layer.register_forward_pre_hook(_quantize_input)
    layer.input_quantizer = quantizer


def parametrize_weight(layer: nn.Module, parametrization: nn.Module) -> None:
    """Stack `parametrization` on the layer's weight."""
    parametrize.register_parametrization(layer, "weight", parametrization)


def weight_parametrizations(layer: nn.Module) -> list[nn.Module]:
    """Return the parametrizations stacked on the layer's weight, innermost first."""
    if not parametrize.is_parametrized(layer, "weight"):
        return []
    return list(layer.parametrizations.weight)


def finite_weight(name: str, weight: Tensor) -> Tensor:
    """Return the weight of layer `name`, or raise ValueError if it holds NaN or infinity."""
    if not torch.isfinite(weight).all():
        raise ValueError(f"The weight of layer {name!r} holds NaN or infinity; train or load the model again first.")
    return weight


def bake_weights(model: nn.Module) -> nn.Module:
    """Make all weights plain tensors, in place: masks and rounding are applied once, and the parametrizations go.

    Not `parametrize.remove_parametrizations`: deep copies share their class, and it would take the weight of the
    model that they were copied from too.
    """
    for layer in model.modules():
        if "parametrizations" in layer._modules:
            _bake_layer(layer)
    return model


def _bake_layer(layer: nn.Module) -> None:
    with torch.no_grad():
        baked = {name: getattr(layer, name).detach().clone() for name in layer.parametrizations}
    layer.__class__ = type(layer).__bases__[0]
    del layer._modules["parametrizations"]
    for name, value in baked.items():
        layer.register_parameter(name, nn.Parameter(value))


@dataclass(frozen=True)
class WeightCode:
    """What a weight is made of: symbols and what they stand for.

    kind "dense": `values` float32. kind "masked": `mask` bool and `values` (zero outside the mask).
    kind "quantized": `symbols` int32 of the weight's shape and the `quantizer` that turns them into values;
    `mask` too when one lies on the same weight, since a masked weight is the symbol of zero.
    """

    kind: str
    values: Tensor
    mask: Tensor | None = None
    symbols: Tensor | None = None
    quantizer: FakeQuantize | None = None


def describe(layer: nn.Module) -> WeightCode:
    """Describe the layer's weight as it is used in `forward`, whatever is stacked on it."""
    with torch.no_grad():
        weight = layer.weight.detach()
    stack = weight_parametrizations(layer)
    masks = [p.mask for p in stack if isinstance(p, Mask)]
    mask = torch.stack(masks).all(0) if masks else None
    quantizer = next((p for p in reversed(stack) if isinstance(p, FakeQuantize)), None)
    if quantizer is not None:
        return WeightCode("quantized", weight, mask, quantizer.symbols(weight), quantizer)
    return WeightCode("dense" if mask is None else "masked", weight, mask)


def sparsity(model: nn.Module) -> float:
    """Return the fraction of exact zeros among the weights of linear and convolution layers."""
    weights = [layer.weight.detach() for _, layer in weighted_layers(model)]
    total = sum(w.numel() for w in weights)
    return sum(int((w == 0).sum()) for w in weights) / max(total, 1)
