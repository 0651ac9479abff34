"""LoRA: adapt a trained model by training a low-rank term beside each frozen weight.

Idea: what a fine-tuning adds to a weight has low rank, so it can be trained as one: W + alpha/rank · B·A, with A of
rank × inputs drawn at random and B of outputs × rank starting at zero. The model's own weights, and the statistics of
its norms, stay as they are; only A and B learn.

Settings: `rank` of the added terms, at most the layer's own. `alpha` over `rank` scales them. `epochs` of training and
the `seed` of A and of the order of the images. `merge` adds the terms into the weights: the same layers as before, with
outputs equal up to rounding. Otherwise each adapted layer becomes the sum of the frozen layer and of its adapter, two
thin layers in a row. Linear layers and ungrouped convolutions are adapted.

When it helps: many variants of one large model. Each is the same base and a small file of adapters (`adapters` takes
them out, `attach` puts them onto the base again). It also repairs a base that is pruned, clustered or quantized: its
zeros and codes stay, since what is learned stands beside them.

When it does not: as compression. The base is not made smaller: merged, the file is as large as before; unmerged, larger
by the adapters, and slower by their layers. Merging is only for plain weights: in pruned, clustered or quantized ones
it would undo the stage before, so those are left alone. A small network fine-tunes as quickly in full.

Sources: Hu et al., 2021, arXiv:2106.09685; on a quantized base Dettmers et al., 2023, arXiv:2305.14314.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.data import Data
from workbench.surgery import Parallel, clone
from workbench.technique import Technique, setting
from workbench.techniques.replacing import put, replaceable_layers, thin
from workbench.training import fit
from workbench.weights import parametrize_weight

LEARNING_RATE = 2e-3
Pair = tuple[Tensor, Tensor]


class LowRankTerm(nn.Module):
    """Add scale · `up` · `down` to a weight: (outputs, rank) · (rank, inputs · places), both trained."""

    def __init__(self, up: Tensor, down: Tensor, scale: float):
        super().__init__()
        self.up, self.down, self.scale = nn.Parameter(up), nn.Parameter(down), scale

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.up @ self.down).view_as(weight)


class _Still(nn.Module):
    """A model that stays in eval mode while it is trained: the statistics of its norms belong to what is frozen."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.eval()

    def train(self, mode: bool = True):
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def first_terms(weight: Tensor, rank: int, generator: torch.Generator) -> Pair:
    """Return `up`, all zero, and `down`, uniform as the paper's code draws it: the sum starts as `weight` itself."""
    flat = weight.flatten(1)
    rank = min(rank, *flat.shape)
    bound = 1 / math.sqrt(flat.shape[1])
    down = torch.empty(rank, flat.shape[1]).uniform_(-bound, bound, generator=generator)
    return flat.new_zeros(len(flat), rank), down.to(flat)


def adapter(layer: nn.Module, up: Tensor, down: Tensor) -> nn.Sequential:
    """Return two layers whose output is what adding `up` · `down` to the weight of `layer` adds to its output."""
    return nn.Sequential(thin(layer, down.view(-1, *layer.weight.shape[1:]), along="all"), thin(layer, up)).eval()


def with_adapters(model: nn.Module, terms: dict[str, Pair]) -> nn.Module:
    """Put the sum of the layer and its adapter where each named layer stands, in place."""
    layers = {name: model.get_submodule(name) for name in terms}
    return put(model, {name: Parallel(layer, adapter(layer, *terms[name])) for name, layer in layers.items()})


def merged(model: nn.Module, terms: dict[str, Pair]) -> nn.Module:
    """Add the terms to the weights of the named layers, in place."""
    with torch.no_grad():
        for name, (up, down) in terms.items():
            weight = model.get_submodule(name).weight
            weight += (up @ down).view_as(weight)
    return model


def adapters(model: nn.Module) -> nn.ModuleDict:
    """Return the adapters of an unmerged model by layer, with "/" for "." in the names: all that is to be saved."""
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, Parallel)}
    return nn.ModuleDict({name.replace(".", "/"): layer[1] for name, layer in found.items()})


def attach(model: nn.Module, saved: nn.ModuleDict) -> nn.Module:
    """Return a copy of the base `model` with the adapters that `adapters` took out of another copy of it."""
    base = clone(model)
    names = {name.replace("/", "."): clone(each) for name, each in saved.items()}
    return put(base, {name: Parallel(base.get_submodule(name), each) for name, each in names.items()})


@dataclass(frozen=True)
class LoRA(Technique):
    """Train a low-rank term beside each frozen weight."""

    family: ClassVar[str] = "low-rank"
    source: ClassVar[str] = "Hu et al., 2021, arXiv:2106.09685"
    trains: ClassVar[bool] = True

    rank: int = setting(8, low=1, high=64, step=1)
    alpha: float = setting(16.0, low=1.0, high=128.0, step=1.0, help="Over the rank, it scales what is added.")
    epochs: int = setting(1, low=1, high=20, step=1, unit="epochs", neutral=0)
    merge: bool = setting(False, choices=(False, True), help="Add what was learned into the weights.")
    seed: int = setting(0, low=0, high=9, step=1)

    @classmethod
    def title(cls) -> str:
        return "LoRA"

    def compress(self, model, data=None, watch=None):
        """Return a copy with trained adapters, merged into the weights or beside them.

        Raises ValueError without training images, or where there is no layer to adapt. `watch(step)` returning False
        stops; the best terms are kept.
        """
        if self.is_neutral:
            return clone(model)
        if not isinstance(data, Data):
            raise ValueError("LoRA trains adapters: pass a data set from load_data.")
        terms = self._trained(model, data, watch)
        return (merged if self.merge else with_adapters)(clone(model), terms)

    def _trained(self, model: nn.Module, data: Any, watch) -> dict[str, Pair]:
        """Return the trained `up`, scale included, and `down` of each layer that can be adapted."""
        learner = clone(model).requires_grad_(False)
        generator = torch.Generator().manual_seed(self.seed)
        layers = replaceable_layers(learner, held=not self.merge)
        if not layers:
            raise ValueError(f"LoRA found no linear or ungrouped convolution layer to adapt in {type(model).__name__}.")
        terms = {}
        for name, layer in layers:
            terms[name] = LowRankTerm(*first_terms(layer.weight, self.rank, generator), self.alpha / self.rank)
            parametrize_weight(layer, terms[name])
        steps = fit(_Still(learner), data, epochs=self.epochs, learning_rate=LEARNING_RATE, seed=self.seed)
        for step in steps:
            if watch is not None and watch(step) is False:
                steps.close()
        return {name: ((term.scale * term.up).detach(), term.down.detach()) for name, term in terms.items()}
