"""Quantization: store and compute with a few levels instead of 32-bit floats."""

from workbench.techniques.quantization.adaround import AdaRound
from workbench.techniques.quantization.awq import AWQ
from workbench.techniques.quantization.bfloat16 import BFloat16
from workbench.techniques.quantization.float8 import Float8
from workbench.techniques.quantization.float16 import Float16
from workbench.techniques.quantization.gptq import GPTQ
from workbench.techniques.quantization.mixed_precision import MixedPrecision
from workbench.techniques.quantization.normal_float import NormalFloat4
from workbench.techniques.quantization.post_training import Quantization, weight_quantizer
from workbench.techniques.quantization.training_aware import QuantizationAwareTraining

__all__ = [
    "AWQ",
    "GPTQ",
    "AdaRound",
    "BFloat16",
    "Float8",
    "Float16",
    "MixedPrecision",
    "NormalFloat4",
    "Quantization",
    "QuantizationAwareTraining",
    "weight_quantizer",
]
