"""One file a technique, grouped by family; `TECHNIQUES` lists them in the order of the notebooks."""

from workbench.techniques.distillation import (
    Distillation,
    DistillationFeatures,
    DistillationRelational,
    SelfDistillation,
)
from workbench.techniques.finetuning import FineTune
from workbench.techniques.low_rank import LowRank
from workbench.techniques.pruning import (
    ChannelPruning,
    GradualPruning,
    LayerDropping,
    MagnitudePruning,
    MovementPruning,
    SemiStructuredPruning,
    WandaPruning,
    WeightDecayPruning,
)
from workbench.techniques.quantization import Quantization

TECHNIQUES = (
    LowRank,
    MagnitudePruning,
    GradualPruning,
    MovementPruning,
    WeightDecayPruning,
    WandaPruning,
    SemiStructuredPruning,
    ChannelPruning,
    LayerDropping,
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
    "GradualPruning",
    "LayerDropping",
    "LowRank",
    "MagnitudePruning",
    "MovementPruning",
    "Quantization",
    "SelfDistillation",
    "SemiStructuredPruning",
    "WandaPruning",
    "WeightDecayPruning",
]
