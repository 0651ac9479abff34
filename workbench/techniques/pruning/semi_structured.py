"""Semi-structured pruning: of every M neighbouring inputs, keep the N weights that matter most.

Idea: zeros at free places need an index each, and no dense kernel can skip them. If exactly N of M neighbours along
the input axis stay, their places take a few bits, and a multiplier can be built that reads only them. 2:4 (two of
every four) is what NVIDIA's sparse tensor cores take.

Settings: `pattern`, N:M. `criterion`, "magnitude", or "wanda" for magnitude × the norm of the input on 128 training
images. `finetune`, epochs of training afterwards, with the masks as they are. For a convolution the neighbours are
input channels at one place of the kernel. Inputs that do not fill a group of M count as if zeros filled it: a layer
with at most N inputs loses nothing.

When it helps: half of the weights at little cost in accuracy, less than with whole channels, and an index that costs
fewer bits than that of free zeros. On NVIDIA GPUs from Ampere on, 2:4 in half precision can run on sparse tensor
cores: the runtime `cuda 2:4` does so for linear layers and 1×1 convolutions whose widths are multiples of 16.

When it does not: everywhere else. Only sparse tensor cores run it faster, and small layers and batches gain nothing
there either (pytorch/pytorch#111339); a CPU gains nothing but bytes, since its dense kernels multiply zeros like
anything else. At the same sparsity, magnitude pruning without the pattern keeps more accuracy. N:M other than 2:4 (and
1:2 in float32) has no hardware.

Sources: Mishra et al., 2021, arXiv:2104.08378; Zhou et al., 2021, arXiv:2102.04010.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.surgery import clone, identity, remembered
from workbench.technique import Technique, setting
from workbench.techniques.pruning.masks import attach_masks, prunable, used_weights
from workbench.techniques.pruning.wanda import calibration_scores
from workbench.techniques.repair import finetune

PATTERNS = ("3:4", "4:8", "2:4", "1:2", "1:4", "1:8", "1:16")


def n_m_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Return a boolean mask of the shape of `scores` (outputs, inputs, kernel …), true at the `n` largest of each `m`.

    Groups are `m` neighbours along dimension 1, and a last group that is not full keeps at most `n`; among equals the
    later stays. Raises ValueError unless 1 ≤ n ≤ m. Source: Mishra et al., 2021, arXiv:2104.08378.
    """
    if not 1 <= n <= m:
        raise ValueError(f"N:M is {n}:{m}; of every M weights N stay, so N goes from 1 to M.")
    inputs = scores.shape[1]
    rows = F.pad(scores.detach().float().movedim(1, -1), (0, -inputs % m), value=-torch.inf)
    groups = rows.unflatten(-1, (-1, m))
    mask = torch.zeros_like(groups, dtype=torch.bool)
    mask.scatter_(-1, groups.argsort(dim=-1, stable=True)[..., m - n :], True)
    return mask.flatten(-2)[..., :inputs].movedim(-1, 1).contiguous()  # else convolutions would sum in another order


@dataclass(frozen=True)
class SemiStructuredPruning(Technique):
    """Keep N of every M neighbouring weights along the input axis."""

    family: ClassVar[str] = "pruning"
    source: ClassVar[str] = "Mishra et al., 2021, arXiv:2104.08378"

    pattern: str = setting("2:4", choices=PATTERNS, neutral="dense", help="N:M, the weights kept of each group.")
    criterion: str = setting("magnitude", choices=("magnitude", "wanda"), help="Magnitude, or × input norm.")
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training after pruning.")

    def compress(self, model, data=None, watch=None):
        """Return a copy with N:M masks on the weights.

        `data`: a `Data`, or for "wanda" also one batch of images. Raises ValueError if there is no weight to prune, for
        NaN in one, or without images where they are needed.
        """
        small = clone(model)
        if self.pattern != "dense":
            key = ("N:M masks", self.pattern, self.criterion, identity(data) if self.criterion == "wanda" else None)
            masks, _ = remembered(model, key, lambda: (self._masks(model, data), data))
            attach_masks(prunable(small, type(self).__name__), masks)
        return finetune(small, data, self.finetune, watch)

    def _masks(self, model: nn.Module, data: Any) -> list[Tensor]:
        n, m = map(int, self.pattern.split(":"))
        if self.criterion == "wanda":
            scores = calibration_scores(model, data, type(self).__name__)
        else:
            scores = [weight.abs() for weight in used_weights(prunable(model, type(self).__name__))]
        return [n_m_mask(score, n, m) for score in scores]
