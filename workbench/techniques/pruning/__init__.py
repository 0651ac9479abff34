"""Pruning: remove single weights, some of every few neighbours, whole channels, or whole layers."""

from workbench.techniques.pruning.channel import ChannelPruning
from workbench.techniques.pruning.gradual import GradualPruning
from workbench.techniques.pruning.layer_dropping import LayerDropping
from workbench.techniques.pruning.magnitude import MagnitudePruning, magnitude_mask
from workbench.techniques.pruning.movement import MovementPruning
from workbench.techniques.pruning.semi_structured import SemiStructuredPruning, n_m_mask
from workbench.techniques.pruning.wanda import WandaPruning
from workbench.techniques.pruning.weight_decay import WeightDecayPruning

__all__ = [
    "ChannelPruning",
    "GradualPruning",
    "LayerDropping",
    "MagnitudePruning",
    "MovementPruning",
    "SemiStructuredPruning",
    "WandaPruning",
    "WeightDecayPruning",
    "magnitude_mask",
    "n_m_mask",
]
