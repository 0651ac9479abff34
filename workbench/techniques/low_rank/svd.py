"""Low rank through the singular value decomposition: replace a layer by two thinner ones.

Idea: a weight of m × n has min(m, n) singular values, and often only a few of them are large. Keeping the largest r
gives the best approximation of rank r in the Frobenius norm (Eckart and Young, 1936), stored and computed as two
factors with r·(m + n) numbers instead of m·n. A convolution becomes one with r filters of the same spatial kernel,
followed by a 1×1 convolution.

Settings: `choose` says how the ranks are found. "fraction" keeps the part `rank` of the full rank in every layer;
"energy" keeps in every layer as few singular values as hold the part `kept` of the sum of their squares; "budget"
spends the part `kept` of all weights where a singular value of a layer, over the sum of its layer, buys most for its
numbers. A layer whose two factors would hold more numbers than it has now is left alone. `objective` says what is
approximated: "weights", or the layer's "outputs" on 128 training images, where directions that the inputs hardly use
cost nothing. `recalibrate` measures the statistics of BatchNorm anew on 64 of them. `finetune`, epochs of training
afterwards.

When it helps: wide layers whose inputs or weights use few directions: fully connected layers, and convolutions with
many channels. The factors are dense, so every runtime gains. Energy and budget help where layers differ in how much of
their rank they use: one fraction for all takes too much from one and too little from another.

When it does not: small layers and 1×1 convolutions of few channels gain nothing, since two kernels must be launched and
an intermediate result written where there was one. The weights of a compact convolutional network have nearly full
rank: with the objective "weights" its accuracy falls at once, and below some rank with either. Layers that are pruned,
clustered or quantized become dense again: this stage comes before those.

Sources: Denton et al., 2014, arXiv:1404.0736; for outputs Zhang et al., 2015, arXiv:1505.06798, which also splits a
budget by singular values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.surgery import clone
from workbench.technique import Technique, setting
from workbench.techniques.moments import moment_root
from workbench.techniques.repair import calibration_batches, finetune, recalibrate
from workbench.techniques.replacing import fitted, replaced, thin

Factors = tuple[Tensor, Tensor, Tensor]


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return `left` (m, rank) and `right` (rank, n) whose product is the best approximation of `weight` (m, n).

    Raises ValueError for a rank below 1 or above min(m, n). Source: Eckart and Young, 1936, doi:10.1007/BF02288367.
    """
    full = min(weight.shape)
    if not 1 <= rank <= full:
        raise ValueError(f"rank is {rank}; a weight of {weight.shape[0]}×{weight.shape[1]} has ranks 1 to {full}.")
    return cut(torch.linalg.svd(weight, full_matrices=False), rank)


def cut(factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    """Return the first `rank` singular triplets, their values shared evenly between the two factors."""
    u, s, v = factors
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]


def factors_for(weight: Tensor, moment: Tensor | None) -> Factors:
    """Decompose `weight` (m, n) so that cutting it keeps the weight best, or with `moment` (n, n) its outputs.

    The mean squared error of outputs is the Frobenius norm of (W - W') L where L·Lᵀ is the second moment of the inputs:
    so W·L is decomposed, and L taken out of the right factor again.
    """
    if moment is None:
        return torch.linalg.svd(weight, full_matrices=False)
    root = moment_root(moment)
    u, s, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    right = torch.linalg.solve_triangular(root, v, upper=False, left=False)
    return u.float(), s.float(), right.float()


def energy_rank(values: Tensor, kept: float) -> int:
    """Return the least rank whose singular values hold the part `kept` of the sum of squares of all `values`."""
    energy = values.double().square().cumsum(0)
    return min(int((energy < kept * energy[-1]).sum()) + 1, len(values))


