"""Fine-tuning: train on after a cut, with whatever lies on the weights staying there.

Idea: a compressed network is a good start, not a good end. A few epochs at a small learning rate move the weights that
are left to where they serve best. Masks, quantizers and codebooks are parametrizations, so gradients pass through
them: pruned weights stay at zero, rounded ones stay rounded, and a codebook's levels move while its symbols stay.

Settings: `epochs` of training. `learning_rate`, the peak of its one-cycle schedule. `soft_weight`, the part of the loss
that comes from the answers of a teacher: in a pipeline the model given to it, alone the model as it was before. At 0
labels alone count, which is the control. `temperature` softens the teacher's answers. `seed` of the order of images.

When it helps: after every cut that cost accuracy, and between two stages of a pipeline, so that each starts from a
healthy network.

When it does not: on a network that lost nothing; there it mostly fits the training images better. It makes
nothing smaller: bytes and milliseconds stay as they are. It costs a training, not a second. After masks have
been baked into plain weights it fills their zeros again; a pipeline's report says so.

Source: Han et al., 2015, arXiv:1506.02626; with a teacher Hinton et al., 2015, arXiv:1503.02531.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import nn

from workbench.surgery import clone
from workbench.technique import Technique, setting
from workbench.techniques.distillation.teaching import temperature_setting
from workbench.techniques.repair import finetune


@dataclass(frozen=True)
class FineTune(Technique):
    """Train the model on for a few epochs, from labels and, if wanted, from what it could before it was compressed."""

    family: ClassVar[str] = "repair"
    source: ClassVar[str] = "Han et al., 2015, arXiv:1506.02626; Hinton et al., 2015, arXiv:1503.02531"
    trains: ClassVar[bool] = True

    epochs: int = setting(2, low=0, high=40, step=1, unit="epochs", neutral=0)
    learning_rate: float = setting(1e-3, choices=(1e-4, 3e-4, 1e-3, 3e-3), help="The peak of the schedule.")
    soft_weight: float = setting(0.0, low=0.0, high=1.0, step=0.05, unit="of the loss")
    temperature: float = temperature_setting()
    seed: int = setting(0, low=0, high=9, step=1)
    teacher: nn.Module | None = field(default=None, repr=False, compare=False)

    def compress(self, model, data=None, watch=None):
        """Return a trained copy; raises ValueError without training images, or where weights are not float32.

        `watch(step)` returning False stops; the best weights so far are returned.
        """
        small = clone(model)
        if self.is_neutral:
            return small
        teacher = model if self.teacher is None else self.teacher
        return finetune(
            small,
            data,
            self.epochs,
            watch,
            learning_rate=self.learning_rate,
            seed=self.seed,
            teacher=clone(teacher).float() if self.soft_weight else None,
            temperature=self.temperature,
            soft_weight=self.soft_weight,
        )

    def control(self):
        """Return the same training without a teacher."""
        return replace(self, soft_weight=0.0)

    def within(self, original):
        """Learn from the model given to the pipeline, unless a teacher was passed."""
        return self if self.teacher is not None else replace(self, teacher=original)
