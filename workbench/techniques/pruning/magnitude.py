"""Magnitude pruning: set the smallest weights to zero.

Idea: a weight close to zero moves the output little, so the smallest ones go first. Sort all weights by absolute
value, and hold the lowest `sparsity` of them at zero with a mask that lies on the weight. The mask stays there during
fine-tuning, so pruned weights stay pruned.

Settings: `sparsity`, the part of the weights removed. `scope` "global" sorts the weights of all layers together, so
that layers with many small weights lose more; "layer" (also "uniform") removes the same part of every layer; "erk"
(Erdős–Rényi-Kernel) keeps of each layer a part in proportion to the sum of its sides over its size, so that small
layers stay nearly whole. `finetune`, epochs of training afterwards. No layer is ever emptied: its largest weight
stays.

When it helps: the file. Zeros take almost no bytes once the weights are coded, and large layers often lose 80 to 90 %
of their weights at little cost, more after fine-tuning.

When it does not: speed. A dense kernel multiplies by zero as slowly as by anything else, so latency and memory while
running stay as they were. (In eager mode max pooling may be quicker on the even planes that filters of zeros leave,
since its branches are foreseen; no product is saved.) Small networks and depthwise layers have few weights to spare,
and accuracy falls suddenly beyond some sparsity: look for the knee.

Source: Han et al., 2015, arXiv:1506.02626; for ERK Evci et al., 2020, arXiv:1911.11134.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from workbench.surgery import clone, remembered
from workbench.technique import Technique, setting
from workbench.techniques.pruning.masks import (
    Scoped,
    attach_mask,
    kept,
    prunable,
    ranks,
    scope_setting,
    scoped_ranks,
    used_weights,
)
from workbench.techniques.repair import finetune


def global_magnitude_mask(weights: list[Tensor], sparsity: float) -> list[Tensor]:
    """Return one boolean mask for each weight; together they are false at the `round(sparsity * total)` smallest."""
    removed = round(sparsity * sum(weight.numel() for weight in weights))
    return [rank >= removed for rank in ranks([weight.detach().abs() for weight in weights])]


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Return a boolean mask of the weight's shape, false at its `round(sparsity * size)` smallest entries.

    Exact for every sparsity from 0 to 1, with ties too. Source: Han et al., 2015, arXiv:1506.02626.
    """
    return global_magnitude_mask([weight], sparsity)[0]


@dataclass(frozen=True)
class MagnitudePruning(Scoped, Technique):
    """Set the weights of smallest magnitude to zero."""

    family: ClassVar[str] = "pruning"
    source: ClassVar[str] = "Han et al., 2015, arXiv:1506.02626"

    sparsity: float = setting(0.5, low=0.0, high=0.98, step=0.02, unit="of weights removed", neutral=0.0)
    scope: str = scope_setting()
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training after pruning.")

    def compress(self, model, data=None, watch=None):
        """Return a copy with masks on the weights; raises ValueError if there is no weight to prune, or NaN in one."""
        small = clone(model)
        if self.sparsity > 0:
            for name, mask in self.masks(model).items():
                attach_mask(small.get_submodule(name), mask)
        return finetune(small, data, self.finetune, watch)

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the boolean mask of each linear and convolution layer by name, true where a weight is kept."""
        names, ranked = remembered(model, ("magnitude ranks", self.scope), lambda: _ranked(model, self.scope))
        masks = kept(ranked, self.sparsity, self.scope)
        return {name: mask for mask, tied in zip(masks, names, strict=True) for name in tied}


def _ranked(model: nn.Module, scope: str) -> tuple[list[list[str]], list[Tensor]]:
    """Return the names of the layers that share each weight, and the ranks of its magnitudes."""
    tied = prunable(model, "MagnitudePruning")
    magnitudes = [weight.abs() for weight in used_weights(tied)]
    return [[name for name, _ in layers] for layers in tied], scoped_ranks(magnitudes, scope)
