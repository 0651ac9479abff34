"""Entropy-aware training: the bits that the file will take are part of the loss.

Idea: an entropy coder spends few bits on what it expects and many on surprises. So every weight is rounded to a few
levels, the bits of each symbol are estimated from how often symbols like it occur in its layer, its row and its
column, and training minimizes loss + strength · bits. A weight stays away from zero only where it saves more loss
than its bits cost; whole rows and columns empty themselves, since a lonely weight is the most expensive kind.

Settings: `strength`, the price of a bit. At 1 a bit of weights costs as much as a bit of the training labels, which is
the balance of minimum description length. `weight_bits`, the width of the symbols before coding: 2 is -1, 0, 1 times
the layer's learned scale. `epochs` of training, its `learning_rate` in levels for each step, and a `seed`. `augment`
turns and shifts the training images a little; leave it off where they are changed already.

When it helps: the file, more than pruning and rounding one after the other, because it knows what each weight costs.
Zeros, signs, and empty rows and columns all become cheap for the coder that writes the file.

When it does not: speed. The kernels stay dense until channels that became empty are cut out. It is a training, not a
second, and it needs the training images; with few images or few steps the size hardly moves. Layers that an earlier
stage clustered or quantized are left as they are.

Source: Wiedemann et al., 2019 (DeepCABAC), arXiv:1907.11900; Oktay et al., 2020, arXiv:1906.06624; Louizos et al., 2017
(Bayesian compression), arXiv:1705.08665.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log, prod
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from workbench.data import Data
from workbench.surgery import clone, weighted_layers
from workbench.surgery.channels import ChannelGroup, TracingError, cut_channels, trace_channels
from workbench.technique import Technique, setting
from workbench.training import fit
from workbench.weights import (
    CODERS,
    FakeQuantize,
    Mask,
    finite_weight,
    parametrize_weight,
    stored_tensor,
    weight_parametrizations,
)

REFRESH = 10  # training steps between two counts of the symbols
RAMP = 0.4  # of the training, in which the price of a bit rises from zero to its full height
PRIOR = 0.5  # non-zeros' worth of belief that a row, column or kernel is as dense as what it is part of
REST_RATE = 1e-3  # learning rate of what is not rounded: normalization, biases of other layers
SCALE_RATE = 0.3  # of the learning rate: scales move slower than the symbols that they multiply


class SymbolBits(NamedTuple):
    """Estimated bits: of a zero and of a signed one at each place, and what magnitude 1, 2, … takes on top."""

    zero: Tensor
    one: Tensor
    magnitude: Tensor


def symbol_bits(symbols: Tensor, largest: int) -> SymbolBits:
    """Estimate what each symbol -largest … largest would cost at each place of `symbols` (outputs, inputs, …).

    A symbol is coded as "is it zero?", sign, magnitude. The probability of a non-zero is that of its row and column
    (and, in a convolution, its kernel) together; magnitudes have one histogram for the layer.
    """
    chance = _density((symbols != 0).float().reshape(len(symbols), symbols.shape[1] if symbols.dim() > 1 else 1, -1))
    chance = chance.reshape(symbols.shape)
    return SymbolBits(-(1 - chance).log2(), 1 - chance.log2(), _magnitude_bits(symbols, largest))


def _magnitude_bits(symbols: Tensor, largest: int) -> Tensor:
    """Return the bits of magnitude 1 … largest given that it is not zero; never falling, so that none is drawn up."""
    counts = torch.bincount(symbols.abs().flatten().long(), minlength=largest + 1)[1:].float() + 0.3
    falling = counts.flip(0).cummax(0).values.flip(0)
    return -(falling / falling.sum()).log2()


def _density(kept: Tensor) -> Tensor:
    """Return the probability that each place is kept, judged by all others; `kept` (outputs, inputs, kernel), 0 or 1.

    Leaving a place out of its own count keeps small rows and kernels from looking more certain than they are.
    """
    whole = (kept.sum() + 0.5) / (kept.numel() + 1)
    row = _share(kept, (1, 2), whole)
    column = _share(kept, (0, 2), whole)
    chance = (row * column / whole).clamp(1e-5, 0.98)
    return _share(kept, (2,), chance) if kept.shape[2] > 1 else chance


def _share(kept: Tensor, dims: tuple[int, ...], expected: Tensor) -> Tensor:
    """Return the part that is kept of all other places along `dims`, drawn towards `expected` where they are few."""
    places = prod(kept.shape[dim] for dim in dims)
    return (kept.sum(dims, keepdim=True) - kept + PRIOR) / (places - 1 + PRIOR / expected)


def coded_bits(levels: Tensor, bits: SymbolBits) -> Tensor:
    """Return the bits of `levels`, whole numbers or not: between two symbols the cost is interpolated.

    That gives training a slope: from 1 down to 0 the whole price of a non-zero, above 1 only that of its magnitude.
    """
    size = levels.abs().clamp(max=len(bits.magnitude))
    first = (bits.one + bits.magnitude[0] - bits.zero).clamp(min=0.1)
    steps = torch.cat([bits.magnitude.diff(), bits.magnitude.new_zeros(1)])
    whole = size.detach().floor().long().clamp(1, len(steps))
    above = bits.magnitude[whole - 1] - bits.magnitude[0] + (size - whole).clamp(min=0) * steps[whole - 1]
    return (bits.zero + size.clamp(max=1) * first + above).sum()


class _Coded(NamedTuple):
    """One rounded tensor of a model: `layer`.`name`, and its quantizer."""

    layer: nn.Module
    name: str
    quantizer: FakeQuantize

    @property
    def latent(self) -> Tensor:
        """The number that training moves, below the rounding."""
        return self.layer.parametrizations[self.name].original

    @property
    def levels(self) -> Tensor:
        """The latent in units of the quantizer's scale, zero where an earlier stage masked it."""
        stack = weight_parametrizations(self.layer, self.name)
        value = self.latent
        for mask in (p for p in stack if isinstance(p, Mask)):
            value = mask(value)
        return value / self.quantizer.step.detach()

    def count(self) -> SymbolBits:
        """Return what symbols cost now."""
        symbols = self.quantizer.symbols(getattr(self.layer, self.name).detach())
        return symbol_bits(symbols, self.quantizer.quant_max)


