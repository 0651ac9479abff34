"""Weight decay pruning: train with strong decay first, so that the weights that are not needed shrink, then cut them.

Idea: decay pulls every weight towards zero in each step; only the weights that the loss needs hold out against it.
After some epochs of this, magnitude tells needed from unneeded far more clearly. Then the smallest are masked, and a
second training with ordinary decay repairs what the cut and the pull have done.

Settings: `sparsity`, the part of the weights removed. `decay`, the strength of the pull in the first training, in
units of AdamW: each step takes learning rate × decay off every weight. `scope`, among which weights magnitudes are
compared: "global", "layer" (also "uniform") or "erk". `epochs` of training with decay, `finetune` epochs after the
cut. `seed` of the order of the images. Stopped early, the cut is made at once.

When it helps: networks that were trained with little decay, and so carry many middling weights that nothing needs.

When it does not: where BatchNorm follows a convolution, since it undoes any common shrinking of its weights: decay
then changes only which weights are small, slowly. Too much decay takes accuracy that tuning does not bring back; too
little is plain magnitude pruning with a longer training. Dense kernels gain no speed.

Sources: Hanson and Pratt, 1988 (NIPS 1); Han et al., 2015, arXiv:1506.02626; decoupled decay: Loshchilov and Hutter,
2019, arXiv:1711.05101.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workbench.surgery import clone
from workbench.technique import Technique, setting
from workbench.techniques.pruning.gradual import prune_smallest
from workbench.techniques.pruning.masks import Scoped, attach_masks, prunable, scope_setting, used_weights
from workbench.techniques.repair import Trainings


@dataclass(frozen=True)
class WeightDecayPruning(Scoped, Technique):
    """Train with strong weight decay, cut the weights that became small, and tune."""

    family: ClassVar[str] = "pruning"
    source: ClassVar[str] = "Han et al., 2015, arXiv:1506.02626"
    trains: ClassVar[bool] = True

    sparsity: float = setting(0.8, low=0.0, high=0.98, step=0.02, unit="of weights removed", neutral=0.0)
    decay: float = setting(4.0, low=0.0, high=20.0, step=0.5, unit="per step and learning rate")
    scope: str = scope_setting()
    epochs: int = setting(1, low=1, high=20, step=1, unit="epochs", help="Training with decay.")
    finetune: int = setting(1, low=0, high=20, step=1, unit="epochs", neutral=0, help="Training after the cut.")
    seed: int = setting(0, low=0, high=9, step=1)

    def compress(self, model, data=None, watch=None):
        """Train a copy on `data` with decay, mask and tune it; at sparsity 0, return an untrained copy.

        Raises ValueError without training images, for half precision, or if there is no weight to prune.
        """
        small = clone(model)
        if self.sparsity == 0:
            return small
        tied = prunable(small, type(self).__name__)
        attach_masks(tied, [weight != 0 for weight in used_weights(tied)])  # zeros stay zero
        trainings = Trainings(watch, self.epochs + self.finetune)
        forget = lambda number, steps: True  # decay costs accuracy, and the weights shall be the last ones
        options = {"weight_decay": self.decay, "each_step": forget}
        trainings.finetune(small, data, self.epochs, seed=self.seed, **options)
        prune_smallest(tied, self.sparsity, self.scope)
        return trainings.finetune(small, data, self.finetune, seed=self.seed + self.epochs)

    def recall(self, model):
        """Return a copy where nothing is to be trained, else the shipped result or None."""
        return clone(model) if self.sparsity == 0 else super().recall(model)
