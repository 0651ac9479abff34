"""Distillation: train a small model on what a large one knows."""

from workbench.techniques.distillation.born_again import SelfDistillation
from workbench.techniques.distillation.features import DistillationFeatures
from workbench.techniques.distillation.relational import DistillationRelational
from workbench.techniques.distillation.soft_targets import Distillation

__all__ = ["Distillation", "DistillationFeatures", "DistillationRelational", "SelfDistillation"]
