"""Techniques that make the coded file smaller: what entropy coding can use."""

from workbench.techniques.coding.entropy_aware import EntropyAwareTraining

__all__ = ["EntropyAwareTraining"]
