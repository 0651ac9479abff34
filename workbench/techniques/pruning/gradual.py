"""Gradual pruning: train on while the smallest weights go, a few at a time.

Idea: a network that loses many weights at once must repair everything at once. Here the mask grows during training,
quickly while there is much to spare and ever more slowly towards the end, after the cubic schedule s(t) = s · (1 − (1
− t)³). Between two cuts the weights that stay take over the work of those that went. The second half of the training
leaves the mask as it is.

Settings: `sparsity`, the part of the weights removed at the end. `scope`, among which weights magnitudes are
compared: "global", "layer" (also "uniform") or "erk". `epochs` of training; the mask grows during the first half of
them. `seed` of the order of the images. Stopped early, the rest is cut at once and not repaired.

When it helps: high sparsities, where pruning at once and tuning afterwards loses more than training can repair.

When it does not: low sparsities and short trainings. Half of the training is spent on the way to the sparsity, so
that magnitude pruning at once, tuned for as many epochs, may do as well or better: compare the two. Weights that went
never come back. Only the file gains: dense kernels take as long for zeros.

Source: Zhu and Gupta, 2017, arXiv:1710.01878.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.surgery import clone
from workbench.technique import Technique, setting
from workbench.techniques.pruning.masks import (
    Scoped,
    Tied,
    attach_masks,
    cubic_sparsity,
    kept,
    prunable,
    ramp_part,
    scope_setting,
    scoped_ranks,
    used_weights,
)
from workbench.techniques.repair import finetune


def prune_smallest(tied: list[Tied], sparsity: float, scope: str) -> None:
    """Narrow the masks of the layers to `sparsity`; weights that are masked already are the smallest of all."""
    with torch.no_grad():
        ranked = scoped_ranks([weight.abs() for weight in used_weights(tied)], scope)
    attach_masks(tied, kept(ranked, sparsity, scope))


@dataclass(frozen=True)
class GradualPruning(Scoped, Technique):
    """Train on while the mask on the smallest weights grows by a cubic schedule."""

    family: ClassVar[str] = "pruning"
    source: ClassVar[str] = "Zhu and Gupta, 2017, arXiv:1710.01878"
    trains: ClassVar[bool] = True

    sparsity: float = setting(0.8, low=0.0, high=0.98, step=0.02, unit="of weights removed", neutral=0.0)
    scope: str = scope_setting()
    epochs: int = setting(2, low=1, high=20, step=1, unit="epochs")
    seed: int = setting(0, low=0, high=9, step=1)

    def compress(self, model, data=None, watch=None):
        """Train a copy on `data` with growing masks and return it; at sparsity 0, return an untrained copy.

        Raises ValueError without training images, for half precision, or if there is no weight to prune.
        """
        small = clone(model)
        if self.is_neutral:
            return small
        tied = prunable(small, type(self).__name__)
        attach_masks(tied, [weight != 0 for weight in used_weights(tied)])  # zeros stay zero

        def each_step(number, steps):
            done = ramp_part(number, steps)
            if done is not None:
                prune_smallest(tied, cubic_sparsity(done, self.sparsity), self.scope)
            return done is not None

        finetune(small, data, self.epochs, watch, seed=self.seed, each_step=each_step)
        prune_smallest(tied, self.sparsity, self.scope)  # changes nothing unless training was stopped
        return small
