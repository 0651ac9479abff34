"""One file a technique, grouped by family; `TECHNIQUES` lists them in the order of the notebooks.

`KEEP_SIZE` lists those that make nothing smaller but bring accuracy, before or after the others.
"""

from workbench.techniques.clustering import WeightClustering
from workbench.techniques.coding import EntropyAwareTraining
from workbench.techniques.distillation import (
    Distillation,
    DistillationFeatures,
    DistillationRelational,
    SelfDistillation,
)
from workbench.techniques.finetuning import FineTune
from workbench.techniques.low_rank import CPDecomposition, LoRA, LowRank, Tucker
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
from workbench.techniques.quantization import (
    AWQ,
    GPTQ,
    AdaRound,
    BFloat16,
    Float8,
    Float16,
    MixedPrecision,
    NormalFloat4,
    Quantization,
    QuantizationAwareTraining,
)
from workbench.techniques.topology import DepthwiseSeparable, PointwiseConvolution

TECHNIQUES = (
    LowRank,
    Tucker,
    CPDecomposition,
    DepthwiseSeparable,
    PointwiseConvolution,
    MagnitudePruning,
    GradualPruning,
    MovementPruning,
    WeightDecayPruning,
    WandaPruning,
    SemiStructuredPruning,
    ChannelPruning,
    LayerDropping,
    WeightClustering,
    Quantization,
    AdaRound,
    GPTQ,
    AWQ,
    QuantizationAwareTraining,
    MixedPrecision,
    Float16,
    BFloat16,
    Float8,
    NormalFloat4,
    Distillation,
    DistillationFeatures,
    DistillationRelational,
    EntropyAwareTraining,
)

KEEP_SIZE = (SelfDistillation, FineTune, LoRA)

__all__ = ["KEEP_SIZE", "TECHNIQUES", *(technique.__name__ for technique in (*TECHNIQUES, *KEEP_SIZE))]
