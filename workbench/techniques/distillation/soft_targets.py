"""Knowledge distillation: a small student learns from the softened answers of a trained teacher.

Idea: a teacher's wrong answers carry knowledge: an O looks more like a Q than like an M. Dividing the logits by a
temperature T before the softmax makes these small probabilities visible; the student is trained to match them.

Settings: `width`, the student's channels as part of the teacher's. `temperature` softens both answers.
`soft_weight`, the part of the loss that comes from the teacher; the rest comes from the labels, so at 0 the student
learns alone and is the control. `epochs` of training, and the `seed` of the student's first weights. `student`, any
model with as many classes, takes the place of the narrower teacher and starts from the weights that it has.

When it helps: students clearly smaller than the teacher, little or noisy data, long training. The student is an
ordinary dense model, so its file, its time and its memory all shrink, on every runtime.

When it does not: a student that is nearly as large, or data that are plentiful and clean: then training the same
student without a teacher does as well, which is why the control is shown beside it. It costs a training, not a
second.

Source: Hinton, Vinyals and Dean, 2015, arXiv:1503.02531.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from workbench.models import build, fingerprint, load_weights, weights_path
from workbench.surgery import clone
from workbench.technique import Technique, setting
from workbench.techniques.distillation.teaching import teach, temperature_setting
from workbench.training import Objective, soft_objective


@dataclass(frozen=True)
class Distillation(Technique):
    """Train a narrower student of the same kind, or one that you pass, on the teacher's softened answers."""

    family: ClassVar[str] = "distillation"
    source: ClassVar[str] = "Hinton et al., 2015, arXiv:1503.02531"
    trains: ClassVar[bool] = True

    width: float = setting(0.25, low=0.0625, high=0.5, step=0.0625, unit="of the teacher", neutral=1.0)
    temperature: float = temperature_setting()
    soft_weight: float = setting(0.9, low=0.0, high=1.0, step=0.05, unit="of the loss")
    epochs: int = setting(8, low=1, high=40, step=1, unit="epochs")
    seed: int = setting(0, low=0, high=9, step=1)
    student: nn.Module | None = field(default=None, repr=False)

    @property
    def is_neutral(self) -> bool:
        return self.student is None and super().is_neutral

    def untrained(self, model: nn.Module) -> nn.Module:
        """Return the student for `model` before training; raises ValueError if the workbench does not know its kind."""
        if self.student is not None:
            return clone(self.student)
        architecture = getattr(model, "architecture", None)
        if architecture is None:
            kind = type(model).__name__
            raise ValueError(
                f"{type(self).__name__} cannot build a narrower {kind}: it knows the models of build(). "
                f"Pass a student of your own: {type(self).__name__}(student=…)."
            )
        width = self.width * architecture["width"]
        return build(architecture["name"], width, architecture["classes"], seed=self.seed)

    def compress(self, model, data=None, watch=None):
        """Train a student on `data` and return it; at width 1, return a copy of the teacher.

        Raises ValueError without training images, or where student and teacher do not fit together. `watch(step)`
        returning False stops; the best student so far is returned.
        """
        if self.is_neutral:
            return clone(model)
        return teach(self.untrained(model), model, data, self, watch)

    def objective(self, student: nn.Module, teacher: nn.Module, example) -> tuple[nn.Module, Objective | None]:
        """Return what is trained (the student, or a module around it) and its loss; None for labels alone.

        `example`: images (B, C, H, W) that both can answer.
        """
        if self.soft_weight == 0:
            return student, None
        return student, soft_objective(teacher, self.temperature, self.soft_weight)

    def control(self):
        """Return the same student trained alone, from the same first weights for as many epochs."""
        shared = {name: getattr(self, name) for name in ("width", "temperature", "epochs", "seed", "student")}
        return Distillation(**shared, soft_weight=0.0)

    def shipped_path(self, model: nn.Module):
        """Return where a student with these settings would lie among the shipped weights."""
        suffix = f"student-{self.width:g}" if self.soft_weight else f"alone-{self.width:g}"
        return weights_path(model.architecture["name"], suffix)

    def recall(self, model):
        """Return the shipped student of exactly this teacher with exactly these settings, or None."""
        return self._shipped_student(model) or super().recall(model)

    def _shipped_student(self, model: nn.Module) -> nn.Module | None:
        if self.student is not None or not hasattr(model, "architecture") or not self.shipped_path(model).is_file():
            return None
        from safetensors import safe_open

        with safe_open(self.shipped_path(model), "pt") as file:
            note = {key: json.loads(value) for key, value in file.metadata().items()}
        if note["teacher"] != fingerprint(model) or note["settings"] != self.values():
            return None
        return load_weights(self.untrained(model), self.shipped_path(model))
