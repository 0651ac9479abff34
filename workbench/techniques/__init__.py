"""One file a technique, grouped by family; `TECHNIQUES` lists them in the order of the notebooks."""

from workbench.techniques.distillation import Distillation
from workbench.techniques.low_rank import CPDecomposition, LoRA, LowRank, Tucker
from workbench.techniques.pruning import ChannelPruning, MagnitudePruning
from workbench.techniques.quantization import Quantization
from workbench.techniques.topology import DepthwiseSeparable, PointwiseConvolution

TECHNIQUES = (
    LowRank,
    Tucker,
    CPDecomposition,
    DepthwiseSeparable,
    PointwiseConvolution,
    LoRA,
    MagnitudePruning,
    ChannelPruning,
    Quantization,
    Distillation,
)

__all__ = ["TECHNIQUES", *(technique.__name__ for technique in TECHNIQUES)]
