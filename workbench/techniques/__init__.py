"""One file a technique, grouped by family; `TECHNIQUES` lists them in the order of the notebooks.

`KEEP_SIZE` lists those that make nothing smaller but bring accuracy, before or after the others.
"""

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
)
KEEP_SIZE = (SelfDistillation, FineTune)

__all__ = [
    "KEEP_SIZE",
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
