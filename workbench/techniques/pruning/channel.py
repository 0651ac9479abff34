"""Channel pruning: remove whole channels, so that every layer becomes a smaller dense layer.

Idea: a channel whose weights are small contributes little, so it can go: its filter in the layer that makes it, its
place in the norms that pass it on, and its slice in every layer that reads it. Channels tied together by a residual
sum, a depthwise convolution or a flattening go together. What is left is an ordinary smaller network.

Settings: `sparsity`, the part of the channels removed. `criterion`, "l2" or "l1": the norm by which channels are
compared, summed over all layers that the channel stands in. `scope` "layer" removes the same part everywhere;
"global" compares channels over the whole model, each relative to the average of its own group. `round_to` leaves
channel counts at multiples of 8 or 16, which kernels like. `recalibrate` measures BatchNorm statistics anew on 64
training images. `finetune`, epochs of training afterwards. One channel of each group, or one multiple, always stays.

When it helps: everywhere at once. File, memory, multiply-adds and latency all fall on every runtime, since the
kernels stay dense: half of the channels is about a quarter of the weights.

When it does not: without fine-tuning. A channel is a blunt piece to take, and accuracy drops at far lower sparsity
than with single weights; recalibration brings back some of it, a few epochs of training most. Where many layers are
tied together (deep residual stages), one choice must serve them all. Layers whose code fixes their size are skipped.

Sources: Li et al., 2017, arXiv:1608.08710; Fang et al., 2023 (DepGraph), arXiv:2301.12900.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.surgery import ChannelTrace, clone, cut_channels, remembered, trace_channels, weighted_layers
from workbench.surgery.channels import ChannelGroup
from workbench.technique import Technique, setting
from workbench.techniques.repair import calibration_batches, finetune, recalibrate
from workbench.weights import finite_weight

_POWERS = {"l1": 1, "l2": 2}


def slice_norms(weight: Tensor, dim: int, power: int) -> Tensor:
    """Return the sum of |weight|**power over each slice along `dim`: (..., size, ...) -> (size,)."""
    return weight.detach().float().abs().pow(power).transpose(0, dim).flatten(1).sum(1)


def channel_importance(slices: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return one score for each channel: the sum of the norms of all slices that the channel stands in.

    `slices`: for each weight, its slice norms (size,) and the index (channels, places) of each channel among them.
    Source: Fang et al., 2023, arXiv:2301.12900, with the norms of Li et al., 2017, arXiv:1608.08710.
    """
    return torch.stack([norms[index].sum(1) for norms, index in slices]).sum(0)


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
class ChannelPruning(Technique):
    """Remove the weakest channels from every layer, and from everything tied to it."""

    family: ClassVar[str] = "pruning"
    source: ClassVar[str] = "Li et al., 2017, arXiv:1608.08710; Fang et al., 2023, arXiv:2301.12900"

    sparsity: float = setting(0.5, low=0.0, high=0.9, step=0.05, unit="of channels removed", neutral=0.0)
    criterion: str = setting("l2", choices=("l2", "l1"), help="The norm by which channels are compared.")
    scope: str = setting(
        "layer", choices=("layer", "global"), help="Remove the same part everywhere, or compare over the whole model."
    )
    round_to: int = setting(1, choices=(1, 8, 16), help="Leave channel counts at multiples of this number.")
    recalibrate: bool = setting(True, choices=(True, False), help="Measure BatchNorm statistics anew after the cut.")
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training after pruning.")

    def compress(self, model, data=None, watch=None):
        """Return a copy with fewer channels.

        `data`: a `Data`, or one example batch of the model's input. Raises ValueError if neither is given, if no
        channel can be removed, or if a weight holds NaN; TracingError if the model's forward cannot be followed.
        """
        small = clone(model)
        if self.sparsity > 0:
            cut_channels(small, self.cuts(model, data))
            if self.recalibrate:
                recalibrate(small, calibration_batches(model, data)[:1])
        return finetune(small, data, self.finetune, watch)

    def cuts(self, model: nn.Module, data: Any) -> list[tuple[ChannelGroup, Tensor]]:
        """Return each group of channels with the mask of those that stay."""
        example = _example(data)
        key = ("channel importance", self.criterion, tuple(tuple(x.shape[1:]) for x in example))
        groups, scores = remembered(model, key, lambda: _scored(model, example, _POWERS[self.criterion]))
        parts = [self.sparsity] * len(groups)
        if self.scope == "global":
            parts = global_sparsities(scores, self.sparsity)
        counts = [
            kept_count(len(group), part, self.round_to // gcd(self.round_to, group.width))
            for group, part in zip(groups, parts, strict=True)
        ]
        return [(g, strongest(s, count)) for g, s, count in zip(groups, scores, counts, strict=True)]

    @staticmethod
    def trace(model: nn.Module, data: Any) -> ChannelTrace:
        """Return which layers are cut together, and which are skipped and why."""
        example = _example(data)
        key = ("channel trace", tuple(tuple(x.shape[1:]) for x in example))
        return remembered(model, key, lambda: trace_channels(model, example))


def _scored(model: nn.Module, example: tuple[Tensor, ...], power: int) -> tuple[list[ChannelGroup], list[Tensor]]:
    """Return the groups of a model with the importance of their channels; the part that no slider changes."""
    layers = {name: finite_weight(name, layer.weight.detach()) for name, layer in weighted_layers(model)}
    trace = ChannelPruning.trace(model, example)
    if not trace.groups:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(trace.skipped.items())[:3])
        kind = type(model).__name__
        raise ValueError(f"ChannelPruning found no channels to remove in {kind} ({reasons or 'it has no layers'}).")
    return list(trace.groups), [_score(group, layers, power) for group in trace.groups]


def _score(group: ChannelGroup, weights: dict[str, Tensor], power: int) -> Tensor:
    """Score the channels of a group by the weights of its linear and convolution layers."""
    slices = [
        (slice_norms(weights[member.layer], dict(member.tensors)["weight"], power).cpu(), member.index)
        for member in group.members
        if member.layer in weights and "weight" in dict(member.tensors)
    ]
    return channel_importance(slices) if slices else torch.ones(len(group))


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
