"""Float8: store weights as 8-bit floats, with one scale for each layer.

Idea: eight bits shared between exponent and fraction: E4M3 has 4 and 3, E5M2 has 5 and 2. Small numbers get small steps
and large ones large steps. One scale a layer puts its largest weight at the largest number of the type.

Settings: `format`, "e4m3" (finer) or "e5m2" (wider). `part`, how much of the weights is stored in 8 bits; the largest
layers come first.

When it helps: a quarter of the bytes without calibration, where weights spread over many sizes, so that the even steps
of an integer would lose the small ones. Recent graphics processors multiply it directly.

When it does not: on the processor. No CPU kernel here multiplies 8-bit floats: they are widened to fp32, so the file
shrinks and the time does not. Where weights of a channel are of one size, 8-bit integers with a scale for each channel
are more exact, and they do have kernels. Biases and BatchNorm stay in fp32.

Source: Micikevicius et al., 2022, arXiv:2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.technique import setting
from workbench.techniques.quantization.casting import Casting, largest_magnitude
from workbench.weights import Cast

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Float8(Casting):
    """Store weights as 8-bit floating-point numbers with a scale for each layer."""

    family: ClassVar[str] = "quantization"
    source: ClassVar[str] = "Micikevicius et al., 2022, arXiv:2209.05433"

    format: str = setting("e4m3", choices=tuple(FORMATS), help="Bits of the exponent and of the fraction.")

    def _short(self, name, weight):
        dtype = FORMATS[self.format]
        return Cast(dtype, largest_magnitude(weight) / torch.finfo(dtype).max)
