"""Distillation of features: the student also learns what the teacher sees half-way, at a hint layer.

Idea: answers come late. A layer in the middle of the teacher holds what it has found in the image so far; the student
is trained to hold the same at the same depth. Its layer is narrower, so a regressor (a 1×1 convolution, or a
linear layer) translates; it is trained along and thrown away. Here hints and answers are learned in one training; the
paper trains up to the hint first.

Settings: those of `Distillation`; `hint_weight`, what the hint's squared error, in units of the teacher's variance,
adds to the loss; `depth`, how far along the layers the hint is taken: 1 is what the last layer reads.

When it helps: students that are deep, or so narrow that answers alone guide their early layers poorly.

When it does not: where the hint's layer is too narrow to hold what the teacher holds, the hint costs more than it
teaches. Student and teacher must both have maps, or both have vectors, at the hint. Soft answers alone are the simpler
control, and labels alone the other one.

Source: Romero et al., 2015 (FitNets), arXiv:1412.6550.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.technique import setting
from workbench.techniques.distillation.soft_targets import Distillation
from workbench.techniques.distillation.teaching import Reader, hint_layer, read, read_alone
from workbench.training import distillation_loss


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference of features in units of the teacher's variance; maps are pooled to one size.

    Both (B, C, H, W), or both (B, …, C) and equal in shape. Source: Romero et al., 2015, arXiv:1412.6550, equation 3.
    """
    if student.dim() == 4:
        size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
        student, teacher = (F.adaptive_avg_pool2d(maps, size) for maps in (student, teacher))
    return F.mse_loss(student, teacher) / teacher.var().clamp_min(1e-12)


def regressor(student: Tensor, teacher: Tensor) -> nn.Module:
    """Return the layer that translates the student's features into as many channels as the teacher's have.

    Raises ValueError where one has maps (B, C, H, W) and the other vectors, or sequences of another length.
    """
    places = (student.shape[1:-1], teacher.shape[1:-1]) if student.dim() != 4 else (0, 0)  # maps are pooled
    if student.dim() != teacher.dim() or places[0] != places[1]:
        shapes = f"{tuple(student.shape[1:])} and the teacher {tuple(teacher.shape[1:])}"
        raise ValueError(f"DistillationFeatures: at this depth the student reads {shapes}; choose another depth.")
    if student.dim() == 4:
        return nn.Conv2d(student.shape[1], teacher.shape[1], 1)
    return nn.Linear(student.shape[-1], teacher.shape[-1])


class _Hinted(nn.Module):
    """A student and the regressor that is trained with it; answers as the student does."""

    def __init__(self, student: nn.Module, regressor: nn.Module):
        super().__init__()
        self.student, self.regressor = student, regressor

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)


@dataclass(frozen=True)
class DistillationFeatures(Distillation):
    """Train a student on the teacher's answers and on its features at a hint layer."""

    source: ClassVar[str] = "Romero et al., 2015, arXiv:1412.6550"

    hint_weight: float = setting(1.0, low=0.0, high=10.0, step=0.5, help="What the hint's error adds to the loss.")
    depth: float = setting(
        0.5,
        low=0.25,
        high=1.0,
        step=0.25,
        unit="of the layers",
        help="Where the hint is read, if there is one.",
        applies=lambda values: values["hint_weight"] > 0,
    )

    def objective(self, student, teacher, example):
        """Return the student with its regressor, and the loss of answers and hint."""
        if self.hint_weight == 0:
            return super().objective(student, teacher, example)
        ours, theirs = (Reader(net, hint_layer(net, example, self.depth)) for net in (student, teacher))
        shapes = read_alone(student.eval(), ours, example)[1], read_alone(teacher, theirs, example)[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            translate = regressor(*shapes)

        def loss(model, images, labels):
            answers, features = read(model, ours, images)
            wisdom, hint = read_alone(teacher, theirs, images)
            soft = distillation_loss(answers, wisdom, labels, self.temperature, self.soft_weight)
            return soft + self.hint_weight * hint_loss(translate(features), hint)

        return _Hinted(student, translate), loss
