"""Wanda: prune by |weight| × the norm of the input that it is multiplied with, in one shot.

Idea: a small weight on a loud input can matter more than a large one on an input that is nearly always zero. So a
weight's score is its magnitude times the root of the summed squares of its input over some training images, and
scores are compared within each output row, since these weights feed one and the same sum. For a convolution, the
inputs are the patches under the kernel: one norm for each input channel and place in the kernel.

Settings: `sparsity`, the part of the weights removed from every row; each row keeps its best weight at least.
`finetune`, epochs of training afterwards. The norms come from 128 training images (or from the batch of images that
is passed as data) and are those of the whole model. Layers that are not called as layers, such as the output
projection inside an attention block, are pruned by magnitude alone.

When it helps: without fine-tuning, where inputs differ much in size. It was published for language models, in which a
few input features are far larger than all others; it takes one pass through the model and no gradient.

When it does not: where inputs are alike, as after BatchNorm; there it hardly differs from magnitude within a row.
Every row loses the same part, so small layers that need all of their weights suffer, which a global comparison
spares. Dense kernels gain no speed.

Source: Sun et al., 2024, arXiv:2306.11695.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.surgery import clone, identity, remembered
from workbench.technique import Technique, setting
from workbench.techniques.moments import watch_inputs
from workbench.techniques.pruning.masks import Tied, attach_masks, prunable
from workbench.techniques.repair import calibration_batches, finetune


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """Return |weight| × input norm, of the weight's shape; `squares`, summed over all inputs, broadcasts against it.

    Source: Sun et al., 2024, arXiv:2306.11695.
    """
    return weight.detach().float().abs() * squares.sqrt()


def row_ranks(scores: Tensor) -> Tensor:
    """Rank the scores (rows, …) within each row, 0 the smallest; int32 of the same shape."""
    rows = scores.flatten(1)
    order = rows.argsort(dim=1, stable=True)
    places = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device).expand(rows.shape)
    return torch.empty(rows.shape, dtype=torch.int32, device=rows.device).scatter_(1, order, places).view_as(scores)


def input_squares(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the sum of the squared inputs that each weight of `layer` meets on `x`; rows in one group share theirs.

    Linear: (1, inputs). Convolution: (groups, inputs / groups, kernel …): the gradient of a convolution of x² by its
    kernel is just this sum over patches, whatever the padding, stride and dilation.
    """
    squares = x.detach().float().square()
    if isinstance(layer, nn.Linear):
        return squares.flatten(0, -2).sum(0, keepdim=True)
    probe = torch.zeros(layer.groups, *layer.weight.shape[1:], device=x.device, requires_grad=True)
    with torch.enable_grad():
        total = layer._conv_forward(squares, probe, None).sum()
    return torch.autograd.grad(total, probe)[0]


def all_input_squares(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Run `batches` through `model` and return, by name, what `input_squares` sums to, one row for each output."""
    sums: dict[str, Tensor] = {}

    def note(name, layer, x):
        sums[name] = sums.get(name, 0) + input_squares(layer, x)

    watch_inputs(model, batches, note)
    return {name: _a_row_each(model.get_submodule(name), total) for name, total in sums.items()}


def _a_row_each(layer: nn.Module, squares: Tensor) -> Tensor:
    return squares.repeat_interleave(len(layer.weight) // len(squares), 0)


def calibration_scores(model: nn.Module, data: Any, technique: str) -> list[Tensor]:
    """Return the Wanda score of every weight in the order of `prunable`; layers that share one add up their inputs.

    Raises ValueError without images.
    """
    tied = prunable(model, technique)
    batches = [data] if isinstance(data, Tensor) else calibration_batches(model, data)
    if not batches:
        raise ValueError(
            f"{technique} weighs weights by the inputs that they meet, so it needs images: pass a data set from "
            "load_data, or a batch of images."
        )
    compute = lambda: (all_input_squares(clone(model), batches), data)
    squares, _ = remembered(model, ("input squares", identity(data)), compute)
    return [_tied_scores(layers, squares) for layers in tied]


def _tied_scores(layers: Tied, squares: dict[str, Tensor]) -> Tensor:
    met = [squares[name] for name, _ in layers if name in squares]
    return wanda_scores(layers[0][1].weight, torch.stack(met).sum(0) if met else torch.ones(()))


@dataclass(frozen=True)
class WandaPruning(Technique):
    """Remove from every output row the weights of smallest magnitude × input norm."""

    family: ClassVar[str] = "pruning"
    source: ClassVar[str] = "Sun et al., 2024, arXiv:2306.11695"

    sparsity: float = setting(0.5, low=0.0, high=0.98, step=0.02, unit="of weights removed", neutral=0.0)
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training after pruning.")

    def compress(self, model, data=None, watch=None):
        """Return a copy with masks on the weights.

        `data`: a `Data`, or one batch of images. Raises ValueError without images, if there is no weight to prune, or
        for NaN in one.
        """
        small = clone(model)
        if self.sparsity > 0:
            key = ("Wanda ranks", identity(data))
            ranked, _ = remembered(model, key, lambda: (self._ranked(model, data), data))
            attach_masks(prunable(small, type(self).__name__), [row_masks(rank, self.sparsity) for rank in ranked])
        return finetune(small, data, self.finetune, watch)

    def _ranked(self, model: nn.Module, data: Any) -> list[Tensor]:
        return [row_ranks(score) for score in calibration_scores(model, data, type(self).__name__)]


def row_masks(ranked: Tensor, sparsity: float) -> Tensor:
    """Return a boolean mask from `row_ranks`, false at the lowest `round(sparsity * columns)` of each row."""
    columns = ranked[0].numel()
    return ranked >= min(round(sparsity * columns), columns - 1)
