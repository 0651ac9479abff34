"""Quantization: store and compute with a few levels instead of 32-bit floats."""

from workbench.techniques.quantization.post_training import Quantization, weight_quantizer

__all__ = ["Quantization", "weight_quantizer"]
