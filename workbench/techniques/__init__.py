"""One file a technique, grouped by family; `TECHNIQUES` lists them in the order of the notebooks."""

from workbench.techniques.coding import EntropyAwareTraining
from workbench.techniques.distillation import Distillation
from workbench.techniques.low_rank import LowRank
from workbench.techniques.pruning import ChannelPruning, MagnitudePruning
from workbench.techniques.quantization import Quantization

TECHNIQUES = (LowRank, MagnitudePruning, ChannelPruning, Quantization, EntropyAwareTraining, Distillation)

__all__ = [
    "TECHNIQUES",
    "ChannelPruning",
    "Distillation",
    "EntropyAwareTraining",
    "LowRank",
    "MagnitudePruning",
    "Quantization",
]
