"""Relational distillation: the student learns how the teacher arranges images, not where it puts each.

Idea: what the last layer reads is a map of the images. Which of them lie close together, and which three form a narrow
angle, says more than any single place. The student's map may have other coordinates, fewer dimensions and another
scale; only its distances, each relative to their mean, and its angles are trained to be those of the teacher.

Settings: those of `Distillation`; `distance_weight` and `angle_weight`, what the two errors add to the loss.
`soft_weight` adds soft answers too; by default labels take their place. With all three at 0 the student learns alone.

When it helps: students whose features have another width than the teacher's, since nothing needs translating; tasks
where likeness itself matters, such as retrieval.

When it does not: where a few classes say all that there is to say of an image, soft answers alone do as well. The
angles of a batch grow with the cube of its size.

Source: Park et al., 2019, arXiv:1904.05068.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.technique import setting
from workbench.techniques.distillation.soft_targets import Distillation
from workbench.techniques.distillation.teaching import Reader, hint_layer, read, read_alone
from workbench.training import distillation_loss


def relative_distances(features: Tensor) -> Tensor:
    """Return the distance of each pair of rows over their mean: (B, C) -> (B·(B-1)/2,)."""
    distances = F.pdist(features)
    return distances / distances.mean().clamp_min(1e-12)


def cosines(features: Tensor) -> Tensor:
    """Return the cosine of the angle at row i between rows j and k: (B, C) -> (B, B, B)."""
    towards = F.normalize(features[None] - features[:, None], dim=2)
    return torch.bmm(towards, towards.transpose(1, 2))


def relational_loss(student: Tensor, teacher: Tensor, distance_weight: float, angle_weight: float) -> Tensor:
    """Return the weighted Huber losses of relative distances and of angles; features (B, C) and (B, D).

    A batch of one image has neither. Source: Park et al., 2019, arXiv:1904.05068, equations 4 to 9.
    """
    loss = student.sum() * 0
    if distance_weight and len(student) > 1:
        loss = loss + distance_weight * F.smooth_l1_loss(relative_distances(student), relative_distances(teacher))
    if angle_weight and len(student) > 1:
        loss = loss + angle_weight * F.smooth_l1_loss(cosines(student), cosines(teacher))
    return loss


@dataclass(frozen=True)
class DistillationRelational(Distillation):
    """Train a student to arrange images as the teacher does: the same distances and angles."""

    source: ClassVar[str] = "Park et al., 2019, arXiv:1904.05068"

    soft_weight: float = setting(0.0, low=0.0, high=1.0, step=0.05, unit="of the loss")
    distance_weight: float = setting(1.0, low=0.0, high=50.0, step=0.5, help="What distances add to the loss.")
    angle_weight: float = setting(2.0, low=0.0, high=100.0, step=1.0, help="What angles add to the loss.")

    def objective(self, student, teacher, example):
        """Return the student, and the loss of labels or soft answers and of the relations in a batch."""
        if self.distance_weight == self.angle_weight == 0:
            return super().objective(student, teacher, example)
        ours, theirs = (Reader(net, hint_layer(net, example, depth=1)) for net in (student, teacher))

        def loss(model, images, labels):
            answers, features = read(model, ours, images)
            wisdom, hints = read_alone(teacher, theirs, images)
            relations = relational_loss(features.flatten(1), hints.flatten(1), self.distance_weight, self.angle_weight)
            return distillation_loss(answers, wisdom, labels, self.temperature, self.soft_weight) + relations

        return student, loss
