"""Weight clustering: let all weights of a layer share a few values, found by k-means.

Idea: a layer needs few different values. Group its weights into 2^bits clusters, replace each weight by the mean of
its cluster, and store the cluster's number with a small table of means. The table keeps training: a mean moves by the
summed gradient of its weights.

Settings: `bits` of a stored weight, so 2 to 256 shared values. `initial` says where the means start: evenly in the
cube root of the weights' density, which is best for very many values (cube-root); evenly from the smallest weight to
the largest (linear); at evenly spaced quantiles (density); or at random far from one another (k-means++). From there
on, clusters that hardly matter are exchanged for ones that do, so that the start matters less than it does for plain
k-means. In a layer of few weights the best clusters of all are found, whatever the start. `scope` "layer" finds values
for each layer, "global" one set for all.
`finetune`, epochs of training of the shared values afterwards. `seed` of k-means++. Pruned weights stay zero, and zero
is one of the values. A layer with no more different weights than values keeps them all, exactly.

When it helps: the file. The values may lie anywhere, unlike the even steps of integers, so at 2 to 4 bits less is lost,
and entropy coding makes use of frequent ones.

When it does not: speed and memory. No kernel here looks weights up in a table, so OpenVINO and torch compute with them
in fp32 as before: the file shrinks, the time does not. At 8 bits it gains nothing over rounding to integers, which
has fast kernels. One set of values for all layers suits none where their weights differ in size.

Source: Han et al., 2016, arXiv:1510.00149; Panter and Dite, 1951, doi:10.1109/JRPROC.1951.230419 (cube root); Arthur
and Vassilvitskii, 2007, doi:10.5555/1283383.1283494 (k-means++); Wang and Song, 2011, doi:10.32614/RJ-2011-015 (exact).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from workbench.surgery import clone, remembered, weighted_layers
from workbench.technique import Technique, setting
from workbench.techniques.repair import finetune
from workbench.weights import Codebook, finite_weight, parametrize_weight, stored_tensor

INITIAL = ("cube-root", "linear", "density", "k-means++")
ROUNDS = 60  # of assigning and averaging, at most
TINY = float(torch.finfo(torch.float32).tiny)
EXCHANGES = 20  # of clusters that hardly matter for ones that do, at most
BETWEEN = 5  # rounds from one exchange to the next
WORTH = 1.02  # how much more a split must gain than the join costs
SAMPLE = 4096  # values that k-means++ draws from
BLOCKS = 4  # of values for each cluster, whose width tells the density there
SMALL = 1 << 24  # clusters times values times the most values in a cluster: up to here the best clusters are found


@dataclass(frozen=True)
class SortedValues:
    """The values that are not zero, in order, float64 (n,), and the sums of the first 0 … n: each round is quick.

    `places`: (n,), where each lies among all `total` values.
    """

    values: np.ndarray
    sums: np.ndarray
    squares: np.ndarray
    places: np.ndarray
    total: int

    @classmethod
    def of(cls, values: Tensor) -> SortedValues:
        """Sort finite numbers of any shape."""
        flat = values.detach().flatten().float()
        kept = flat.nonzero().flatten()
        found = flat[kept].sort()
        ordered = found.values.numpy().astype(np.float64)
        sums, squares = (np.concatenate([[0.0], part.cumsum()]) for part in (ordered, ordered**2))
        return cls(ordered, sums, squares, kept[found.indices].numpy(), len(flat))

    @cached_property
    def distinct(self) -> np.ndarray:
        """Every value once, in order."""
        return self.values[np.append(True, self.values[1:] != self.values[:-1])[: len(self.values)]]

    def ends(self, centroids: np.ndarray) -> np.ndarray:
        """Return where in the order the values nearest to each of the sorted centroids (k,) begin and end: (k + 1,)."""
        middles = (centroids[1:] + centroids[:-1]) / 2
        return np.concatenate([[0], self.values.searchsorted(middles, side="right"), [len(self.values)]])

    def means(self, ends: np.ndarray, empty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how many values lie between these places, and their mean; where there are none, `empty`."""
        counts = np.diff(ends)
        return counts, np.where(counts > 0, np.diff(self.sums[ends]) / np.maximum(counts, 1), empty)

    def inertia(self, centroids: np.ndarray) -> float:
        """Return the summed squared distance of each value to the nearest of the sorted centroids."""
        ends = self.ends(centroids)
        sums, squares = np.diff(self.sums[ends]), np.diff(self.squares[ends])
        return float((squares - 2 * centroids * sums + np.diff(ends) * centroids**2).sum())


