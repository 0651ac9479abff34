"""Low rank through the singular value decomposition: replace a layer by two thinner ones.

Idea: a weight of m × n has min(m, n) singular values, and often only a few of them are large. Keeping the largest r
gives the best approximation of rank r in the Frobenius norm (Eckart and Young, 1936), stored and computed as two
factors with r·(m + n) numbers instead of m·n. A convolution becomes one with r filters of the same spatial kernel,
followed by a 1×1 convolution.

Settings: `rank`, the part of the full rank that is kept in every layer. A layer whose two factors would hold more
numbers than it has now is left alone. `objective` says what is approximated: "weights", or the layer's "outputs" on 128
training images, where directions that the inputs hardly use cost nothing. `recalibrate` measures the statistics of
BatchNorm anew. `finetune`, epochs of training afterwards.

When it helps: wide layers whose inputs or weights use few directions: fully connected layers, and convolutions with
many channels. The factors are dense, so every runtime gains.

When it does not: small layers and 1×1 convolutions of few channels gain nothing, since two kernels must be launched and
an intermediate result written where there was one. The weights of a compact convolutional network have nearly full
rank: with the objective "weights" its accuracy falls at once, and below some rank with either.

Sources: Denton et al., 2014, arXiv:1404.0736; for outputs Zhang et al., 2015, arXiv:1505.06798.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.surgery import clone, remembered, replace_layer, weighted_layers
from workbench.technique import Technique, setting
from workbench.techniques.moments import second_moments
from workbench.techniques.repair import calibration_batches, finetune, recalibrate
from workbench.weights import finite_weight

Factors = tuple[Tensor, Tensor, Tensor]


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return `left` (m, rank) and `right` (rank, n) whose product is the best approximation of `weight` (m, n).

    Raises ValueError for a rank below 1 or above min(m, n). Source: Eckart and Young, 1936, doi:10.1007/BF02288367.
    """
    full = min(weight.shape)
    if not 1 <= rank <= full:
        raise ValueError(f"rank is {rank}; a weight of {weight.shape[0]}×{weight.shape[1]} has ranks 1 to {full}.")
    return _cut(torch.linalg.svd(weight, full_matrices=False), rank)


def _cut(factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """Keep the first `rank` singular triplets, their values shared evenly between the two factors."""
    u, s, v = factors
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def kept_rank(layer: nn.Module, fraction: float) -> int | None:
    """Return how many singular values to keep, or None where two factors would not be smaller than the layer."""
    if not _can_factor(layer):
        return None
    rows = layer.weight.shape[0]
    columns = layer.weight.numel() // rows
    rank = max(1, round(fraction * min(rows, columns)))
    return rank if rank * (rows + columns) < rows * columns else None


def _can_factor(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or getattr(layer, "groups", 0) == 1


def factored(layer: nn.Module, left: Tensor, right: Tensor) -> nn.Sequential:
    """Return two layers that apply `right` (rank, n) and then `left` (m, rank) in place of `layer`."""
    rank = right.shape[0]
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, rank, bias=False)
        second = nn.Linear(rank, layer.out_features, bias=bias)
    else:
        kind = type(layer)
        shape = {
            name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        }
        first = kind(layer.in_channels, rank, bias=False, **shape)
        second = kind(rank, layer.out_channels, 1, bias=bias)
    pair = nn.Sequential(first, second).to(layer.weight)
    with torch.no_grad():
        first.weight.copy_(right.reshape(first.weight.shape))
        second.weight.copy_(left.reshape(second.weight.shape))
        if bias:
            second.bias.copy_(layer.bias)
    return pair.train(layer.training)


def _factors(weight: Tensor, moment: Tensor | None) -> Factors:
    """Decompose `weight` (m, n) so that cutting it keeps the weight best, or with `moment` (n, n) its outputs.

    The mean squared error of outputs is the Frobenius norm of (W - W') L where L·Lᵀ is the second moment of the inputs:
    so W·L is decomposed, and L taken out of the right factor again.
    """
    if moment is None:
        return torch.linalg.svd(weight, full_matrices=False)
    ridge = 1e-4 * moment.diagonal().mean().clamp_min(1e-12)  # inputs that never occur must not divide by zero
    root = torch.linalg.cholesky(moment + ridge * torch.eye(len(moment), dtype=moment.dtype, device=moment.device))
    u, s, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    right = torch.linalg.solve_triangular(root, v, upper=False, left=False)
    return u.float(), s.float(), right.float()


def _all_factors(model: nn.Module, batches: list[Tensor]) -> dict[str, Factors]:
    """Decompose every layer that can be factored, for its outputs on `batches` or, without any, for its weight."""
    layers = [(name, layer) for name, layer in weighted_layers(model) if _can_factor(layer)]
    weights = {name: finite_weight(name, layer.weight.detach()).float().flatten(1) for name, layer in layers}
    moments = second_moments(clone(model), batches)
    return {name: _factors(weight, moments.get(name)) for name, weight in weights.items()}


@dataclass(frozen=True)
class LowRank(Technique):
    """Factor linear and convolution weights through their largest singular values."""

    family: ClassVar[str] = "low-rank"
    source: ClassVar[str] = "Denton et al., 2014, arXiv:1404.0736; Zhang et al., 2015, arXiv:1505.06798"

    rank: float = setting(0.5, low=0.05, high=1.0, step=0.05, unit="of full rank", neutral=1.0)
    objective: str = setting(
        "outputs",
        choices=("outputs", "weights"),
        help="Approximate a layer's outputs on training images, or its weight.",
    )
    recalibrate: bool = setting(True, choices=(True, False), help="Measure BatchNorm statistics anew after factoring.")
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training after factoring.")

    def compress(self, model, data=None, watch=None):
        """Return a copy with factored layers.

        `data`: a `Data`; without one, `objective` is "weights" and nothing is recalibrated. Raises ValueError where a
        weight holds NaN or infinity.
        """
        small = clone(model)
        if self.rank < 1:
            batches = calibration_batches(model, data)
            seen = batches if self.objective == "outputs" else []
            key = ("singular values", self.objective, id(data) if seen else None)
            factors, _ = remembered(model, key, lambda: (_all_factors(model, seen), data))
            for name, layer in weighted_layers(small):
                rank = kept_rank(layer, self.rank)
                if rank is not None:
                    replace_layer(small, name, factored(layer, *_cut(factors[name], rank)))
            if self.recalibrate and batches:
                recalibrate(small, batches)
        return finetune(small, data, self.finetune, watch)
