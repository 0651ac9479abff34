"""GPTQ: round the inputs of a layer one by one, and let those not yet rounded make up for the error.

Idea: rounding to nearest treats every weight alone. GPTQ goes through the columns of the weight (the inputs); after
rounding one it changes all later ones so that the outputs on calibration images move least. What to change follows from
the inverse of the inputs' second moment, decomposed once.

Settings: `weight_bits`. `granularity` "channel" or "group", with `group_size` weights to a scale. `order` "activation"
rounds the inputs of most energy first, while there are many left to make up for them; "given" takes them as they come.

When it helps: 3 and 4 bits for weights without any training; at 2 bits it still saves much of what the nearest level
loses.

When it does not: at 8 bits there is nothing to make up for. Activations stay in fp32: add
Quantization(weight_bits=32) behind it. No kernel here computes with fewer than 8 bits, so the file shrinks and the
time does not. Grouped convolutions, and layers whose weight is coded already, are rounded to nearest. The inputs are
those of the full network, not of the layers rounded so far.

Source: Frantar et al., 2023, arXiv:2210.17323.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.technique import setting
from workbench.techniques.quantization.layerwise import LayerwiseRounding, damped
from workbench.weights import FakeQuantize

BLOCK = 64


def inverse_factor(moment: Tensor) -> Tensor:
    """Return the upper triangular U (n, n), float32, with Uᵀ·U the inverse of the damped `moment` (n, n)."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moment)))
    return torch.linalg.cholesky(inverse, upper=True).float()


def gptq(
    weight: Tensor, factor: Tensor, quantizers: Sequence[FakeQuantize], order: Tensor | None = None
) -> list[Tensor]:
    """Return the codes (m, n), int8, of `weight` rounded column by column, for each of the symmetric `quantizers`.

    `factor`: `inverse_factor` of the inputs' second moment, its inputs in the order in which they are rounded.
    `order`: int64 (n,), that order. Zeros stay zero. All quantizers are served in one pass, which takes little more
    time than one. Source: Frantar et al., 2023, arXiv:2210.17323, algorithm 1.
    """
    order = torch.arange(weight.shape[1]) if order is None else order
    sideways = lambda values: values.expand(weight.shape).T[order]  # (n, m): what is a column there is a row here
    columns = sideways(weight).repeat(1, len(quantizers))
    scale = torch.cat([sideways(q.along_weight(q.scale, weight.shape)) for q in quantizers], 1)
    most = torch.cat([weight.new_full((len(weight),), q.quant_max) for q in quantizers])
    most = torch.where(columns == 0, 0.0, most)
    codes = torch.empty_like(columns)
    for start in range(0, len(columns), BLOCK):
        block, later = slice(start, start + BLOCK), slice(start + BLOCK, None)
        errors = _round_block(columns[block], scale[block], most[block], factor[block, block], codes[block])
        columns[later].addmm_(factor[block, later].T, errors, alpha=-1)
    back = order.argsort()
    return [part[back].T.to(torch.int8) for part in codes.split(len(weight), 1)]


def _round_block(columns: Tensor, scale: Tensor, most: Tensor, factor: Tensor, codes: Tensor) -> Tensor:
    """Round a block of columns into `codes`, each making up for those before; return the errors left to later ones."""
    inverse, least, errors = 1 / scale, -most, torch.empty_like(columns)
    for i, diagonal in enumerate(factor.diagonal().tolist()):
        torch.mul(columns[i], inverse[i], out=codes[i])
        torch.clamp(codes[i].round_(), least[i], most[i], out=codes[i])
        torch.addcmul(columns[i], codes[i], scale[i], value=-1, out=errors[i]).div_(diagonal)
        columns[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return errors


@dataclass(frozen=True)
class GPTQ(LayerwiseRounding):
    """Round weights column by column, each later column making up for the error so far."""

    family: ClassVar[str] = "quantization"
    source: ClassVar[str] = "Frantar et al., 2023, arXiv:2210.17323"

    order: str = setting(
        "activation", choices=("activation", "given"), help="Round the inputs of most energy first, or as they come."
    )

    def _values(self, model, name, weight, moments, quantizer):
        key = ("gptq", name, self.granularity, self.group_size, self.order)
        codes = moments.derive(key, lambda: self._all_codes(model, name, weight, moments[name]))
        return codes[self.weight_bits].float() * quantizer.along_weight(quantizer.scale, weight.shape)

    def _all_codes(self, model: nn.Module, name: str, weight: Tensor, moment: Tensor) -> dict[int, Tensor]:
        """Return the codes for all numbers of bits at once, so that moving the slider is quick."""
        energy = moment.diagonal()
        order = torch.arange(len(energy))
        if self.order == "activation":
            order = energy.argsort(descending=True, stable=True)
        bits = range(2, 9)
        quantizers = [replace(self, weight_bits=b).quantizer(model, name) for b in bits]
        factor = inverse_factor(moment[order][:, order])
        return dict(zip(bits, gptq(weight, factor, quantizers, order), strict=True))
