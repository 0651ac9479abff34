"""Post-training quantization: round weights, and the inputs of layers, to a few integer levels.

Idea: a trained weight does not need 24 bits of precision. Map its range onto 2^bits integers with a scale and a
zero point; store the integers, and where the runtime has integer kernels, compute with them too.

Settings: `weight_bits`, bits of a stored weight. `activation_bits` 8 also rounds the input of each layer, which integer
kernels need; 32 leaves it in fp32. `granularity` "channel" gives every output channel its own scale, "tensor" one to
the layer, "group" one to every `group_size` weights of a channel. `scheme` "symmetric" puts the zero point at 0;
"asymmetric" uses the range from the smallest to the largest. `calibration` chooses that range: the extremes (min-max),
all but one value in a thousand at each end (percentile; where there are fewer, all), the range with the least squared
error (mse), or for inputs the one that loses least information (kl; weights take mse then); activations are observed on
512 training images. `fold` multiplies BatchNorm into the layer before it, behind a linear layer only where a flatten
shows that it reads vectors (B, features). `equalize` also moves factors between a layer and the next, until their
channels use the range alike. `bias_correction` takes the mean error of each channel out of its bias.

When it helps: 8 bits cost almost no accuracy, make the file four times smaller and, with activations in 8 bits too,
run on integer kernels several times faster. With one scale a tensor, equalization and bias correction bring back
much of what is lost where channels differ in range.

When it does not: below 8 bits no kernel here computes with such weights, so the file shrinks and the time does not.
Weights alone (activations in fp32) are computed in fp32. In eager mode the rounding is simulated, and slower than
fp32. Below 4 bits accuracy falls quickly without retraining, with one scale a tensor even earlier. Groups have no
kernel here either. With one scale a channel, equalization gains little. A layer that holds a codebook already gets one
scale and keeps its number of levels; folding and equalization leave layers alone that are coded already.

Source: Jacob et al., 2018, arXiv:1712.05877; Nagel et al., 2019, arXiv:1906.04721 (equalization, bias correction);
Nagel et al., 2021, arXiv:2106.08295.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from workbench.surgery import clone, identity, layers_to_compress, remembered, weighted_layers
from workbench.technique import Technique, setting
from workbench.techniques.quantization.bias_correction import correct_bias, mean_inputs
from workbench.techniques.quantization.calibration import (
    METHODS,
    input_range,
    input_samples,
    scale_and_zero,
    value_range,
)
from workbench.techniques.quantization.equalization import equalize_layers
from workbench.techniques.quantization.structure import fold_norms
from workbench.techniques.repair import training_images
from workbench.weights import (
    Codebook,
    FakeQuantize,
    InputQuantizer,
    attach_input_quantizer,
    finite_weight,
    parametrize_weight,
    split_groups,
    weight_parametrizations,
)

CALIBRATION_IMAGES = 512
GRANULARITIES = ("channel", "tensor", "group")


def weight_quantizer(
    weight: Tensor,
    bits: int,
    granularity: str = "channel",
    scheme: str = "symmetric",
    calibration: str = "min-max",
    group_size: int = 64,
) -> FakeQuantize:
    """Return the quantizer of `weight` (channels, …) with `bits` from 2 to 8; the settings are those of the module."""
    symmetric = scheme == "symmetric"
    quant_max = 2 ** (bits - 1) - 1
    quant_min = -quant_max if symmetric else -quant_max - 1
    rows = _rows(weight.detach().float(), granularity, group_size)
    low, high = value_range(rows, calibration, quant_min, quant_max, symmetric)
    scale, zero = scale_and_zero(low, high, quant_min, quant_max, symmetric)
    if granularity == "tensor":
        return FakeQuantize(scale[0], zero[0], bits, axis=None, symmetric=symmetric)
    if granularity == "channel":
        return FakeQuantize(scale, zero, bits, axis=0, symmetric=symmetric)
    grid = (len(weight), -1)
    return FakeQuantize(scale.reshape(grid), zero.reshape(grid), bits, 0, symmetric, group_size=group_size)


def _rows(weight: Tensor, granularity: str, group_size: int) -> Tensor:
    """Lay out the weight so that each row is what one scale covers."""
    if granularity == "tensor":
        return weight.reshape(1, -1)
    rows = weight.reshape(len(weight), -1)
    return rows if granularity == "channel" else split_groups(rows, group_size)


def fitting_granularity(layer: nn.Module, granularity: str) -> str:
    """Return `granularity`, or "tensor" for a layer with a codebook: more scales would make more levels of each one."""
    clustered = any(isinstance(p, Codebook) for p in weight_parametrizations(layer))
    return "tensor" if clustered else granularity


def group_size_setting():
    """Declare the setting `group_size`, which has an effect where `granularity` is "group"."""
    groups = lambda values: values["granularity"] == "group"
    return setting(64, low=16, high=128, step=16, unit="weights", help="Of a group of weights.", applies=groups)


@dataclass(frozen=True)
class Quantization(Technique):
    """Round weights to 2–8 bits and layer inputs to 8, without retraining."""

    family: ClassVar[str] = "quantization"
    source: ClassVar[str] = "Jacob et al., 2018, arXiv:1712.05877; Nagel et al., 2019, arXiv:1906.04721"

    weight_bits: int = setting(8, low=2, high=8, step=1, unit="bits", neutral=32)
    activation_bits: int = setting(
        8, choices=(8, 32), unit="bits", neutral=32, help="8 rounds each layer's input too; 32 leaves it in fp32."
    )
    granularity: str = setting(
        "channel", choices=GRANULARITIES, help="One scale for each output channel, for the layer, or for a group."
    )
    scheme: str = setting("symmetric", choices=("symmetric", "asymmetric"), help="Zero point at 0, or anywhere.")
    calibration: str = setting("mse", choices=METHODS, help="How the range of each quantizer is chosen.")
    group_size: int = group_size_setting()
    fold: bool = setting(
        False,
        choices=(False, True),
        neutral=False,
        help="Multiply BatchNorm into the layer before it.",
        applies=lambda values: not values["equalize"],
    )
    equalize: bool = setting(
        False, choices=(False, True), neutral=False, help="Even out the ranges of neighbouring layers; folds BatchNorm."
    )
    bias_correction: bool = setting(
        False, choices=(False, True), neutral=False, help="Take the mean error of each channel out of its bias."
    )

    def compress(self, model, data=None, watch=None):
        """Return a copy with quantizers on weights and inputs.

        `data` is a `Data` (calibration uses 512 of its training images) or a batch of images (N, C, H, W); it is
        needed where activations are quantized or biases corrected. Raises ValueError without it, or where a weight is
        not finite, and TracingError where BatchNorm is to be folded in a model that cannot be followed.
        """
        if not self.is_neutral:
            layers_to_compress(model)
        model = self._prepared(model)
        small = clone(model)
        if self.activation_bits == 8:
            for name, quantizer in self._input_quantizers(model, data).items():
                attach_input_quantizer(small.get_submodule(name), quantizer)
        if self.weight_bits <= 8:
            for name, layer in weighted_layers(small):
                parametrize_weight(layer, self.layer_quantizer(model, name))
            if self.bias_correction:
                self._correct_biases(model, small, data)
        return small

    def _prepared(self, model: nn.Module) -> nn.Module:
        """Return the model with BatchNorm folded and layers equalized as the settings say, computed once."""
        if self.equalize:
            return remembered(model, "equalized", lambda: equalize_layers(fold_norms(clone(model))))
        return remembered(model, "folded", lambda: fold_norms(clone(model))) if self.fold else model

    def layer_quantizer(self, model: nn.Module, name: str) -> FakeQuantize:
        """Return a new quantizer of the weight of layer `name` as these settings choose it, computed once."""
        layer = model.get_submodule(name)
        granularity = fitting_granularity(layer, self.granularity)
        choice = (self.weight_bits, granularity, self.scheme, self.calibration, self.group_size)
        weight = lambda: finite_weight(name, layer.weight.detach())
        return clone(remembered(model, ("weight range", name, choice), lambda: weight_quantizer(weight(), *choice)))

    def _input_quantizers(self, model: nn.Module, data) -> dict[str, InputQuantizer]:
        """Return the input quantizer of each layer that ran on the calibration images."""
        if data is None:
            raise ValueError(
                "Quantization needs images to see the range of activations: pass data, or a batch of images, "
                "or set activation_bits=32 to quantize the weights alone."
            )
        if isinstance(data, Tensor):
            ranges = self._input_ranges(input_samples(clone(model), data))
        else:
            look = lambda: (input_samples(clone(model), _images(model, data)), data)  # held, the data keeps its id
            samples, _ = remembered(model, ("input samples", identity(data)), look)
            key = ("input ranges", identity(data), self.calibration)
            ranges = remembered(model, key, lambda: self._input_ranges(samples))
        codes = {name: scale_and_zero(*low_high, 0, 255, symmetric=False) for name, low_high in ranges.items()}
        return {name: InputQuantizer(*code) for name, code in codes.items()}

    def _input_ranges(self, samples: dict) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: input_range(sample, self.calibration, 0, 255) for name, sample in samples.items()}

    def _correct_biases(self, model: nn.Module, small: nn.Module, data) -> None:
        """Correct the bias of each layer of `small` that ran on the calibration images, in place."""
        if data is None:
            raise ValueError(
                "Bias correction needs images: pass data, a batch of images, or set bias_correction=False."
            )
        if isinstance(data, Tensor):
            means = mean_inputs(clone(model), data)
        else:
            look = lambda: (mean_inputs(clone(model), _images(model, data)), data)
            means, _ = remembered(model, ("mean inputs", identity(data)), look)
        for name, seen in means.items():
            correct_bias(small.get_submodule(name), model.get_submodule(name).weight.detach(), seen)


def _images(model: nn.Module, data) -> Tensor:
    """Return the training images that calibration looks at, (N, C, H, W), always the same, in the type of `model`."""
    images, _ = training_images(data).take(CALIBRATION_IMAGES, seed=0).batch(slice(None))
    return images.to(next(model.parameters(), images))
