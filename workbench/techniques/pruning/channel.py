"""Channel pruning: remove whole channels, so that every layer becomes a smaller dense layer.

Idea: a channel whose weights are small contributes little, so it can go: its filter in the layer that makes it, its
place in the norms that pass it on, and its slice in every layer that reads it. Channels tied together by a residual
sum, a depthwise convolution or a flattening go together. What is left is an ordinary smaller network.

Settings: `sparsity`, the part of the channels removed. `criterion`, by what channels are compared: "l2" or "l1", the
norm of all weights that a channel stands in; "batchnorm", its scales in the BatchNorm layers (groups without any are
ranked by l2); "geometric median", how far its filters lie from all others, so that those go which others can replace;
"taylor", the squared first-order change of the loss without its filters on 128 labelled training images. `scope`
"layer" (also "uniform") removes the same part everywhere; "global" compares channels over the whole model, each
relative to the average of its own group. `round_to` leaves channel counts at multiples of 8 or 16, which kernels
like. `recalibrate` measures BatchNorm statistics anew on 64 training images. `finetune`, epochs of training after
each cut. `rounds`, in how many cuts the sparsity is reached, each with scores of its own; stopped early, the rest is
cut at once. One channel of each group, or one multiple, always stays.

When it helps: everywhere at once. File, memory, multiply-adds and latency all fall on every runtime, since the
kernels stay dense: half of the channels is about a quarter of the weights.

When it does not: without fine-tuning. A channel is a blunt piece to take, and accuracy drops at far lower sparsity
than with single weights; recalibration brings back some of it, a few epochs of training most. Where many layers are
tied together (deep residual stages), one choice must serve them all. Layers whose code fixes their size are skipped.
"batchnorm" was published for networks that were trained with a penalty on these scales; without, they tell less.

Sources: Li et al., 2017, arXiv:1608.08710; Fang et al., 2023 (DepGraph), arXiv:2301.12900; batchnorm: Liu et al.,
2017, arXiv:1708.06519; geometric median: He et al., 2019, arXiv:1811.00250; taylor: Molchanov et al., 2019,
arXiv:1906.10771.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.surgery import ChannelTrace, clone, cut_channels, identity, remembered, trace_channels, weighted_layers
from workbench.surgery.channels import ChannelGroup
from workbench.technique import Technique, setting
from workbench.techniques.pruning.criteria import (
    CRITERIA,
    POWERS,
    batchnorm_scores,
    median_scores,
    norm_scores,
    taylor_products,
    taylor_scores,
)
from workbench.techniques.pruning.masks import Scoped
from workbench.techniques.repair import Trainings, calibration_batches, finetune, recalibrate
from workbench.weights import finite_weight


def kept_count(channels: int, sparsity: float, multiple: int = 1) -> int:
    """Return how many channels stay: the multiple nearest to `(1 - sparsity) * channels`, at least one multiple."""
    wanted = channels - round(sparsity * channels)
    nearest = round(wanted / multiple) * multiple
    return min(max(nearest, multiple), channels)


def strongest(scores: Tensor, count: int) -> Tensor:
    """Return a boolean mask (channels,) that is true at the `count` largest scores; among equals the later stays."""
    keep = torch.ones(len(scores), dtype=torch.bool)
    keep[scores.argsort(stable=True)[: len(scores) - count]] = False
    return keep


def global_sparsities(scores: list[Tensor], sparsity: float) -> list[float]:
    """Return the part that each group loses when all channels are compared, each over the mean of its group."""
    relative = torch.cat([s / s.mean().clamp_min(torch.finfo(s.dtype).tiny) for s in scores])
    keep = strongest(relative, len(relative) - round(sparsity * len(relative)))
    return [1 - part.double().mean().item() for part in keep.split([len(s) for s in scores])]


@dataclass(frozen=True)
class ChannelPruning(Scoped, Technique):
    """Remove the weakest channels from every layer, and from everything tied to it."""

    family: ClassVar[str] = "pruning"
    source: ClassVar[str] = "Li et al., 2017, arXiv:1608.08710; Fang et al., 2023, arXiv:2301.12900"

    sparsity: float = setting(0.5, low=0.0, high=0.9, step=0.05, unit="of channels removed", neutral=0.0)
    criterion: str = setting("l2", choices=CRITERIA, help="By what channels are compared.")
    scope: str = setting(
        "layer", choices=("layer", "global"), help="Remove the same part everywhere, or compare over the whole model."
    )
    round_to: int = setting(1, choices=(1, 8, 16), help="Leave channel counts at multiples of this number.")
    recalibrate: bool = setting(True, choices=(True, False), help="Measure BatchNorm statistics anew after the cut.")
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training after each round.")
    rounds: int = setting(1, choices=(1, 2, 3, 5), help="Reach the sparsity in so many cuts, each followed by tuning.")

    def compress(self, model, data=None, watch=None):
        """Return a copy with fewer channels.

        `data`: a `Data`, or one example batch of the model's input. Raises ValueError if neither is given, if no
        channel can be removed, or if a weight holds NaN; TracingError if the model's forward cannot be followed.
        """
        small = clone(model)
        if self.sparsity == 0:
            return finetune(small, data, self.finetune, watch)
        trainings = Trainings(watch, self.finetune * self.rounds)
        sizes = {_identity(group): len(group) for group in self.trace(model, data).groups}
        for done in range(1, self.rounds + 1):
            sparsity = 1 - (1 - self.sparsity) ** (done / self.rounds)
            cut_channels(small, self._cuts(model if done == 1 else small, data, sparsity, sizes))
            if self.recalibrate:
                recalibrate(small, calibration_batches(model, data))
            trainings.finetune(small, data, self.finetune)
        return small.eval()

    def cuts(self, model: nn.Module, data: Any) -> list[tuple[ChannelGroup, Tensor]]:
        """Return each group of channels with the mask of those that stay after one cut."""
        return self._cuts(model, data, self.sparsity, {})

    def _cuts(self, model, data, sparsity: float, sizes: dict) -> list[tuple[ChannelGroup, Tensor]]:
        """Choose what stays when `sparsity` of the first `sizes` of all groups is to be gone from `model`."""
        groups, scores = self._scores(model, data)
        first = [sizes.get(_identity(group), len(group)) for group in groups]
        parts = [sparsity] * len(groups)
        if self.scope == "global":
            now = [len(group) for group in groups]
            left = sum(first) - round(sparsity * sum(first))
            first, parts = now, global_sparsities(scores, max(0.0, 1 - left / sum(now)))
        multiples = [self.round_to // gcd(self.round_to, group.width) for group in groups]
        counts = [kept_count(*one) for one in zip(first, parts, multiples, strict=True)]
        return [(g, strongest(s, count)) for g, s, count in zip(groups, scores, counts, strict=True)]

    def _scores(self, model: nn.Module, data: Any) -> tuple[list[ChannelGroup], list[Tensor]]:
        """Return the groups of the model with the score of each channel; this is what no slider changes."""
        example = _example(data)
        seen = identity(data) if self.criterion == "taylor" else None
        key = ("channel importance", self.criterion, tuple(tuple(x.shape[1:]) for x in example), seen)
        return remembered(model, key, lambda: (_scored(model, example, self.criterion, data), data))[0]

    @staticmethod
    def trace(model: nn.Module, data: Any) -> ChannelTrace:
        """Return which layers are cut together, and which are skipped and why."""
        example = _example(data)
        key = ("channel trace", tuple(tuple(x.shape[1:]) for x in example))
        return remembered(model, key, lambda: trace_channels(model, example))


def _identity(group: ChannelGroup) -> tuple:
    """Return what a group keeps through a cut: the places where its channels stand."""
    return tuple((member.layer, member.role, member.tensors, member.index.shape[1]) for member in group.members)


def _scored(model, example: tuple[Tensor, ...], criterion: str, data) -> tuple[list[ChannelGroup], list[Tensor]]:
    """Return the groups of a model with the importance of their channels."""
    weights = {name: finite_weight(name, layer.weight.detach()) for name, layer in weighted_layers(model)}
    trace = ChannelPruning.trace(model, example)
    kind = type(model).__name__
    if not trace.groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(trace.skipped.items())[:3])
        raise ValueError(f"ChannelPruning found no channels to remove in {kind} ({reasons or 'it has no layers'}).")
    groups = list(trace.groups)
    if criterion in POWERS:
        return groups, [norm_scores(group, weights, POWERS[criterion]) for group in groups]
    if criterion == "geometric median":
        return groups, [median_scores(group, weights) for group in groups]
    if criterion == "taylor":
        products = taylor_products(model, data)
        return groups, [taylor_scores(group, weights, products) for group in groups]
    found = [batchnorm_scores(group, model) for group in groups]
    if all(scores is None for scores in found):
        raise ValueError(f'{kind} has no BatchNorm whose scales could rank its channels; choose criterion "l2".')
    pairs = zip(groups, found, strict=True)
    return groups, [norm_scores(group, weights, 2) if scores is None else scores for group, scores in pairs]


def _example(data: Any) -> tuple[Tensor, ...]:
    """Return one example of the model's inputs from a `Data`, a batch, or a tuple of batches."""
    if hasattr(data, "example"):
        return (data.example(),)
    inputs = data if isinstance(data, (tuple, list)) else (data,)
    if not inputs or not all(isinstance(x, Tensor) and x.dim() > 0 for x in inputs):
        raise ValueError(
            "ChannelPruning follows the channels through the model, so it needs to know the input's shape: "
            "pass a data set from load_data, or one example batch such as torch.zeros(1, 3, 224, 224)."
        )
    return tuple(inputs)
