"""BFloat16: store weights as the upper 16 bits of their fp32 numbers.

Idea: keep the sign and the whole exponent of fp32, and 7 of the 23 bits behind the point. Nothing overflows, and
converting is cutting off (with rounding).

Settings: `part`, how much of the weights is stored in 16 bits; the largest layers come first.

When it helps: half the bytes of the weights, without calibration or training, for weights of any size. Processors with
AMX and most accelerators multiply it directly.

When it does not: the time measured here, since the runtimes are told to compute in fp32 where a model is not
quantized to integers, and no CPU kernel here reads these weights as they are stored. Its 8 significant bits are fewer
than float16 has, so where the range is no question float16 is the more exact. Biases and BatchNorm stay in fp32.

Source: Kalamkar et al., 2019, arXiv:1905.12322.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.techniques.quantization.casting import Casting
from workbench.weights import Cast


@dataclass(frozen=True)
class BFloat16(Casting):
    """Store weights as bfloat16 numbers."""

    family: ClassVar[str] = "quantization"
    source: ClassVar[str] = "Kalamkar et al., 2019, arXiv:1905.12322"

    @classmethod
    def title(cls):
        return cls.__name__  # one word

    def _short(self, name, weight):
        return Cast(torch.bfloat16)
