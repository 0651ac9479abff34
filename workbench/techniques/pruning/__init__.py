"""Pruning: remove single weights, or whole channels."""

from workbench.techniques.pruning.magnitude import MagnitudePruning, magnitude_mask

__all__ = ["MagnitudePruning", "magnitude_mask"]