def initial_centroids(data: SortedValues, count: int, initial: str, random: np.random.Generator) -> np.ndarray:
    """Return `count` sorted starting points, float64, chosen in one of the ways INITIAL."""
    values = data.values
    if initial == "cube-root":
        return _companded(values, count)
    if initial == "linear":
        return np.linspace(values[0], values[-1], count)
    if initial == "density":
        return values[((np.arange(count) + 0.5) / count * len(values)).astype(int)]
    return _far_apart(values, count, random)


def _companded(values: np.ndarray, count: int) -> np.ndarray:
    """Space the points evenly in the cube root of the density: the more the values, the nearer to the best."""
    ends = np.linspace(0, len(values), min(len(values), BLOCKS * count) + 1).astype(int)
    edges = values[np.minimum(ends, len(values) - 1)]
    passed = np.append(0.0, np.cumsum(np.cbrt(np.diff(ends) * np.diff(edges) ** 2)))
    return np.interp((np.arange(count) + 0.5) / count * passed[-1], passed, edges)


def _far_apart(values: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw each next point with a chance that grows with its squared distance from those drawn before."""
    pool = values[np.linspace(0, len(values) - 1, min(SAMPLE, len(values))).astype(int)]
    drawn = [pool[random.integers(len(pool))]]
    distance = (pool - drawn[0]) ** 2
    for _ in range(count - 1):
        below = distance.cumsum()
        place = below.searchsorted(random.random() * below[-1], side="right")
        drawn.append(pool[min(place, len(pool) - 1)])
        distance = np.minimum(distance, (pool - drawn[-1]) ** 2)
    return np.sort(drawn)


def lloyd(data: SortedValues, centroids: np.ndarray, rounds: int) -> np.ndarray:
    """Move sorted centroids (k,) towards the means of the values nearest to them, until they stay.

    Each round also goes on in the direction of the last one, until it would have to turn round: plain averaging
    creeps. Source: O'Donoghue and Candès, 2012, arXiv:1204.3982 (restart by the gradient).
    """
    last, age = centroids, 0
    for _ in range(rounds):
        _, means = data.means(data.ends(centroids), centroids)
        if np.array_equal(means, centroids):
            break
        age = age + 1 if ((means - centroids) * (means - last)).sum() >= 0 else 0
        centroids, last = np.sort(means + age / (age + 3) * (means - last)), means
    return centroids


def exchange(data: SortedValues, centroids: np.ndarray) -> np.ndarray | None:
    """Join neighbours that cost little to join and split as many that gain more by it; None if there are none.

    Without this, k-means ends where it began: a start with too many centroids in one place keeps them there.
    """
    ends = data.ends(centroids)
    counts, means = data.means(ends, centroids)
    halves = np.sort(np.concatenate([ends, ends[:-1] + counts // 2]))
    parts, centres = data.means(halves, np.repeat(means, 2))
    gain = parts[::2] * parts[1::2] / np.maximum(counts, 1) * np.diff(centres)[::2] ** 2
    cost = counts[1:] * counts[:-1] / np.maximum(counts[1:] + counts[:-1], 1) * np.diff(means) ** 2
    moved, used = means.copy(), np.zeros(len(means), bool)
    joins = iter(cost.argsort(kind="stable"))
    for split in (-gain).argsort(kind="stable")[: max(1, len(means) // 8)]:
        used[split] = True
        join = next((j for j in joins if not used[j] and not used[j + 1]), None)
        if join is None or gain[split] <= WORTH * cost[join]:
            break
        used[join : join + 2] = True
        moved[join] = np.average(means[join : join + 2], weights=np.maximum(counts[join : join + 2], 1e-9))
        moved[join + 1], moved[split] = centres[2 * split : 2 * split + 2]
    return None if np.array_equal(moved, means) else np.sort(moved)


def best_clusters(data: SortedValues, count: int) -> np.ndarray:
    """Return the `count` centroids of least inertia, sorted: the best end for 1, 2, … clusters of the first values.

    Time and memory grow with the values times the most of them that one cluster can hold; the time with `count` too.
    Source: Wang and Song, 2011, doi:10.32614/RJ-2011-015.
    """
    values = len(data.values)
    ends, sizes = np.arange(1, values + 1)[:, None], np.arange(1, values - count + 2)
    starts = (ends - sizes).clip(0)
    inside = data.squares[ends] - data.squares[starts] - (data.sums[ends] - data.sums[starts]) ** 2 / sizes
    inside[sizes > ends] = np.inf
    least, taken = np.append(0.0, np.full(values, np.inf)), []
    for _ in range(count):
        before = np.append(np.full(len(sizes) - 1, np.inf), least[:-1])
        total = inside + np.lib.stride_tricks.sliding_window_view(before, len(sizes))[:, ::-1]
        best = total.argmin(1)
        least = np.append(np.inf, total[ends[:, 0] - 1, best])
        taken.append(np.append(0, sizes[best]))
    places = [values]
    for size in reversed(taken):
        places.append(places[-1] - size[places[-1]])
    return data.means(np.array(places[::-1]), np.zeros(count))[1]


def kmeans(data: SortedValues, count: int, initial: str = "cube-root", seed: int = 0) -> np.ndarray:
    """Return at most `count` sorted centroids, float64; all distinct values where there are no more than that."""
    if len(data.distinct) <= count:
        return data.distinct
    if count * len(data.values) * (len(data.values) - count + 1) <= SMALL:
        return best_clusters(data, count)
    centroids = initial_centroids(data, count, initial, np.random.default_rng(seed))
    for _ in range(EXCHANGES):
        moved = exchange(data, lloyd(data, centroids, BETWEEN))
        if moved is None:
            break
        centroids = moved
    centroids = lloyd(data, centroids, ROUNDS)
    counts, means = data.means(data.ends(centroids), centroids)
    return means[counts > 0]


def nearest(data: SortedValues, levels: Tensor) -> Tensor:
    """Return for each of all values the place of the nearest of the sorted levels (k,), int32 (total,).

    A level of zero belongs to zeros alone: what is pruned stays so, and nothing else is pruned.
    """
    levels = levels.double().numpy()
    others, zero = levels[levels != 0], int((levels < 0).sum())
    numbers = np.flatnonzero(levels != 0).astype(np.int32)
    symbols = np.full(data.total, zero, np.int32)
    symbols[data.places] = np.repeat(numbers, np.diff(data.ends(others)))
    return torch.from_numpy(symbols)


@dataclass(frozen=True)
class WeightClustering(Technique):
    """Let the weights of a layer share a few values."""

    family: ClassVar[str] = "clustering"
    source: ClassVar[str] = "Han et al., 2016, arXiv:1510.00149"

    bits: int = setting(4, low=1, high=8, step=1, unit="bits", neutral=32, help="2^bits values are shared.")
    initial: str = setting("cube-root", choices=INITIAL, help="Where the shared values start.")
    scope: str = setting("layer", choices=("layer", "global"), help="Values for each layer, or one set for all.")
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training of the shared values.")
    seed: int = setting(
        0,
        low=0,
        high=99,
        step=1,
        help="Of the random starts of k-means++.",
        applies=lambda values: values["initial"] == "k-means++",
    )

    def compress(self, model, data=None, watch=None):
        """Return a copy with codebooks on the weights; raises ValueError if there is no weight, or NaN in one."""
        small = clone(model)
        if self.bits <= 8:
            for names in _groups(model, self.scope):
                self._share(model, small, names)
        return finetune(small, data, self.finetune, watch)

    def _share(self, model: nn.Module, small: nn.Module, names: list[str]) -> None:
        """Put one set of levels on the weights of these layers; those that share a tensor stay equal."""
        data = remembered(model, ("sorted weights", *names), lambda: _sorted_weights(model, names))
        choice = (2**self.bits, self.initial, self.seed)
        levels = remembered(model, ("levels", *names, choice), lambda: _levels(data, *choice))
        shared = nn.Parameter(levels.clone())
        layers = [small.get_submodule(name) for name in names]
        symbols = nearest(data, levels).split([layer.weight.numel() for layer in layers])
        for layer, part in zip(layers, symbols, strict=True):
            parametrize_weight(layer, Codebook(shared, part.view(layer.weight.shape)))


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
        groups.setdefault(id(stored_tensor(layer)), []).append(name)
    return list(groups.values())


def _levels(data: SortedValues, count: int, initial: str, seed: int) -> Tensor:
    """Return at most `count` sorted levels, float32, zero among them if and only if a value is zero.

    Where other values lie around zero evenly their centroid is zero; it becomes a number just above it, since
    the level of zero belongs to zeros alone.
    """
    has_zero = int(len(data.values) < data.total)
    centroids = kmeans(data, count - has_zero, initial, seed)
    centroids = np.where(centroids.astype(np.float32) == 0, TINY, centroids)
    return torch.from_numpy(np.append(centroids, np.zeros(has_zero))).float().unique()


def _sorted_weights(model: nn.Module, names: list[str]) -> SortedValues:
    weights = [finite_weight(name, model.get_submodule(name).weight.detach()).flatten() for name in names]
    return SortedValues.of(torch.cat([weight.float().cpu() for weight in weights]))
