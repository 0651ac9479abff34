"""From scores to masks, shared by all techniques that remove single weights: how many go, where, and which.

A score says how much a weight matters. Scores become ranks once, and ranks become masks for any sparsity, so that a
slider does not sort again. `scope` says among which weights ranks are compared: "global" over the whole model, "layer"
(the literature's "uniform") within each layer with the same part removed everywhere, "erk" within each layer with more
removed from large layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from workbench.surgery import weighted_layers
from workbench.technique import setting
from workbench.weights import Mask, finite_weight, parametrize_weight, stored_tensor, weight_parametrizations

SCOPES = ("global", "layer", "erk")
Tied = list[tuple[str, nn.Module]]  # layers by name that share one weight; nearly always a single one


class Scoped:
    """A technique with a `scope`, which may also be called "uniform", the literature's word for "layer"."""

    def __post_init__(self):
        if self.scope == "uniform":
            object.__setattr__(self, "scope", "layer")
        super().__post_init__()


def scope_setting(default: str = "global"):
    """Declare the setting `scope`."""
    words = "Compare weights over the whole model, within each layer, or in each layer by its size (ERK)."
    return setting(default, choices=SCOPES, help=words)


# --- which weights there are ----------------------------------------------------------------------------------------


def prunable(model: nn.Module, technique: str) -> list[Tied]:
    """Return the linear and convolution layers of `model`, those that share one weight together.

    Raises ValueError if there are none, or where a weight holds NaN or infinity.
    """
    found: dict[int, Tied] = {}
    for name, layer in weighted_layers(model):
        finite_weight(name, layer.weight.detach())
        found.setdefault(id(stored_tensor(layer)), []).append((name, layer))
    if not found:
        kind = type(model).__name__
        raise ValueError(f"{technique} found no linear or convolution layer in {kind}: there is nothing to prune.")
    return list(found.values())


def used_weights(tied: list[Tied]) -> list[Tensor]:
    """Return each weight as it is used, with all that earlier stages put on it."""
    return [layers[0][1].weight.detach() for layers in tied]


# --- how many go, and which -----------------------------------------------------------------------------------------


def ranks(scores: list[Tensor]) -> list[Tensor]:
    """Rank all scores together: 0 is the smallest; among equals the earlier is smaller.

    Returns one int32 tensor for each tensor of scores, of its shape.
    """
    values = torch.cat([score.flatten() for score in scores])
    order = values.argsort(stable=True)
    flat = torch.empty_like(order, dtype=torch.int32)
    flat[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)
    return _split_like(flat, scores)


def _split_like(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


def scoped_ranks(scores: list[Tensor], scope: str) -> list[Tensor]:
    """Rank scores within `scope`; in the whole model, the best weight of each layer stands behind all others."""
    if scope != "global":
        return [ranks([score])[0] for score in scores]
    together = ranks(scores)
    values = torch.cat([r.flatten() for r in together])
    best = torch.stack([r.max() for r in together])
    values[torch.isin(values, best)] += len(values)
    return ranks(_split_like(values, together))


def kept(ranked: list[Tensor], sparsity: float, scope: str) -> list[Tensor]:
    """Return one boolean mask for each tensor of `scoped_ranks`, true where a weight stays; no layer is emptied."""
    sizes = [rank.numel() for rank in ranked]
    if scope == "global":
        gone = [min(round(sparsity * sum(sizes)), sum(sizes) - len(sizes))] * len(sizes)
    else:
        shapes = [rank.shape for rank in ranked]
        parts = erk_sparsities(shapes, sparsity) if scope == "erk" else [sparsity] * len(sizes)
        gone = [min(round(part * size), size - 1) for part, size in zip(parts, sizes, strict=True)]
    return [rank >= count for rank, count in zip(ranked, gone, strict=True)]


def erk_sparsities(shapes: list[tuple[int, ...]], sparsity: float) -> list[float]:
    """Return the part of each layer to remove so that its density is proportional to (sum of sides) / (product).

    `shapes`: of the weights, (outputs, inputs, kernel sides …). Layers that would need more than all of their weights
    stay whole, and the others share what is left, so that `sparsity` of all weights is removed.
    Source: Evci et al., 2020 (RigL, Erdős–Rényi-Kernel), arXiv:1911.11134.
    """
    sizes, raw = [math.prod(shape) for shape in shapes], [sum(shape) / math.prod(shape) for shape in shapes]
    whole: set[int] = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in whole]
        wanted = (1 - sparsity) * sum(sizes) - sum(sizes[i] for i in whole)
        factor = max(0.0, wanted) / max(sum(raw[i] * sizes[i] for i in rest), 1e-12)
        full = {i for i in rest if factor * raw[i] > 1}
        if not full:
            return [0.0 if i in whole else 1 - factor * raw[i] for i in range(len(shapes))]
        whole |= {max(full, key=raw.__getitem__)}


def cubic_sparsity(done: float, final: float) -> float:
    """Return the sparsity when the part `done` (0 to 1) of the ramp is over: quick at first, then ever more slowly.

    Source: Zhu and Gupta, 2017, arXiv:1710.01878.
    """
    return final * (1 - (1 - min(max(done, 0.0), 1.0)) ** 3)


def ramp_end(steps: int) -> int:
    """Return the training step of `steps` at which the mask is complete; the second half leaves it as it is."""
    every = _interval(steps)
    return max(every, round(0.5 * steps) // every * every)


def ramp_part(number: int, steps: int) -> float | None:
    """Return which part of the ramp is over, 0 to 1, at training step `number` if the mask shall change there, or None.

    The mask changes at most every eighth step, since to sort all weights takes about as long as one step.
    """
    end = ramp_end(steps)
    return None if number % _interval(steps) or number > end else number / end


def _interval(steps: int) -> int:
    return max(1, min(8, steps // 16))


# --- masks on layers ------------------------------------------------------------------------------------------------


def existing_mask(layer: nn.Module) -> Mask | None:
    """Return the mask that already lies on the layer's weight, or None."""
    return next((p for p in weight_parametrizations(layer) if isinstance(p, Mask)), None)


def attach_mask(layer: nn.Module, mask: Tensor) -> None:
    """Put the mask on the layer's weight, or narrow the mask that already lies there."""
    existing = existing_mask(layer)
    if existing is None:
        parametrize_weight(layer, Mask(mask))
    else:
        existing.mask = existing.mask & mask


def attach_masks(tied: list[Tied], masks: list[Tensor]) -> None:
    """Put each mask on all layers that share its weight."""
    for layers, mask in zip(tied, masks, strict=True):
        for _, layer in layers:
            attach_mask(layer, mask)
