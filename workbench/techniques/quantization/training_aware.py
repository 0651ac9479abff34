"""Quantization-aware training: train with the rounding in place, and the scales too.

Idea: a network can learn to live with few levels. The forward pass uses rounded weights and inputs, the backward pass
treats rounding as if it were not there, and the distance between levels is a parameter like any other, with a
gradient of its own (LSQ). Training starts from a calibrated post-training quantization.

Settings: `weight_bits`. `activation_bits` 8 rounds the input of each layer too; 32 leaves it in fp32. `granularity`,
one scale for each output channel or for the layer. `input_scale` "learned" trains the scales of the inputs as well,
"fixed" keeps them as calibrated. `epochs` of training, and the `seed` of its order.

When it helps: 2 and 3 bits, where rounding a trained network breaks it, and wherever labels and minutes are at hand.
At 8 bits with rounded inputs the result runs on integer kernels, like that of post-training quantization.

When it does not: at 8 bits, and often at 4, post-training quantization is as accurate and takes no training; a part
of any gain is that of the additional epochs, so compare with plain training of the same length. Below 8 bits no
kernel here computes with such weights, so the file shrinks and the time does not. A training step takes longer than a
plain one.

Source: Esser et al., 2020 (LSQ), arXiv:1902.08153; Jacob et al., 2018, arXiv:1712.05877.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.surgery import clone, weighted_layers
from workbench.technique import Technique, setting
from workbench.techniques.quantization.post_training import Quantization
from workbench.techniques.quantization.structure import tied_layers
from workbench.techniques.repair import LEARNING_RATE
from workbench.weights import FakeQuantize, InputQuantizer, attach_input_quantizer, weight_parametrizations

QUICKER = 5.0  # scales learn this much faster, relative to their size, than Adam moves a weight


class Relative(nn.Module):
    """A positive number that starts at `start` and is learned by its ratio to it: t -> start · exp(5 t)."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.register_buffer("start", start.detach().clone())

    def forward(self, ratio: Tensor) -> Tensor:
        return self.start * torch.exp(QUICKER * ratio)

    def right_inverse(self, value: Tensor) -> Tensor:
        return torch.log(value / self.start) / QUICKER


class LearnedInput(InputQuantizer):
    """An input quantizer whose scale gets the gradient of LSQ; it also takes the bfloat16 of autocast."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.scale.requires_grad and torch.is_grad_enabled()):
            return super().forward(x.float())
        factor = 1.0 / (x.numel() / len(x) * self.quant_max) ** 0.5
        scale, zero = self.scale.reshape(1), self.zero_point.reshape(1).float()
        return torch._fake_quantize_learnable_per_tensor_affine(
            x.float(), scale, zero, self.quant_min, self.quant_max, factor
        )


def learn_scale(quantizer: nn.Module) -> None:
    """Make the scale of a weight or input quantizer a parameter that stays positive, in place."""
    start = quantizer.scale.detach().clone()
    del quantizer.scale
    quantizer.scale = nn.Parameter(start)
    parametrize.register_parametrization(quantizer, "scale", Relative(start))


def make_trainable(model: nn.Module, learn_inputs: bool) -> nn.Module:
    """Let the scales of the outermost weight quantizers, and of inputs if wanted, be learned, in place.

    Layers that share a weight share its scale.
    """
    for first, *others in tied_layers(model):
        stack = weight_parametrizations(model.get_submodule(first))
        if stack and isinstance(stack[-1], FakeQuantize):
            learn_scale(stack[-1])
            for name in others:
                model.get_submodule(name).parametrizations.weight[len(stack) - 1] = stack[-1]
    for _, layer in weighted_layers(model):
        if hasattr(layer, "input_quantizer"):
            layer.input_quantizer = LearnedInput(layer.input_quantizer.scale, layer.input_quantizer.zero_point)
            if learn_inputs:
                learn_scale(layer.input_quantizer)
    return model


def settle(model: nn.Module) -> nn.Module:
    """Make every learned scale a fixed one again, in place, so that runtimes and files see plain quantizers."""
    for _, layer in weighted_layers(model):
        for place, quantizer in enumerate(weight_parametrizations(layer)):
            if isinstance(quantizer, FakeQuantize) and parametrize.is_parametrized(quantizer, "scale"):
                layer.parametrizations.weight[place] = _fixed(quantizer)
        if isinstance(getattr(layer, "input_quantizer", None), LearnedInput):
            learned = layer.input_quantizer
            attach_input_quantizer(layer, InputQuantizer(learned.scale, learned.zero_point))
    return model


def _fixed(learned: FakeQuantize) -> FakeQuantize:
    scale = learned.scale.detach().clone()
    return FakeQuantize(scale, learned.zero_point, learned.bits, learned.axis, learned.symmetric, learned.group_size)


@dataclass(frozen=True)
class QuantizationAwareTraining(Technique):
    """Train with rounded weights and inputs, and learn the scales."""

    family: ClassVar[str] = "quantization"
    source: ClassVar[str] = "Esser et al., 2020, arXiv:1902.08153"
    trains: ClassVar[bool] = True

    weight_bits: int = setting(4, low=2, high=8, step=1, unit="bits", neutral=32)
    activation_bits: int = setting(
        8, choices=(8, 32), unit="bits", neutral=32, help="8 rounds each layer's input too; 32 leaves it in fp32."
    )
    granularity: str = setting(
        "channel", choices=("channel", "tensor"), help="One scale for each output channel, or one for the layer."
    )
    input_scale: str = setting(
        "learned", choices=("learned", "fixed"), help="Train the scales of inputs too, or keep them as calibrated."
    )
    epochs: int = setting(1, low=1, high=20, step=1, unit="epochs")
    seed: int = setting(0, low=0, high=9, step=1)

    def compress(self, model, data=None, watch=None):
        """Return a copy trained with quantizers on weights and inputs.

        Raises ValueError without a `Data`, or where a weight is not finite. `watch(step)` returning False stops; the
        best weights so far are kept. Zeros stay zero, and a layer with a codebook keeps its number of levels.
        """
        if self.is_neutral:
            return clone(model)
        if not hasattr(data, "train"):
            raise ValueError("QuantizationAwareTraining needs training images: pass a data set from load_data.")
        if any(layer.weight.dtype != torch.float32 for _, layer in weighted_layers(model)):
            raise ValueError("QuantizationAwareTraining trains fp32 weights: use model.float() first.")
        from workbench.training import fit

        small = make_trainable(self.start().compress(model, data), self.input_scale == "learned")
        steps = fit(small, data, epochs=self.epochs, learning_rate=LEARNING_RATE, seed=self.seed)
        for step in steps:
            if watch is not None and watch(step) is False:
                steps.close()
        return settle(small).eval()

    def start(self) -> Quantization:
        """Return the post-training quantization that training starts from."""
        return Quantization(
            weight_bits=self.weight_bits, activation_bits=self.activation_bits, granularity=self.granularity
        )
