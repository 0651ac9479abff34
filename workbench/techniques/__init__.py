"""One file a technique, grouped by family; `TECHNIQUES` lists them in the order of the notebooks."""

from workbench.techniques.distillation import (
    Distillation,
    DistillationFeatures,
    DistillationRelational,
    SelfDistillation,
)
from workbench.techniques.finetuning import FineTune
from workbench.techniques.low_rank import LowRank
from workbench.techniques.pruning import ChannelPruning, MagnitudePruning
from workbench.techniques.quantization import Quantization

TECHNIQUES = (
    LowRank,
    MagnitudePruning,
    ChannelPruning,
    Quantization,
    Distillation,
    DistillationFeatures,
    DistillationRelational,
    SelfDistillation,
)

__all__ = [
    "TECHNIQUES",
    "ChannelPruning",
    "Distillation",
    "DistillationFeatures",
    "DistillationRelational",
    "FineTune",
    "LowRank",
    "MagnitudePruning",
    "Quantization",
    "SelfDistillation",
]
