"""Which layers stand directly behind one another, so that a factor can move from one to the next: folding and scaling.

A factor may pass from a layer to the one behind it where everything between them commutes with positive factors, as
ReLU and pooling do, and nobody else reads what lies between. The order of operations comes from a torch.fx trace.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from workbench.surgery import clone, replace_layer, weighted_layers
from workbench.surgery.channels.tracing import trace
from workbench.weights import Mask, stored_tensor, weight_parametrizations

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_WEIGHTED = (nn.Linear, *_CONVOLUTIONS)
# fmt: off
_ELEMENTWISE = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    torch.relu, F.relu, F.leaky_relu, F.dropout, "relu", "relu_", "contiguous",
)
_SPATIAL = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    F.max_pool1d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
)
# fmt: on


@dataclass(frozen=True)
class Pair:
    """A `source` (linear, convolution or BatchNorm) whose channels only the weighted layer `reader` reads, by name."""

    source: str
    reader: str


class _Order:
    """The operations of a model in order, and which of its layers stand alone: called once, under one name."""

    def __init__(self, model: nn.Module):
        self.model = clone(model)
        self.nodes = list(trace(self.model).graph.nodes)
        self.layers = dict(self.model.named_modules())
        calls = Counter(node.target for node in self.nodes if node.op == "call_module")
        names = Counter(id(layer) for _, layer in self.model.named_modules(remove_duplicate=False))
        tensors = Counter(id(stored_tensor(layer)) for _, layer in weighted_layers(self.model))
        self.alone = {
            name
            for name, count in calls.items()
            if count == 1 and names[id(self.layers[name])] == 1 and tensors[id(stored_tensor(self.layers[name]))] <= 1
        }

    def layer(self, node: fx.Node) -> nn.Module | None:
        """Return the layer that a node calls, if it is one that stands alone."""
        return self.layers[node.target] if node.op == "call_module" and node.target in self.alone else None

    def kind(self, node: fx.Node):
        """Return what an operation is: a layer's class, a function, or the name of a method."""
        return _plain_class(self.layers[node.target]) if node.op == "call_module" else node.target


def _plain_class(layer: nn.Module) -> type:
    return type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)


def only_masked(layer: nn.Module) -> bool:
    """True where nothing but masks lies on the layer's weight, so that what lies below may be set."""
    return all(isinstance(p, Mask) for p in weight_parametrizations(layer))


def is_plain(layer: nn.Module) -> bool:
    """True where nothing but masks lies on the layer's weight and nothing on its bias, so that both may be rescaled."""
    return only_masked(layer) and not parametrize.is_parametrized(layer, "bias")


def tied_layers(model: nn.Module) -> list[list[str]]:
    """Return the names of the weighted layers in order, those that share one weight together."""
    found: dict[int, list[str]] = {}
    for name, layer in weighted_layers(model):
        found.setdefault(id(stored_tensor(layer)), []).append(name)
    return list(found.values())


def sources(node: fx.Node) -> fx.Node | None:
    """Return the one node that `node` reads, if nobody else reads it."""
    before = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    return before if before is not None and len(before.users) == 1 else None


def norm_pairs(model: nn.Module) -> list[Pair]:
    """Return each BatchNorm that can be folded as the reader, and the layer directly before it as the source."""
    order, found = _Order(model), []
    for node in order.nodes:
        before = sources(node)
        norm, layer = order.layer(node), before is not None and order.layer(before)
        fits = isinstance(norm, NORMS) and isinstance(layer, _WEIGHTED) and _foldable(layer, norm)
        if fits and (not isinstance(layer, nn.Linear) or _makes_vectors(order, before)):
            found.append(Pair(before.target, node.target))
    return found


def _makes_vectors(order: _Order, node: fx.Node) -> bool:
    """Return whether a flatten before the linear layer at `node` shows that its outputs are (B, features).

    BatchNorm1d normalizes dimension 1, which in (B, tokens, features) is not what the linear layer makes.
    """
    kept = (nn.Linear, nn.BatchNorm1d, *_ELEMENTWISE)
    while order.kind(node) in kept and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return _is_flatten(order.kind(node), node, order)


def _foldable(layer: nn.Module, norm: nn.Module) -> bool:
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    usable = norm.running_mean is not None and not parametrize.is_parametrized(norm)
    return usable and norm.num_features == channels and is_plain(layer)


def fold_norms(model: nn.Module) -> nn.Module:
    """Multiply each BatchNorm into the layer before it, in place, and leave nn.Identity where it stood.

    Layers whose weight is coded already, shared, or read elsewhere keep their norm. Raises TracingError where the model
    cannot be followed. Source: Jacob et al., 2018, arXiv:1712.05877, section 3.2.
    """
    for pair in norm_pairs(model):
        fold_norm(model.get_submodule(pair.source), model.get_submodule(pair.reader))
        replace_layer(model, pair.reader, nn.Identity())
    return model


