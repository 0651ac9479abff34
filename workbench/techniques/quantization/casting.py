"""What the techniques share that store weights in a shorter number type, layer by layer from the largest on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.surgery import clone, layers_to_compress
from workbench.technique import Technique, setting
from workbench.techniques.quantization.structure import tied_layers
from workbench.weights import finite_weight, parametrize_weight


def largest_layers(model: nn.Module, part: float) -> list[str]:
    """Return the names of the largest weighted layers that together hold at least `part` of the weights, 0 to 1.

    Layers that share a weight come together and count once.
    """
    groups = [(model.get_submodule(names[0]).weight.numel(), names) for names in tied_layers(model)]
    wanted, chosen = part * sum(size for size, _ in groups), []
    for size, names in sorted(groups, key=lambda group: -group[0]):
        if wanted <= 0:
            break
        chosen += names
        wanted -= size
    return chosen


@dataclass(frozen=True)
class Casting(Technique):
    """A technique that puts one parametrization on the weights of the largest layers; `_short` makes it."""

    part: float = setting(
        1.0, low=0.0, high=1.0, step=0.05, unit="of weights", neutral=0.0, help="The largest layers come first."
    )

    def compress(self, model, data=None, watch=None):
        """Return a copy with shortened weights; raises ValueError where one is not finite or does not fit."""
        layers_to_compress(model)
        small = clone(model)
        for name in largest_layers(small, self.part):
            layer = small.get_submodule(name)
            parametrize_weight(layer, self._short(name, finite_weight(name, layer.weight.detach()).float()))
        return small

    def _short(self, name: str, weight: Tensor) -> nn.Module:
        """Return the parametrization for the weight of layer `name`."""
        raise TypeError(f"{type(self).__name__} does not say how it shortens a weight: define _short.")


def largest_magnitude(weight: Tensor) -> Tensor:
    """Return the largest magnitude in `weight`, shape (), or 1 for a weight of zeros."""
    most = weight.abs().max() if weight.numel() else weight.new_zeros(())
    return torch.where(most > 0, most, torch.ones_like(most))
