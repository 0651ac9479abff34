"""Float16: store weights as 16-bit floats with 10 bits behind the point.

Idea: trained weights are small numbers of which three decimal digits are enough. IEEE half precision keeps 11
significant bits, from 6·10⁻⁸ to 65,504.

Settings: `part`, how much of the weights is stored in 16 bits; the largest layers come first.

When it helps: half the bytes of the weights, without calibration, training or a visible change of the outputs. Graphics
processors compute with it directly.

When it does not: the time on the processor. No CPU kernel here multiplies in half precision: the numbers are widened to
fp32 first. Biases and BatchNorm stay in fp32. A weight above 65,504 does not fit and is refused. At a quarter of the
bytes, 8-bit integers keep the accuracy too, and run on faster kernels.

Source: Micikevicius et al., 2018, arXiv:1710.03740.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.techniques.quantization.casting import Casting, largest_magnitude
from workbench.weights import Cast

MOST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Float16(Casting):
    """Store weights as IEEE half-precision numbers."""

    family: ClassVar[str] = "quantization"
    source: ClassVar[str] = "Micikevicius et al., 2018, arXiv:1710.03740"

    def _short(self, name, weight):
        most = float(largest_magnitude(weight))
        if most > MOST:
            raise ValueError(
                f"Float16: the weight of layer {name!r} reaches {most:g}, and float16 ends at {MOST:g}; use BFloat16, "
                "which has the range of fp32."
            )
        return Cast(torch.float16)
