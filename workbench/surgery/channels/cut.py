"""Remove channels: smaller tensors in the layers, and the layers' own numbers set to fit."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def cut_channels(model: nn.Module, cuts: Iterable[tuple]) -> nn.Module:
    """Remove channels from `model` in place and return it.

    `cuts`: pairs of a `ChannelGroup` and a boolean tensor (channels,) that is true where a channel stays.
    Parametrizations on a weight (masks, quantizers) are cut with it.
    """
    removed = defaultdict(list)  # (layer, role, tensors) -> places to remove
    for group, keep in cuts:
        for member in group.members:
            removed[member.layer, member.role, member.tensors].append(member.index[~keep].flatten())
    kept = defaultdict(dict)  # (layer, tensor) -> dimension -> places to keep
    roles = {}
    for (name, role, tensors), places in removed.items():
        layer = model.get_submodule(name)
        size = _size(layer, tensors[0])
        stays = torch.ones(size, dtype=torch.bool)
        stays[torch.cat(places)] = False
        roles[name, role, tensors] = int(stays.sum())
        for tensor, dim in tensors:
            kept[name, tensor][dim] = stays.nonzero().flatten()
    _resize_layers(model, roles)
    made: dict[int, tuple[Tensor, Tensor]] = {}  # tied weights stay tied
    for (name, tensor), dims in kept.items():
        _cut_tensor(model.get_submodule(name), tensor, dims, made)
    return model


def _size(layer: nn.Module, place: tuple[str, int]) -> int:
    """Return the size of a tensor's dimension, also for a norm that has no tensors."""
    tensor = getattr(layer, place[0], None)
    if isinstance(tensor, Tensor):
        return tensor.shape[place[1]]
    if hasattr(layer, "normalized_shape"):
        return layer.normalized_shape[place[1]]
    return layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.num_features


def _resize_layers(model: nn.Module, roles: dict[tuple, int]) -> None:
    for (name, role, tensors), count in roles.items():
        layer = model.get_submodule(name)
        if isinstance(layer, _CONVOLUTIONS + _TRANSPOSED):
            _resize_convolution(layer, role, count)
        elif isinstance(layer, nn.Linear):
            setattr(layer, "out_features" if role == "out" else "in_features", count)
        elif isinstance(layer, nn.GroupNorm):
            layer.num_groups = count if layer.num_groups == layer.num_channels else layer.num_groups
            layer.num_channels = count
        elif hasattr(layer, "normalized_shape"):
            shape = list(layer.normalized_shape)
            shape[tensors[0][1]] = count
            layer.normalized_shape = tuple(shape)
        else:
            for attribute in ("num_features", "num_parameters", "embedding_dim"):
                if hasattr(layer, attribute):
                    setattr(layer, attribute, count)


def _resize_convolution(layer: nn.Module, role: str, count: int) -> None:
    if role == "out":
        layer.out_channels = count
    elif role == "in":
        layer.in_channels = count * layer.groups
    else:  # whole groups of the convolution went, inputs and outputs alike
        groups = count // (layer.out_channels // layer.groups)
        layer.in_channels = layer.in_channels // layer.groups * groups
        layer.out_channels, layer.groups = count, groups


def _cut_tensor(layer: nn.Module, name: str, dims: dict[int, Tensor], made: dict[int, tuple[Tensor, Tensor]]) -> None:
    """Keep the given places of a parameter or buffer, and of everything stacked on it."""
    if parametrize.is_parametrized(layer, name):
        stack = layer.parametrizations[name]
        full = stack.original.shape
        _cut_stored(stack, "original", dims, made)
        for parametrization in stack:
            _cut_parametrization(parametrization, full, dims, made)
    elif getattr(layer, name, None) is not None:
        _cut_stored(layer, name, dims, made)


def _cut_parametrization(parametrization: nn.Module, full: torch.Size, dims: dict[int, Tensor], made: dict) -> None:
    """Cut tensors that have the weight's shape along all dimensions, and per-channel vectors along their axis."""
    axis = getattr(parametrization, "axis", None)
    for name, tensor in stored_tensors(parametrization).items():
        if tensor.shape == full:
            _cut_stored(parametrization, name, dims, made)
        elif axis in dims and tensor.shape == full[axis : axis + 1]:
            _cut_stored(parametrization, name, {0: dims[axis]}, made)


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's own parameters and buffers by name."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _cut_stored(owner: nn.Module, name: str, dims: dict[int, Tensor], made: dict[int, tuple[Tensor, Tensor]]) -> None:
    old = getattr(owner, name)
    if id(old) not in made:
        new = old.detach()
        for dim, places in dims.items():
            new = new.index_select(dim, places.to(new.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        made[id(old)] = (old, new)  # holding the old tensor keeps its id from being given to another
    store = owner._parameters if name in owner._parameters else owner._buffers
    store[name] = made[id(old)][1]