def budget_ranks(values: list[Tensor], shapes: list[tuple[int, int]], budget: int) -> list[int]:
    """Return one rank for each layer so that all factors together hold at most `budget` numbers.

    Singular values are bought in the order of their square, over the sum of squares of their layer, for each number
    that they cost, (m + n) in a layer of m × n. A layer of which all is bought, or more than factors are worth, costs
    m·n. Every layer keeps at least rank 1, even where that is over the budget.
    """
    gains = [v.double().square() / v.double().square().sum().clamp_min(1e-300) for v in values]
    worth = torch.cat([g / (m + n) for g, (m, n) in zip(gains, shapes, strict=True)])
    owners = torch.cat([torch.full((len(v),), i) for i, v in enumerate(values)])
    owners = owners[worth.cpu().argsort(descending=True, stable=True)]
    ranks = lambda bought: owners[:bought].bincount(minlength=len(values)).clamp_min(1).tolist()
    cost = lambda bought: sum(min(r * (m + n), m * n) for r, (m, n) in zip(ranks(bought), shapes, strict=True))
    low, high = 0, len(owners)
    while low < high:  # the most purchases that the budget allows: the cost never falls with one more
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return ranks(low)


@dataclass(frozen=True)
class LowRank(Technique):
    """Factor linear and convolution weights through their largest singular values."""

    family: ClassVar[str] = "low-rank"
    source: ClassVar[str] = "Denton et al., 2014, arXiv:1404.0736; Zhang et al., 2015, arXiv:1505.06798"

    rank: float = setting(
        0.5,
        low=0.05,
        high=1.0,
        step=0.05,
        unit="of full rank",
        neutral=1.0,
        applies=lambda values: values["choose"] == "fraction",
    )
    choose: str = setting(
        "fraction",
        choices=("fraction", "energy", "budget"),
        help="The same rank fraction everywhere, the energy kept in each layer, or a budget of weights for all.",
    )
    kept: float = setting(
        0.75,
        low=0.05,
        high=1.0,
        step=0.01,
        unit="of energy or weights",
        neutral=1.0,
        help="For energy and budget only.",
        applies=lambda values: values["choose"] != "fraction",
    )
    objective: str = setting(
        "outputs",
        choices=("outputs", "weights"),
        help="Approximate a layer's outputs on training images, or its weight.",
    )
    recalibrate: bool = setting(True, choices=(True, False), help="Measure BatchNorm statistics anew after factoring.")
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training after factoring.")

    @property
    def is_neutral(self) -> bool:
        return self._keeps_all and self.finetune == 0

    @property
    def _keeps_all(self) -> bool:
        return (self.rank if self.choose == "fraction" else self.kept) == 1

    def compress(self, model, data=None, watch=None):
        """Return a copy with factored layers.

        `data`: a `Data`; without one, `objective` is "weights" and nothing is recalibrated. Raises ValueError where a
        weight holds NaN or infinity.
        """
        small = clone(model)
        if not self._keeps_all:
            flat = lambda weight, moment: factors_for(weight.flatten(1), moment)
            factors = fitted(model, data, "singular values", self.objective, flat)
            ranks = self.ranks({name: (u.shape[0], v.shape[1], s) for name, (u, s, v) in factors.items()})
            make = lambda name, layer: factored(layer, *cut(factors[name], ranks[name]))
            small = replaced(small, make, factors)
            if self.recalibrate:
                recalibrate(small, calibration_batches(model, data))
        return finetune(small, data, self.finetune, watch)

    def ranks(self, layers: dict[str, tuple[int, int, Tensor]]) -> dict[str, int]:
        """Return the rank to keep in each layer; `layers` holds m, n and the singular values of each weight m × n."""
        if self.choose == "fraction":
            return {name: max(1, round(self.rank * len(s))) for name, (_, _, s) in layers.items()}
        if self.choose == "energy":
            return {name: energy_rank(s, self.kept) for name, (_, _, s) in layers.items()}
        shapes = [(m, n) for m, n, _ in layers.values()]
        budget = round(self.kept * sum(m * n for m, n in shapes))
        return dict(zip(layers, budget_ranks([s for _, _, s in layers.values()], shapes, budget), strict=True))


def factored(layer: nn.Module, left: Tensor, right: Tensor) -> list[nn.Module]:
    """Return two layers that apply `right` (rank, n) and then `left` (m, rank) in place of `layer`."""
    return [thin(layer, right.view(-1, *layer.weight.shape[1:]), along="all"), thin(layer, left, last=True)]
