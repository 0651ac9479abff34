"""NormalFloat4: sixteen levels that suit a normal distribution, times the largest weight of each group.

Idea: trained weights are spread like a bell. Levels at the quantiles of a normal distribution are all used about
equally often, so 4 bits say more than with even steps. Every group of weights is divided by its largest magnitude,
which is stored beside it.

Settings: `group_size`, weights to a stored magnitude: small groups are more exact and cost more bytes. `part`, how
much of the weights is stored in 4 bits; the largest layers come first.

When it helps: 4 bits without calibration images or training, in layers whose weights look normal.

When it does not: on the processor. No CPU kernel here multiplies these levels: they are looked up and widened to
fp32, so the file shrinks and the time does not. The levels are not evenly spaced, so integer kernels cannot use them
either. GPTQ and AdaRound, which look at a layer's inputs, lose less at the same 4 bits. Biases and BatchNorm stay in
fp32.

Source: Dettmers et al., 2023 (QLoRA), arXiv:2305.14314.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from workbench.technique import setting
from workbench.techniques.quantization.casting import Casting
from workbench.weights import NormalFloat, split_groups


def group_magnitudes(weight: Tensor, group_size: int) -> Tensor:
    """Return the largest magnitude of every `group_size` numbers of the flattened weight, (groups,)."""
    return split_groups(weight.reshape(1, -1), group_size).abs().amax(1)


@dataclass(frozen=True)
class NormalFloat4(Casting):
    """Store weights as the 16 levels of NF4 with a magnitude for each group."""

    family: ClassVar[str] = "quantization"
    source: ClassVar[str] = "Dettmers et al., 2023, arXiv:2305.14314"

    group_size: int = setting(64, choices=(16, 32, 64, 128, 256), unit="weights", help="Weights to a stored magnitude.")

    def _short(self, name, weight):
        return NormalFloat(group_magnitudes(weight, self.group_size), self.group_size)
