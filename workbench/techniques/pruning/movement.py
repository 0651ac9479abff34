"""Movement pruning: keep the weights that training moves away from zero, whatever their size now.

Idea: magnitude tells what mattered in the old training; when a network is tuned to new data, or to having fewer
weights, what counts is where a weight is going. The score S = −Σ w · ∂L/∂w grows while gradient descent pushes w away
from zero and falls while it pulls w towards zero. In each step the weights with the highest scores are used;
gradients pass straight through the mask, so weights that are out go on scoring and may come back.

Settings: `sparsity`, the part of the weights removed at the end; on the way it follows the cubic schedule of gradual
pruning. `scope`, among which weights scores are compared: "global", "layer" (also "uniform") or "erk". `epochs` of
training, the second half with a fixed mask. `seed` of the order of the images. Stopped early, the mask is made from
the scores so far.

When it helps: high sparsities in a model that is tuned to other data than it was trained on, where old magnitudes say
little; that is the case for which it was published.

When it does not: a model that has been trained to the end on the same data. Its gradients are small and noisy, their
sum over a short tuning says little, and magnitude is the better guide. Low sparsities likewise. It takes a training
and one more tensor for each weight while it lasts; dense kernels gain no speed.

Source: Sanh, Wolf and Rush, 2020, arXiv:2005.07683.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.surgery import clone
from workbench.technique import Technique, setting
from workbench.techniques.pruning.masks import (
    Scoped,
    cubic_sparsity,
    existing_mask,
    kept,
    prunable,
    ramp_end,
    ramp_part,
    scope_setting,
    scoped_ranks,
)
from workbench.techniques.repair import finetune
from workbench.weights import Mask, parametrize_weight, weight_parametrizations


class ScoredMask(nn.Module):
    """A mask that learns the score of every weight while training; both tensors have the weight's shape.

    `probe` is always zero; its gradient is w · ∂L/∂(w as used), for weights that are out as well.
    """

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask.clone())
        self.register_buffer("allowed", mask.clone())  # what earlier stages removed never comes back
        self.register_buffer("scores", torch.zeros(mask.shape))
        self.probe = nn.Parameter(torch.zeros(mask.shape))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * (self.mask + self.probe).to(weight.dtype)

    def collect(self, growing: bool) -> None:
        """Take the last step's gradient from the optimizer, and add it to the scores while the mask is `growing`."""
        if growing and self.probe.grad is not None:
            self.scores -= self.probe.grad
        self.probe.grad = None


def choose(groups: list[list[ScoredMask]], sparsity: float, scope: str) -> None:
    """Set all masks to the highest scores, in place; masks in one group lie on one shared weight."""
    scores = [torch.stack([one.scores for one in group]).sum(0) for group in groups]
    allowed = [torch.stack([one.allowed for one in group]).all(0) for group in groups]
    scores = [score.masked_fill(~may, -torch.inf) for score, may in zip(scores, allowed, strict=True)]
    masks = kept(scoped_ranks(scores, scope), sparsity, scope)
    for group, mask, may in zip(groups, masks, allowed, strict=True):
        for one in group:
            one.mask = mask & may


def _attach(layer: nn.Module) -> ScoredMask:
    """Put a scored mask on the layer's weight, in the place of a mask that already lies there."""
    scored = ScoredMask(layer.weight.detach() != 0).to(layer.weight.device)
    _put(layer, existing_mask(layer), scored)
    return scored


def _put(layer: nn.Module, old: nn.Module | None, new: nn.Module) -> None:
    stack = weight_parametrizations(layer)
    if old is None:
        parametrize_weight(layer, new)
    else:
        layer.parametrizations.weight[stack.index(old)] = new


def _settle(layer: nn.Module) -> None:
    """Turn the layer's scored mask into an ordinary one."""
    scored = next(p for p in weight_parametrizations(layer) if isinstance(p, ScoredMask))
    _put(layer, scored, Mask(scored.mask))


@dataclass(frozen=True)
class MovementPruning(Scoped, Technique):
    """Keep the weights that fine-tuning moves away from zero."""

    family: ClassVar[str] = "pruning"
    source: ClassVar[str] = "Sanh et al., 2020, arXiv:2005.07683"
    trains: ClassVar[bool] = True

    sparsity: float = setting(0.8, low=0.0, high=0.98, step=0.02, unit="of weights removed", neutral=0.0)
    scope: str = scope_setting()
    epochs: int = setting(2, low=1, high=20, step=1, unit="epochs")
    seed: int = setting(0, low=0, high=9, step=1)

    def compress(self, model, data=None, watch=None):
        """Train a copy on `data` with masks that follow the scores; at sparsity 0, return an untrained copy.

        Raises ValueError without training images, for half precision, or if there is no weight to prune.
        """
        small = clone(model)
        if self.is_neutral:
            return small
        tied = prunable(small, type(self).__name__)
        groups = [[_attach(layer) for _, layer in layers] for layers in tied]

        def each_step(number, steps):
            done = ramp_part(number, steps)
            for one in (one for group in groups for one in group):
                one.collect(growing=number <= ramp_end(steps))
            if done is not None:
                choose(groups, cubic_sparsity(done, self.sparsity), self.scope)
            return done is not None

        finetune(small, data, self.epochs, watch, seed=self.seed, each_step=each_step)
        choose(groups, self.sparsity, self.scope)  # changes nothing unless training was stopped
        for layers in tied:
            for _, layer in layers:
                _settle(layer)
        return small
