"""Distillation: train a small model on the answers of a large one."""

from workbench.techniques.distillation.soft_targets import Distillation

__all__ = ["Distillation"]