def fold_norm(layer: nn.Module, norm: nn.Module) -> None:
    """Give `layer` the weight and bias that compute layer and then norm, in eval mode."""
    factor = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        factor = factor * norm.weight.detach()
    bias = -norm.running_mean if layer.bias is None else layer.bias.detach() - norm.running_mean
    bias = bias * factor + (0 if norm.bias is None else norm.bias.detach())
    weight = stored_tensor(layer)
    with torch.no_grad():
        weight.mul_(_along(factor, weight.dim(), 0))
    layer.bias = nn.Parameter(bias.to(weight.dtype))


def scale_pairs(model: nn.Module) -> list[Pair]:
    """Return all pairs between which a positive factor for each channel can be moved without changing the outputs.

    Readers with a quantized input, and layers whose weight is coded already, are left out.
    """
    order, found = _Order(model), []
    for node in order.nodes:
        reader = order.layer(node)
        if isinstance(reader, _WEIGHTED) and is_plain(reader) and not hasattr(reader, "input_quantizer"):
            source = _source_of(order, node, reader)
            if source is not None:
                found.append(Pair(source, node.target))
    return found


def _source_of(order: _Order, node: fx.Node, reader: nn.Module) -> str | None:
    """Walk back from a reader over operations that commute with factors, to the layer that makes its channels."""
    kinds, at = [], sources(node)
    while at is not None and not isinstance(order.layer(at), (*_WEIGHTED, *NORMS)):
        kinds.append((order.kind(at), at))
        at = sources(at)
    if at is None or not is_plain(order.layer(at)):
        return None
    spatial = _has_channels_first(order, at)
    if spatial is None or not all(_commutes(kind, found, order, spatial) for kind, found in kinds):
        return None
    flat = sum(_is_flatten(kind, found, order) for kind, found in kinds)
    fits = _fits(order.layer(at), reader, flat, spatial)
    return at.target if fits else None


def _has_channels_first(order: _Order, node: fx.Node) -> bool | None:
    """True where channels are dimension 1 of images, False where they are the last, None where it is not known."""
    layer = order.layer(node)
    if isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm3d, *_CONVOLUTIONS)):
        return None if getattr(layer, "affine", True) is False else True
    if isinstance(layer, nn.Linear):
        return False
    before = sources(node)
    linear = before is not None and isinstance(order.layer(before), nn.Linear) and layer.affine
    return False if linear and _makes_vectors(order, before) else None


def _commutes(kind, node: fx.Node, order: _Order, spatial: bool) -> bool:
    return kind in _ELEMENTWISE or (spatial and (kind in _SPATIAL or _is_flatten(kind, node, order)))


def _is_flatten(kind, node: fx.Node, order: _Order) -> bool:
    if kind is nn.Flatten:
        layer = order.layers[node.target]
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return kind in (torch.flatten, "flatten") and list(node.args[1:]) == [1] and not node.kwargs


def _fits(source: nn.Module, reader: nn.Module, flattened: int, spatial: bool) -> bool:
    """Say whether the channels of `source` are what the weight of `reader` has along its input axis."""
    channels = channels_of(source)
    if isinstance(reader, nn.Linear):
        return reader.in_features % channels == 0 if spatial and flattened else not spatial and not flattened
    return spatial and not flattened and reader.groups in (1, reader.in_channels) and reader.in_channels == channels


def channels_of(layer: nn.Module) -> int:
    """Return the number of output channels of a linear layer, a convolution or a BatchNorm."""
    return next(getattr(layer, n) for n in ("out_features", "out_channels", "num_features") if hasattr(layer, n))


def _along(factor: Tensor, dims: int, axis: int) -> Tensor:
    shape = [1] * dims
    shape[axis] = -1
    return factor.reshape(shape)


def scale_outputs(layer: nn.Module, factor: Tensor) -> None:
    """Multiply the layer's output channels by `factor` (channels,), in place: its weight and its bias."""
    weight = stored_tensor(layer)
    with torch.no_grad():
        weight.mul_(_along(factor, weight.dim(), 0))
        if layer.bias is not None:
            layer.bias.mul_(factor)


def scale_inputs(layer: nn.Module, factor: Tensor) -> None:
    """Multiply what the layer's weight takes from each input channel by `factor` (channels,), in place."""
    weight = stored_tensor(layer)
    with torch.no_grad():
        weight.mul_(input_factors(layer, factor))


def input_factors(layer: nn.Module, factor: Tensor) -> Tensor:
    """Return one factor for each input channel (channels,) so that it broadcasts against the layer's weight."""
    weight = stored_tensor(layer)
    if getattr(layer, "groups", 1) > 1:  # depthwise: the outputs of a channel read that channel alone
        return _along(factor.repeat_interleave(len(weight) // len(factor)), weight.dim(), 0)
    return _along(factor.repeat_interleave(weight.shape[1] // len(factor)), weight.dim(), 1)


def input_magnitudes(layer: nn.Module, channels: int) -> Tensor:
    """Return the largest magnitude of the layer's weight for each input channel, (channels,)."""
    weight = layer.weight.detach().abs()
    if getattr(layer, "groups", 1) > 1:
        return weight.reshape(channels, -1).amax(1)
    return weight.transpose(0, 1).reshape(channels, -1).amax(1)
