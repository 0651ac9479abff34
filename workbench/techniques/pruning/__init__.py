"""Pruning: remove single weights, or whole channels."""

from workbench.techniques.pruning.channel import ChannelPruning
from workbench.techniques.pruning.magnitude import MagnitudePruning, magnitude_mask

__all__ = ["ChannelPruning", "MagnitudePruning", "magnitude_mask"]