class CodedSize:
    """The estimated bits of a model's symbols, as a term of the loss whose price rises over the first steps."""

    def __init__(self, coded: list[_Coded], price: float):
        self.coded, self.price, self.costs = coded, price, []

    def __call__(self, step: int, steps: int) -> Tensor:
        """Return price · bits, differentiable in the latents."""
        if step % REFRESH == 0 or not self.costs:
            with torch.no_grad():
                self.costs = [one.count() for one in self.coded]
        bits = sum(coded_bits(one.levels, cost) for one, cost in zip(self.coded, self.costs, strict=True))
        return self.price * min(1.0, step / (RAMP * steps)) * bits


@dataclass(frozen=True)
class EntropyAwareTraining(Technique):
    """Train on loss plus coded size: a weight stays only where it saves more than its bits cost."""

    family: ClassVar[str] = "coding"
    source: ClassVar[str] = "Wiedemann et al., 2019, arXiv:1907.11900"
    trains: ClassVar[bool] = True

    strength: float = setting(1.0, low=0.1, high=20.0, step=0.1, unit="× the price of a label's bit", neutral=0.0)
    weight_bits: int = setting(3, low=2, high=5, step=1, unit="bits", help="Width of a symbol before coding.")
    epochs: int = setting(8, low=1, high=80, step=1, unit="epochs")
    learning_rate: float = setting(0.02, low=0.002, high=0.1, step=0.002, unit="levels a step")
    augment: bool = setting(True, choices=(True, False), help="Turn, scale and shift the training images a little.")
    seed: int = setting(0, low=0, high=9, step=1)
    checkpoint: Path | None = None  # where each epoch is saved, and a later call goes on from

    def compress(self, model, data=None, watch=None):
        """Return a trained copy whose weights and their biases are symbols; at strength 0, a plain copy.

        Raises ValueError without training images, without a layer to round, or where a weight is not finite.
        `watch(step)` returning False stops; the weights of that moment are returned.
        """
        small = clone(model)
        if self.is_neutral:
            return small
        if not isinstance(data, Data):
            raise ValueError("EntropyAwareTraining trains: pass a data set from load_data.")
        coded = [_attach(layer, name, self.weight_bits) for layer, name in _roundable(small)]
        self._train(small, coded, data, watch)
        for one in coded:
            _freeze(one)
        return without_unread_channels(small, data.example()).eval()

    def _train(self, model: nn.Module, coded: list[_Coded], data: Data, watch) -> None:
        """Train in place, and keep the last weights: the most accurate ones are the first, which are the largest."""
        size = CodedSize(coded, self.strength * log(2) / max(len(data.train), 1))
        steps = fit(
            model,
            data,
            epochs=self.epochs,
            weight_decay=0.0,
            seed=self.seed,
            augment=self.augment,
            parameters=self._groups(model, coded),
            penalty=size,
            keep="last",
            checkpoint=self.checkpoint,
        )
        for step in steps:
            if watch is not None and watch(step) is False:
                steps.close()

    def _groups(self, model: nn.Module, coded: list[_Coded]) -> list[dict]:
        """Return the optimizer's groups: each latent moves in units of its own scale."""
        groups, seen = [], set()
        for one in coded:
            rate = self.learning_rate * float(one.quantizer.step.detach())
            groups.append({"params": [one.latent], "lr": rate})
            groups.append({"params": [one.quantizer.scale], "lr": rate * SCALE_RATE})
            seen |= {id(one.latent), id(one.quantizer.scale)}
        rest = [p for p in model.parameters() if id(p) not in seen and p.requires_grad]
        return [*groups, {"params": rest, "lr": REST_RATE}] if rest else groups


