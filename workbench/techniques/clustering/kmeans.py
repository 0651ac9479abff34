"""Weight clustering: let all weights of a layer share a few values, found by k-means.

Idea: a layer needs few different values. Group its weights into 2^bits clusters, replace each weight by the mean of its
cluster, and store the cluster's number with a small table of means. The table keeps training: a mean moves by the summed
gradient of its weights.

Settings: `bits` of a stored weight, so 2 to 256 shared values. `initial` says where the means start: evenly from the
smallest weight to the largest (linear), at evenly spaced quantiles (density), or at random far from one another
(k-means++, the best of several tries). `scope` "layer" finds values for each layer, "global" one set for all. `finetune`,
epochs of training of the shared values afterwards. `seed` of k-means++. Pruned weights stay zero, and zero is one of the
values. A layer with no more different weights than values keeps them all, exactly.

When it helps: the file. The values may lie anywhere, unlike the even steps of integers, so at 2 to 4 bits less is lost,
and entropy coding makes use of frequent ones. Linear starts keep the few large weights, which matter most.

When it does not: speed and memory. No kernel here looks weights up in a table, so OpenVINO and torch compute with them
in fp32 as before: the file shrinks, the time does not. At 8 bits it gains nothing over rounding to integers, which
has fast kernels. One set of values for all layers suits none where their weights differ in size.

Source: Han et al., 2016, arXiv:1510.00149; Arthur and Vassilvitskii, 2007, doi:10.5555/1283383.1283494 (k-means++).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.surgery import clone, remembered, weighted_layers
from workbench.technique import Technique, setting
from workbench.techniques.repair import finetune
from workbench.weights import Codebook, finite_weight, parametrize_weight, weight_parametrizations

INITIAL = ("linear", "density", "k-means++")
ROUNDS = 300  # of assigning and averaging, at most
TRIES = 4  # of k-means++
SAMPLE = 4096  # values that k-means++ draws from


@dataclass(frozen=True)
class SortedValues:
    """Values in order, float64 (n,), and the sums of the first 0 … n of them: what makes each round quick."""

    values: Tensor
    sums: Tensor
    squares: Tensor
    distinct: Tensor

    @classmethod
    def of(cls, values: Tensor) -> SortedValues:
        """Sort finite numbers of any shape."""
        ordered = values.detach().flatten().double().sort().values
        zero = ordered.new_zeros(1)
        sums, squares = (torch.cat([zero, part.cumsum(0)]) for part in (ordered, ordered.square()))
        return cls(ordered, sums, squares, ordered.unique_consecutive())

    def clusters(self, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return how many values are nearest to each of the sorted centroids (k,), their sums and sums of squares."""
        ends = torch.searchsorted(self.values, (centroids[1:] + centroids[:-1]) / 2, right=True)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(self.values))])
        return ends.diff(), self.sums[ends].diff(), self.squares[ends].diff()

    def inertia(self, centroids: Tensor) -> float:
        """Return the summed squared distance of each value to the nearest of the sorted centroids."""
        counts, sums, squares = self.clusters(centroids)
        return float((squares - 2 * centroids * sums + counts * centroids.square()).sum())


def initial_centroids(data: SortedValues, count: int, initial: str, generator: torch.Generator | None = None) -> Tensor:
    """Return `count` sorted starting points, float64, chosen in one of the ways INITIAL."""
    values = data.values
    if initial == "linear":
        return torch.linspace(float(values[0]), float(values[-1]), count, dtype=values.dtype)
    if initial == "density":
        places = (torch.arange(count, dtype=values.dtype) + 0.5) / count * len(values)
        return values[places.long().clamp(max=len(values) - 1)]
    return _far_apart(values, count, generator)


