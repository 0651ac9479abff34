"""Magnitude pruning: set the smallest weights to zero.

Idea: a weight close to zero moves the output little, so the smallest ones go first. Sort all weights by absolute
value, and hold the lowest `sparsity` of them at zero with a mask that lies on the weight. The mask stays there
during fine-tuning, so pruned weights stay pruned.

Settings: `sparsity`, the part of the weights removed. `scope` "global" sorts the weights of all layers together, so
that layers with many small weights lose more; "layer" removes the same part of every layer. `finetune`, epochs of
training afterwards. No layer is ever emptied: its largest weight stays.

When it helps: the file. Zeros take almost no bytes once the weights are coded, and large layers often lose 80 to 90 %
of their weights at little cost, more after fine-tuning.

When it does not: speed. A dense kernel multiplies by zero as slowly as by anything else, so latency and memory
while running stay as they were. Small networks and depthwise layers have few weights to spare, and accuracy falls
suddenly beyond some sparsity: look for the knee.

Source: Han et al., 2015, arXiv:1506.02626.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.surgery import clone, remembered, weighted_layers
from workbench.technique import Technique, setting
from workbench.techniques.repair import finetune
from workbench.weights import Mask, finite_weight, parametrize_weight, weight_parametrizations


def magnitude_ranks(weights: list[Tensor]) -> list[Tensor]:
    """Rank all weights together by magnitude: 0 is the smallest; among equals the earlier is smaller.

    Returns one int32 tensor for each weight, of its shape.
    """
    magnitudes = torch.cat([weight.detach().abs().flatten() for weight in weights])
    order = magnitudes.argsort(stable=True)
    ranks = torch.empty_like(order, dtype=torch.int32)
    ranks[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return _split_like(ranks, weights)


def _split_like(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def global_magnitude_mask(weights: list[Tensor], sparsity: float) -> list[Tensor]:
    """Return one boolean mask for each weight; together they are false at the `round(sparsity * total)` smallest."""
    removed = round(sparsity * sum(weight.numel() for weight in weights))
    return [ranks >= removed for ranks in magnitude_ranks(weights)]


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Return a boolean mask of the weight's shape, false at its `round(sparsity * size)` smallest entries.

    Exact for every sparsity from 0 to 1, with ties too. Source: Han et al., 2015, arXiv:1506.02626.
    """
    return global_magnitude_mask([weight], sparsity)[0]


@dataclass(frozen=True)
class MagnitudePruning(Technique):
    """Set the weights of smallest magnitude to zero."""

    family: ClassVar[str] = "pruning"
    source: ClassVar[str] = "Han et al., 2015, arXiv:1506.02626"

    sparsity: float = setting(0.5, low=0.0, high=0.98, step=0.02, unit="of weights removed", neutral=0.0)
    scope: str = setting(
        "global", choices=("global", "layer"), help="Compare weights over the whole model, or within each layer."
    )
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training after pruning.")

    def compress(self, model, data=None, watch=None):
        """Return a copy with masks on the weights; raises ValueError if there is no weight to prune, or NaN in one."""
        small = clone(model)
        if self.sparsity > 0:
            for name, mask in self.masks(model).items():
                _attach(small.get_submodule(name), mask)
        return finetune(small, data, self.finetune, watch)

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the boolean mask of each linear and convolution layer by name, true where a weight is kept."""
        ranks = remembered(model, ("magnitude ranks", self.scope), lambda: _layer_ranks(model, self.scope))
        total = sum(r.numel() for r in {id(r): r for r in ranks.values()}.values())
        if self.scope == "global":
            return {name: r >= min(round(self.sparsity * total), total - 1) for name, r in ranks.items()}
        return {name: r >= min(round(self.sparsity * r.numel()), r.numel() - 1) for name, r in ranks.items()}


def _layer_ranks(model: nn.Module, scope: str) -> dict[str, Tensor]:
    """Rank the weights of all layers; layers that share one tensor share its ranks, and so its mask."""
    layers = weighted_layers(model)
    if not layers:
        kind = type(model).__name__
        raise ValueError(f"MagnitudePruning found no linear or convolution layer in {kind}: there is nothing to prune.")
    weights = {}
    for name, layer in layers:
        weights.setdefault(id(_stored(layer)), finite_weight(name, layer.weight.detach()))
    if scope == "global":
        together = _without_empty_layers(magnitude_ranks(list(weights.values())))
        ranks = dict(zip(weights, together, strict=True))
    else:
        ranks = {key: magnitude_ranks([weight])[0] for key, weight in weights.items()}
    return {name: ranks[id(_stored(layer))] for name, layer in layers}


def _without_empty_layers(ranks: list[Tensor]) -> list[Tensor]:
    """Move the largest weight of every layer behind all others, so that no layer is left without a weight."""
    values = torch.cat([r.flatten() for r in ranks])
    largest = torch.stack([r.max() for r in ranks])
    values[torch.isin(values, largest)] += len(values)
    order = values.argsort()
    values[order] = torch.arange(len(values), dtype=values.dtype, device=values.device)
    return _split_like(values, ranks)


def _stored(layer: nn.Module) -> Tensor:
    """Return the tensor that lies under the layer's weight, below any parametrization."""
    return layer.parametrizations.weight.original if weight_parametrizations(layer) else layer.weight


def _attach(layer: nn.Module, mask: Tensor) -> None:
    """Put the mask on the layer's weight, or narrow the mask that already lies there."""
    existing = next((p for p in weight_parametrizations(layer) if isinstance(p, Mask)), None)
    if existing is None:
        parametrize_weight(layer, Mask(mask))
    else:
        existing.mask = existing.mask & mask