def without_unread_channels(model: nn.Module, example: Tensor) -> nn.Module:
    """Cut out, in place, the channels whose every reader multiplies them by zero; the outputs stay as they are.

    A model whose channels cannot be followed is returned as it is.
    """
    try:
        groups = trace_channels(model, example).groups
    except TracingError:
        return model
    cuts = [(group, _is_read(model, group)) for group in groups]
    return cut_channels(model, [(group, keep) for group, keep in cuts if not keep.all()])


def _is_read(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Return which channels of the group some layer reads, (channels,) bool; at least one."""
    read = torch.zeros(len(group), dtype=torch.bool)
    for member in group.members:
        if member.role == "in" and "weight" not in dict(member.tensors):
            read[:] = True
        elif member.role == "in":
            weight = model.get_submodule(member.layer).weight.detach()
            used = weight.transpose(0, dict(member.tensors)["weight"]).flatten(1).any(1).cpu()
            read |= used[member.index].any(1)
    read[0] |= not read.any()
    return read


def _roundable(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return (layer, tensor) of each weight and bias that no earlier stage has rounded already.

    Raises ValueError where there is none, where one is not finite or kept in parts, or where two layers share one.
    """
    found, owners = [], {}
    for name, layer in weighted_layers(model):
        for tensor in ("weight", "bias"):
            value = getattr(layer, tensor)
            if value is None or any(isinstance(p, CODERS) for p in weight_parametrizations(layer, tensor)):
                continue
            finite_weight(name, value.detach())
            if value.dtype != torch.float32:
                raise ValueError(
                    f"EntropyAwareTraining trains in float32, but {name!r} holds {value.dtype}; pass model.float()."
                )
            stored = stored_tensor(layer, tensor)
            if stored.shape != value.shape:
                raise ValueError(
                    f"EntropyAwareTraining: the {tensor} of layer {name!r} is kept in several tensors (weight_norm); "
                    f"call torch.nn.utils.parametrize.remove_parametrizations(layer, {tensor!r}) first."
                )
            if id(stored) in owners:
                raise ValueError(
                    f"EntropyAwareTraining: layers {owners[id(stored)]!r} and {name!r} share one {tensor}, which would "
                    "get two scales; give each its own copy first."
                )
            owners[id(stored)] = name
            found.append((layer, tensor))
    if not found:
        raise ValueError(
            f"EntropyAwareTraining found no linear or convolution layer left to round in {type(model).__name__}."
        )
    return found


def _attach(layer: nn.Module, name: str, bits: int) -> _Coded:
    """Stack a quantizer with a learned scale on the tensor: few levels start far apart, since few weights will stay.

    Where the weights lie on one side of zero, not their spread but their mean is what the levels must reach.
    """
    weight, levels = layer.weight.detach().float(), 2 ** (bits - 1)
    spread, middle = float(weight.std(correction=0)), float(weight.mean().abs())
    scale = middle * min(1.0, 8 / levels) if middle > 2 * spread else spread * min(2.0, 8 / levels) or 1.0
    if name == "bias":
        bits = min(bits + 1, 8)
    quantizer = FakeQuantize(nn.Parameter(torch.tensor(scale)), torch.tensor(0), bits, None)
    parametrize_weight(layer, quantizer, name)
    return _Coded(layer, name, quantizer)


def _freeze(one: _Coded) -> None:
    """Hold the zeros with a mask, so that a later stage cannot move them."""
    kept = getattr(one.layer, one.name).detach() != 0
    if not kept.all():
        parametrize_weight(one.layer, Mask(kept), one.name)
