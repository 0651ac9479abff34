"""How much a channel matters: the criteria that channel pruning can rank by.

Each criterion looks at the places where a channel stands: its filter in the layer that makes it, its numbers in the
norms that pass it on, its slices in the layers that read it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.surgery import clone
from workbench.surgery.channels import ChannelGroup
from workbench.techniques.repair import CALIBRATION_IMAGES
from workbench.weights import bake_weights

POWERS = {"l2": 2, "l1": 1}
CRITERIA = (*POWERS, "batchnorm", "geometric median", "taylor")
Products = dict[tuple[str, str], Tensor]  # (layer, tensor) -> value × gradient


def slice_sums(values: Tensor, dim: int) -> Tensor:
    """Return the sum over each slice along `dim`: (..., size, ...) -> (size,)."""
    return values.transpose(0, dim).flatten(1).sum(1) if values.dim() > 1 else values


def slice_norms(weight: Tensor, dim: int, power: int) -> Tensor:
    """Return the sum of |weight|**power over each slice along `dim`: (..., size, ...) -> (size,)."""
    return slice_sums(weight.detach().float().abs().pow(power), dim)


def channel_importance(slices: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return one score for each channel: the sum of the norms of all slices that the channel stands in.

    `slices`: for each weight, its slice norms (size,) and the index (channels, places) of each channel among them.
    Source: Fang et al., 2023, arXiv:2301.12900, with the norms of Li et al., 2017, arXiv:1608.08710.
    """
    return torch.stack([norms[index].sum(1) for norms, index in slices]).sum(0)


def norm_scores(group: ChannelGroup, weights: dict[str, Tensor], power: int) -> Tensor:
    """Score the channels of a group by the weights of its linear and convolution layers."""
    slices = [
        (slice_norms(weights[member.layer], dict(member.tensors)["weight"], power).cpu(), member.index)
        for member in group.members
        if member.layer in weights and "weight" in dict(member.tensors)
    ]
    return channel_importance(slices) if slices else torch.ones(len(group))


def batchnorm_scores(group: ChannelGroup, model: nn.Module) -> Tensor | None:
    """Score channels by the sum of their absolute BatchNorm scales; None for a group without BatchNorm.

    Source: Liu et al., 2017 (Network Slimming), arXiv:1708.06519.
    """
    layers = [(model.get_submodule(member.layer), member.index) for member in group.members]
    norms = [(n, index) for n, index in layers if isinstance(n, nn.modules.batchnorm._BatchNorm) and n.affine]
    slices = [(norm.weight.detach().float().abs().cpu(), index) for norm, index in norms]
    return channel_importance(slices) if slices else None


def median_distances(filters: Tensor) -> Tensor:
    """Return for each row of `filters` (n, size) the sum of its distances to all others: small near their median.

    Source: He et al., 2019 (FPGM), arXiv:1811.00250.
    """
    exact = "donot_use_mm_for_euclid_dist"  # the quick way loses the small distances, which are what counts here
    return torch.cdist(filters, filters, compute_mode=exact).sum(1)


def median_scores(group: ChannelGroup, weights: dict[str, Tensor]) -> Tensor:
    """Score channels by how far their filters lie from those of the other channels, in each layer that makes them."""
    scores = torch.zeros(len(group))
    for member in group.members:
        if member.role != "in" and member.layer in weights:
            filters = weights[member.layer].float().cpu().movedim(dict(member.tensors)["weight"], 0)
            scores += median_distances(filters.flatten(1)[member.index].flatten(1))
    return scores


def taylor_products(model: nn.Module, data: Any) -> list[Products]:
    """Return value × gradient of the loss for every parameter of `model`, by batch of 128 labelled training images.

    Raises ValueError without labelled images.
    """
    if not hasattr(data, "train"):
        raise ValueError('The criterion "taylor" needs images with labels: pass a data set from load_data.')
    plain = bake_weights(clone(model)).float().requires_grad_(True)
    parameters = dict(plain.named_parameters())
    products = []
    for images, labels in data.train.take(CALIBRATION_IMAGES, seed=0).batches(16):
        device = next(iter(parameters.values())).device
        loss = F.cross_entropy(plain(images.to(device)), labels.to(device))
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        pairs = zip(parameters.items(), gradients, strict=True)
        made = {name: (value * slope).detach().cpu() for (name, value), slope in pairs if slope is not None}
        products.append({(name.rpartition(".")[0], name.rpartition(".")[2]): value for name, value in made.items()})
    return products


def taylor_scores(group: ChannelGroup, weights: dict[str, Tensor], products: list[Products]) -> Tensor:
    """Score channels by the squared first-order change of the loss without their filters, averaged over batches.

    In each layer that makes the channel, value × gradient is summed over the channel's weights and bias, and squared.
    Source: Molchanov et al., 2019, arXiv:1906.10771.
    """
    total = torch.zeros(len(group))
    for member in group.members:
        if member.role == "in" or member.layer not in weights:
            continue
        for found in products:
            places = [(found[member.layer, name], dim) for name, dim in member.tensors if (member.layer, name) in found]
            sums = [slice_sums(values, dim)[member.index].sum(1) for values, dim in places]
            total += torch.stack(sums).sum(0).square() if sums else 0
    return total / len(products)
