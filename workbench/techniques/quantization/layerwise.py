"""What the techniques share that round one layer after the other so that its outputs change least.

A layer's error is measured by the second moment of its inputs: for a change D of the weight and inputs x,
the mean of |D·x|² is the trace of D·E[x·xᵀ]·Dᵀ.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from workbench.surgery import clone, identity, layers_to_compress, remembered
from workbench.technique import Technique, setting
from workbench.techniques.moments import second_moments
from workbench.techniques.quantization.post_training import Quantization, group_size_setting
from workbench.techniques.quantization.structure import only_masked, tied_layers
from workbench.techniques.repair import calibration_batches
from workbench.training import Step
from workbench.weights import FakeQuantize, finite_weight, parametrize_weight, stored_tensor

T = TypeVar("T")


class Moments(dict):
    """The second moment of each layer's inputs by name, and what was computed from them, kept as long as they are."""

    def __init__(self, moments: dict[str, Tensor]):
        super().__init__(moments)
        self._derived: dict[Any, Any] = {}

    def derive(self, key: Any, compute: Callable[[], T]) -> T:
        """Return `compute()`, computed once for this key."""
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]


def layer_moments(model: nn.Module, data: Any, who: str) -> Moments:
    """Return the second moments (n, n), float64, on 128 training images or a batch of images.

    Layers that share a weight share the mean of theirs. Raises ValueError naming the technique `who` if there are no
    images.
    """
    layers_to_compress(model)
    batches = [data] if isinstance(data, Tensor) else calibration_batches(model, data)
    if not batches:
        raise ValueError(f"{who} looks at the inputs of layers: pass data from load_data, or a batch of images.")
    compute = lambda: (_moments(model, batches), data)  # holding the data keeps its id its own
    return remembered(model, ("second moments", identity(data)), compute)[0]


def _moments(model: nn.Module, batches: list[Tensor]) -> Moments:
    moments = second_moments(clone(model), batches)
    for names in tied_layers(model):
        found = [moments[name] for name in names if name in moments]
        if len(found) > 1:
            moments |= dict.fromkeys(names, torch.stack(found).mean(0))
    return Moments(moments)


def damped(moment: Tensor, part: float = 0.01) -> Tensor:
    """Return `moment` (n, n) with `part` of its mean diagonal added to the diagonal, so that it can be inverted."""
    ridge = part * moment.diagonal().mean().clamp_min(1e-12)
    return moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)


def output_errors(change: Tensor, moment: Tensor) -> Tensor:
    """Return the mean squared error of each output channel (m,) when the weight is off by `change` (m, n)."""
    change = change.to(moment.dtype)
    return ((change @ moment) * change).sum(1)


def relative_error(layer: nn.Module, rounded: nn.Module, moment: Tensor | None) -> float:
    """Return the error that rounding brought to a layer's outputs, as a part of their size; NaN without a moment."""
    if moment is None:
        return float("nan")
    weight = layer.weight.detach().flatten(1)
    change = rounded.weight.detach().flatten(1) - weight
    return float(output_errors(change, moment).sum() / output_errors(weight, moment).sum().clamp_min(1e-30))


@dataclass(frozen=True)
class LayerwiseRounding(Technique):
    """A technique that chooses the codes of one layer after the other; `_values` says how."""

    weight_bits: int = setting(4, low=2, high=8, step=1, unit="bits", neutral=32)
    granularity: str = setting(
        "channel", choices=("channel", "group"), help="One scale for each output channel, or for a group of weights."
    )
    group_size: int = group_size_setting()

    def compress(self, model, data=None, watch=None):
        """Return a copy with rounded weights.

        `data` is a `Data` (128 of its training images are used) or a batch of images (N, C, H, W). Raises ValueError
        without it, or where a weight is not finite. Where the weight is coded already, or the layer is a grouped or
        not a 2-D convolution, it is rounded to nearest.
        """
        small = clone(model)
        if self.is_neutral:
            return small
        moments = layer_moments(model, data, type(self).__name__)
        started, groups = time.perf_counter(), tied_layers(small)
        for number, names in enumerate(groups, 1):
            self._round(model, small, names, moments)
            if watch is None:
                continue
            error = relative_error(model.get_submodule(names[0]), small.get_submodule(names[0]), moments.get(names[0]))
            if watch(Step(number, len(groups), 0, error, None, time.perf_counter() - started)) is False:
                moments, watch = Moments({}), None  # the layers that are left are rounded to nearest
        return small

    def quantizer(self, model: nn.Module, name: str) -> FakeQuantize:
        """Return the quantizer of layer `name`: symmetric, its range chosen by least squared error."""
        settings = {"granularity": self.granularity, "group_size": self.group_size}
        return Quantization(weight_bits=self.weight_bits, **settings).layer_quantizer(model, name)

    def _round(self, model: nn.Module, small: nn.Module, names: list[str], moments: Moments) -> None:
        """Round the weight that the layers `names` share, in place."""
        layers = [small.get_submodule(name) for name in names]
        quantizer = self.quantizer(model, names[0])
        if names[0] in moments and all(map(only_masked, layers)):
            weight = finite_weight(names[0], layers[0].weight.detach()).float()
            values = self._values(model, names[0], weight.flatten(1), moments, quantizer)
            with torch.no_grad():
                stored_tensor(layers[0]).copy_(values.reshape(weight.shape))
        for layer in layers:
            parametrize_weight(layer, clone(quantizer))

    def _values(self, model: nn.Module, name: str, weight: Tensor, moments: Moments, quantizer: FakeQuantize) -> Tensor:
        """Return the rounded weight (m, n), each number one that `quantizer` leaves as it is; zeros stay zero."""
        raise TypeError(f"{type(self).__name__} does not say how it rounds: define _values.")