def _far_apart(values: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw each next point with a chance that grows with its squared distance from those drawn before."""
    pool = values[torch.linspace(0, len(values) - 1, min(SAMPLE, len(values))).long()]
    first = torch.randint(len(pool), (1,), generator=generator)
    drawn, distance = [first], (pool - pool[first]).square()
    for _ in range(count - 1):
        weights = distance if float(distance.sum()) > 0 else torch.ones_like(distance)
        drawn.append(torch.multinomial(weights, 1, generator=generator))
        distance = torch.minimum(distance, (pool - pool[drawn[-1]]).square())
    return pool[torch.cat(drawn)].sort().values


def lloyd(data: SortedValues, centroids: Tensor) -> Tensor:
    """Move sorted centroids (k,) to the means of their values until nothing changes; none is left without values."""
    for _ in range(ROUNDS):
        counts, sums, squares = data.clusters(centroids)
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        if (counts == 0).any():
            moved = _refill(moved, counts, squares - sums.square() / counts.clamp(min=1))
        elif torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _refill(centroids: Tensor, counts: Tensor, spread: Tensor) -> Tensor:
    """Move the centroids without values beside those whose values lie furthest apart, which then share them."""
    empty = (counts == 0).nonzero().flatten()
    widest = spread.argsort(descending=True)[: len(empty)]
    deviation = (spread[widest] / counts[widest].clamp(min=1)).clamp(min=0).sqrt()
    centroids = centroids.clone()
    centroids[empty[: len(widest)]] = centroids[widest] + deviation
    centroids[widest] -= deviation
    return centroids.sort().values


def kmeans(data: SortedValues, count: int, initial: str = "linear", seed: int = 0) -> Tensor:
    """Return at most `count` sorted centroids, float64; all distinct values where there are no more than that."""
    if len(data.distinct) <= count:
        return data.distinct
    if initial != "k-means++":
        return lloyd(data, initial_centroids(data, count, initial))
    generator = torch.Generator().manual_seed(seed)
    tries = [lloyd(data, initial_centroids(data, count, initial, generator)) for _ in range(TRIES)]
    return min(tries, key=data.inertia)


def nearest(weight: Tensor, levels: Tensor) -> Tensor:
    """Return for each weight the place of the nearest of the sorted levels (k,), int32; zero is only for zeros."""
    others = levels[levels != 0]
    symbols = torch.bucketize(weight.float(), (others[1:] + others[:-1]) / 2, out_int32=True)
    if len(others) == len(levels):
        return symbols
    zero = int((levels < 0).sum())  # it belongs to zeros alone: pruned stays pruned, and nothing else is pruned
    return torch.where(weight == 0, torch.full_like(symbols, zero), symbols + (symbols >= zero))


@dataclass(frozen=True)
class WeightClustering(Technique):
    """Let the weights of a layer share a few values."""

    family: ClassVar[str] = "clustering"
    source: ClassVar[str] = "Han et al., 2016, arXiv:1510.00149"

    bits: int = setting(4, low=1, high=8, step=1, unit="bits", neutral=32, help="2^bits values are shared.")
    initial: str = setting("linear", choices=INITIAL, help="Where the shared values start.")
    scope: str = setting("layer", choices=("layer", "global"), help="Values for each layer, or one set for all.")
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training of the shared values.")
    seed: int = setting(0, low=0, high=99, step=1, help="Of the random starts of k-means++.")

    def compress(self, model, data=None, watch=None):
        """Return a copy with codebooks on the weights; raises ValueError if there is no weight, or NaN in one."""
        small = clone(model)
        if self.bits <= 8:
            for names, levels in self.codebooks(model):
                shared = nn.Parameter(levels.float())
                for name in names:
                    layer = small.get_submodule(name)
                    parametrize_weight(layer, Codebook(shared, nearest(layer.weight.detach(), shared.detach())))
        return finetune(small, data, self.finetune, watch)

    def codebooks(self, model: nn.Module) -> list[tuple[list[str], Tensor]]:
        """Return (names of layers, their sorted levels): one set for each tensor, or one for all."""
        groups = _groups(model, self.scope)
        choice = (2**self.bits, self.initial, self.seed)
        return [(names, _levels(model, names, *choice)) for names in groups]


def _groups(model: nn.Module, scope: str) -> list[list[str]]:
    """Return the names of the layers that share levels: those that share one tensor, or all."""
    layers = weighted_layers(model)
    if not layers:
        kind = type(model).__name__
        raise ValueError(f"WeightClustering found no linear or convolution layer in {kind}: nothing to cluster.")
    if scope == "global":
        return [[name for name, _ in layers]]
    groups: dict[int, list[str]] = {}
    for name, layer in layers:
        below = layer.parametrizations.weight.original if weight_parametrizations(layer) else layer.weight
        groups.setdefault(id(below), []).append(name)
    return list(groups.values())


def _levels(model: nn.Module, names: list[str], count: int, initial: str, seed: int) -> Tensor:
    """Return the sorted levels for the weights of these layers, zero among them if a weight is zero."""
    data, has_zero = remembered(model, ("sorted weights", *names), lambda: _sorted_weights(model, names))
    if not len(data.values):
        return torch.zeros(1)
    key = ("k-means", *names, count, initial, seed)
    centroids = remembered(model, key, lambda: kmeans(data, count - has_zero, initial, seed))
    return torch.cat([centroids, centroids.new_zeros(has_zero)]).float().unique()


def _sorted_weights(model: nn.Module, names: list[str]) -> tuple[SortedValues, int]:
    """Return the weights that are not zero, in order, and 1 if others are, else 0."""
    weights = [finite_weight(name, model.get_submodule(name).weight.detach()).flatten() for name in names]
    together = torch.cat([weight.float().cpu() for weight in weights])
    return SortedValues.of(together[together != 0]), int(bool((together == 0).any()))
