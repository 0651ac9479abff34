"""One file a technique, grouped by family; `TECHNIQUES` lists them in the order of the notebooks."""

from workbench.techniques.distillation import Distillation
from workbench.techniques.low_rank import LowRank
from workbench.techniques.pruning import ChannelPruning, MagnitudePruning
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

TECHNIQUES = (
    LowRank,
    MagnitudePruning,
    ChannelPruning,
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
)

__all__ = [
    "AWQ",
    "GPTQ",
    "TECHNIQUES",
    "AdaRound",
    "BFloat16",
    "ChannelPruning",
    "Distillation",
    "Float8",
    "Float16",
    "LowRank",
    "MagnitudePruning",
    "MixedPrecision",
    "NormalFloat4",
    "Quantization",
    "QuantizationAwareTraining",
]
