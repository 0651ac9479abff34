"""Self-distillation: a student of the teacher's own size learns from it, and often becomes the better of the two.

Idea: a network that learns from labels alone is told one right answer an image. Its twin, started from fresh weights,
is told by the trained one how likely every answer is. Nothing gets smaller; the second network is a better start for
what follows.

Settings: `temperature` softens both answers; `soft_weight`, the part of the loss that comes from the teacher, at 0 the
twin learns from labels alone and is the control; `epochs` of training; `seed` of the first weights.

When it helps: before compression, where the training of the model can be repeated in full.

When it does not: with fewer epochs than the teacher had; then the twin ends below it. What lies on the teacher's
weights (masks, quantizers) is not handed on, so it comes first in a pipeline. It costs a whole training.

Source: Furlanello et al., 2018 (born-again networks), arXiv:1805.04770.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from workbench.surgery import clone
from workbench.technique import Technique, setting
from workbench.techniques.distillation.teaching import teach, temperature_setting
from workbench.training import soft_objective
from workbench.weights import bake_weights


def fresh(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a copy of the model with first weights as its layers draw them, nothing stacked on them.

    Raises ValueError where a layer holds numbers of its own and does not say how they begin.
    """
    twin = bake_weights(clone(model)).float().requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in twin.named_modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
            elif next(layer.parameters(recurse=False), None) is not None:
                kind = type(layer).__name__
                raise ValueError(
                    f"SelfDistillation cannot start layer {name!r} ({kind}) anew: it has no reset_parameters(). Build "
                    "the twin yourself: Distillation(student=…)."
                )
    return twin


@dataclass(frozen=True)
class SelfDistillation(Technique):
    """Train a network of the same size anew on the softened answers of the given one."""

    family: ClassVar[str] = "distillation"
    source: ClassVar[str] = "Furlanello et al., 2018, arXiv:1805.04770"
    trains: ClassVar[bool] = True

    epochs: int = setting(8, low=0, high=40, step=1, unit="epochs", neutral=0)
    temperature: float = temperature_setting()
    soft_weight: float = setting(0.9, low=0.0, high=1.0, step=0.05, unit="of the loss")
    seed: int = setting(0, low=0, high=9, step=1)

    def compress(self, model, data=None, watch=None):
        """Return the twin, trained; raises ValueError without training images, or if the model cannot begin anew.

        `watch(step)` returning False stops; the best twin so far is returned.
        """
        return clone(model) if self.is_neutral else teach(fresh(model, self.seed), model, data, self, watch)

    def objective(self, student, teacher, example):
        """Return the twin and its loss; None for labels alone."""
        return student, soft_objective(teacher, self.temperature, self.soft_weight) if self.soft_weight else None

    def control(self):
        """Return the same twin trained on labels alone."""
        return replace(self, soft_weight=0.0)
