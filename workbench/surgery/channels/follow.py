"""Follow the channels of a traced model from operation to operation.

Every tensor that passes through carries `Channels`: along which dimension its channels lie, and the name of each.
A layer gives its outputs new names; an operation passes names on, joins them, or pins them when they cannot change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from workbench.surgery.channels.cut import stored_tensors
from workbench.surgery.channels.names import ChannelNames
from workbench.surgery.channels.operations import (
    ELEMENTWISE,
    ELEMENTWISE_LAYERS,
    POOL_LAYERS,
    POOLING,
    REARRANGING,
    REDUCING,
    RESHAPING,
    SHAPELESS,
)
from workbench.surgery.channels.tracing import where


@dataclass(frozen=True)
class Channels:
    """The channels of a tensor: their dimension, counted from the left, and their names in order."""

    axis: int
    names: np.ndarray


@dataclass(frozen=True)
class Extent:
    """A number, such as `x.shape[1]`, that counts these channels."""

    names: np.ndarray


@dataclass(frozen=True)
class Shape:
    """The shape of a tensor whose channels are known."""

    channels: Channels


@dataclass(frozen=True)
class Slot:
    """Places in a layer's tensors that carry channels: `names[i]` is the channel at place i. See `Member`."""

    layer: str
    role: str
    tensors: tuple[tuple[str, int], ...]
    names: np.ndarray


class ChannelFollower(fx.Interpreter):
    """Run a traced model once, and learn which channels each layer makes, reads and passes on."""

    def __init__(self, graph: fx.GraphModule, names: ChannelNames):
        super().__init__(graph)
        self.names = names
        self.known: dict[fx.Node, Any] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.slots: list[Slot] = []
        self._by_layer: dict[tuple[str, str], Slot] = {}
        self._by_tensor: dict[tuple[int, int], np.ndarray] = {}

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = super().run_node(n)
        if isinstance(result, (Tensor, torch.Size)):
            self.shapes[n] = tuple(result.shape) if isinstance(result, Tensor) else tuple(result)
        try:
            self.known[n] = self._follow(n, args, kwargs, result)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            self.known[n] = self._call_unforeseen(n)
        return result

    def _call_unforeseen(self, n: fx.Node) -> None:
        """An operation that is called in a way the rules do not foresee holds all channels it touches."""
        for slot in self.slots:
            if n.op == "call_module" and slot.layer == n.target:
                self.names.pin(slot.names, f"they pass through {where(n)}, which is called in an unusual way")
        return self._give_up(n)

    # ------------------------------------------------------------------ what each kind of node does

    def _follow(self, n: fx.Node, args: tuple, kwargs: dict, result: Any) -> Any:
        if n.op == "placeholder":
            return None
        if n.op == "get_attr":
            return self._parameter(n, result)
        if n.op == "output":
            return self._pin_inputs(n, "these are the model's outputs")
        if n.op == "call_module":
            return self._layer(n, self.fetch_attr(n.target), args, result)
        name = n.target if n.op == "call_method" else getattr(n.target, "__name__", str(n.target))
        return self._operation(n, name.strip("_") if not name.startswith("__") else name, args, kwargs, result)

    def _operation(self, n: fx.Node, name: str, args: tuple, kwargs: dict, result: Any) -> Any:
        source = self.known.get(n.args[0]) if n.args and isinstance(n.args[0], fx.Node) else None
        if name == "getitem" and isinstance(source, list) and isinstance(n.args[1], int):
            return source[n.args[1]]
        if name in ("size", "getattr", "getitem") and isinstance(source, (Channels, Shape)):
            looked_up = self._look_up(n, name, source)
            if looked_up is not NotImplemented:
                return looked_up
        if isinstance(result, (int, float)) and not isinstance(result, bool):
            return self._arithmetic(n)
        if name in ("cat", "concat", "concatenate"):
            return self._concatenate(n, args, kwargs, result)
        if name == "stack":
            return self._stack(n, args, kwargs, result)
        if name in ELEMENTWISE:
            return self._elementwise(n, result)
        if not isinstance(source, Channels):
            return self._give_up(n)
        if self._others_known(n) and name not in RESHAPING:
            return self._give_up(n)
        if name in SHAPELESS:
            return None
        if name in POOLING:
            return self._pool(n, source, args[0], result)
        if name in RESHAPING:
            return self._reshape(n, source, args, kwargs, _sizes(n, name))
        if name in REARRANGING:
            return self._rearrange(n, source, args, kwargs)
        if name in REDUCING:
            return self._reduce(n, source, args, kwargs, result)
        if name in ("softmax", "log_softmax", "normalize"):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 1)
            return source if dim % result.dim() != source.axis else self._give_up(n)
        return self._give_up(n)

    def _layer(self, n: fx.Node, layer: nn.Module, args: tuple, result: Any) -> Any:
        source = self.known.get(n.args[0]) if n.args else None
        x = args[0] if args else None
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return self._convolution(n, layer, source, x, result)
        if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)) and layer.groups == 1:
            return self._weighted(n, layer, source, x.dim() - layer.weight.dim() + 1, {"in": 0, "out": 1}, result)
        if isinstance(layer, nn.Linear):
            return self._weighted(n, layer, source, x.dim() - 1, {"in": 1, "out": 0}, result)
        if isinstance(layer, nn.Embedding) and layer.max_norm is None:
            names = self._slot(n.target, "out", (("weight", 1),), layer.embedding_dim)
            return Channels(result.dim() - 1, names)
        if isinstance(layer, ELEMENTWISE_LAYERS):
            return self._elementwise(n, result)
        if not isinstance(source, Channels):
            return self._give_up(n)
        if isinstance(layer, POOL_LAYERS) and isinstance(result, Tensor):
            return self._pool(n, source, x, result)
        if isinstance(layer, nn.Flatten):
            return self._reshape(n, source, args, {}, None, call=layer)
        if isinstance(layer, nn.Unflatten):
            return self._give_up(n)
        if isinstance(layer, (nn.Softmax, nn.LogSoftmax)) and layer.dim is not None:
            return source if layer.dim % x.dim() != source.axis else self._give_up(n)
        return self._norm(n, layer, source, x)

    def _norm(self, n: fx.Node, layer: nn.Module, source: Channels, x: Tensor) -> Channels | None:
        """Layers with one number for each channel, which pass the channels on."""
        vectors = (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0))
        if isinstance(layer, (nn.modules.batchnorm._NormBase)) and source.axis == 1:
            return self._pass_on(n, vectors, source)
        if isinstance(layer, nn.GroupNorm) and source.axis == 1:
            size = layer.num_channels // layer.num_groups
            if size > 1:  # equally many channels stay in each group
                self._join_rows(source.names.reshape(layer.num_groups, size))
            return self._pass_on(n, vectors[:2], source)
        if hasattr(layer, "normalized_shape"):
            dim = source.axis - (x.dim() - len(layer.normalized_shape))
            return source if dim < 0 else self._pass_on(n, (("weight", dim), ("bias", dim)), source)
        if isinstance(layer, nn.PReLU):
            return source if layer.num_parameters == 1 else self._pass_on(n, (("weight", 0),), source)
        return self._give_up(n)

    # ------------------------------------------------------------------ layers

    def _convolution(self, n, layer, source, x, result):
        axis = x.dim() - layer.weight.dim() + 1  # one less without a batch dimension
        if layer.groups == 1:
            return self._weighted(n, layer, source, axis, {"in": 1, "out": 0}, result)
        wide = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        incoming = self._incoming(n, source, axis, layer.in_channels).reshape(layer.groups, wide[0])
        if layer.groups >= max(wide[0], 2):  # many small groups (depthwise too): remove whole groups
            outgoing = self._slot(n.target, "both", (("weight", 0), ("bias", 0)), layer.out_channels)
            self._join_rows(np.concatenate([incoming, outgoing.reshape(layer.groups, wide[1])], axis=1).T)
        else:  # few large groups: remove equally many channels from each
            self._join_rows(incoming)
            self._slot(n.target, "in", (("weight", 1),), wide[0], incoming[0])
            outgoing = self._slot(n.target, "out", (("weight", 0), ("bias", 0)), layer.out_channels)
            self._join_rows(outgoing.reshape(layer.groups, wide[1]))
        self._pin_if_unusual(n, layer, incoming, outgoing)
        return Channels(axis, outgoing)

    def _weighted(self, n, layer, source, axis, dims, result):
        """A layer that mixes all its input channels into new output channels."""
        incoming = self._incoming(n, source, axis, layer.weight.shape[dims["in"]])
        incoming = self._slot(n.target, "in", (("weight", dims["in"]),), len(incoming), incoming)
        outgoing = self._slot(n.target, "out", (("weight", dims["out"]), ("bias", 0)), layer.weight.shape[dims["out"]])
        self._pin_if_unusual(n, layer, incoming, outgoing)
        return Channels(axis, outgoing)

    def _incoming(self, n, source, axis, count):
        """Return the names of a layer's input channels; names that lie elsewhere, or are unknown, are pinned."""
        if isinstance(source, Channels) and source.axis == axis:
            return source.names
        if isinstance(source, Channels):
            self.names.pin(source.names, f"their dimension is mixed by {where(n)}")
        return self._fixed(count, "these are the model's inputs, or come from a part that is not followed")

    def _pin_if_unusual(self, n, layer, *names):
        reason = _unusual(layer)
        for each in names if reason else ():
            self.names.pin(each, reason)

    def _pass_on(self, n, tensors, source):
        self._slot(n.target, "both", tensors, len(source.names), source.names)
        return source

    def _slot(self, layer: str, role: str, tensors: tuple, count: int, names: np.ndarray | None = None) -> np.ndarray:
        """Return the names at a layer's places; called again (a shared layer), the old and new names are one."""
        slot = self._by_layer.get((layer, role))
        if slot is None:
            slot = Slot(layer, role, tensors, self.names.fresh(count) if names is None else names)
            self._by_layer[layer, role] = slot
            self.slots.append(slot)
            self._join_tied(slot)
        if names is not None:
            self.names.join(slot.names, names)
        return slot.names

    def _join_tied(self, slot: Slot) -> None:
        """Join with the places of another layer that uses the same tensor."""
        owner = self.module.get_submodule(slot.layer)
        for name, dim in slot.tensors:
            tensor = (
                owner.parametrizations[name].original
                if parametrize.is_parametrized(owner, name)
                else getattr(owner, name, None)
            )
            if isinstance(tensor, Tensor):
                first = self._by_tensor.setdefault((id(tensor), dim), slot.names)
                self.names.join(first, slot.names)

    def _parameter(self, n: fx.Node, value: Any) -> Channels | None:
        """A parameter used by itself carries channels along its last dimension that is longer than one."""
        if not isinstance(value, nn.Parameter):
            return None
        long = [dim for dim, size in enumerate(value.shape) if size > 1]
        if not long:
            return None
        owner, _, name = n.target.rpartition(".")
        names = self._slot(owner, f"parameter {name}", ((name, long[-1]),), value.shape[long[-1]])
        return Channels(long[-1], names)

    # ------------------------------------------------------------------ operations

    def _elementwise(self, n: fx.Node, result: Any) -> Channels | None:
        """Channels that meet in one element are one channel; tensors broadcast from the right."""
        if not isinstance(result, Tensor):
            return self._give_up(n)
        operands = [(self.known.get(node), self.shapes.get(node, ())) for node in n.all_input_nodes]
        tracked = [(c, shape) for c, shape in operands if isinstance(c, Channels)]
        if not tracked:
            return self._give_up(n)
        sides = {len(shape) - c.axis for c, shape in tracked}
        if len(sides) > 1 or any(isinstance(c, (Extent, Shape)) for c, _ in operands):
            return self._give_up(n)
        side = sides.pop()
        count = result.shape[-side]
        if any(len(c.names) != count for c, _ in tracked):
            return self._give_up(n)
        names = tracked[0][0].names
        for channels, shape in operands:
            if isinstance(channels, Channels):
                self.names.join(names, channels.names)
            elif len(shape) >= side and shape[-side] > 1:
                self.names.pin(names, f"they meet values of fixed size in {where(n)}")
        return Channels(result.dim() - side, names)

    def _concatenate(self, n, args, kwargs, result):
        nodes = n.args[0] if n.args else n.kwargs["tensors"]
        if isinstance(nodes, fx.Node):
            return self._give_up(n)
        dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0)) % result.dim()
        known = [self.known.get(node) for node in nodes]
        axes = {c.axis for c in known if isinstance(c, Channels)}
        if not axes:
            return self._give_up(n)
        if axes != {dim}:
            return self._join_all(n, known, axes)
        fixed = "they come from a part that is not followed"
        parts = [
            c.names if c else self._fixed(self.shapes[node][dim], fixed) for c, node in zip(known, nodes, strict=True)
        ]
        return Channels(dim, np.concatenate(parts))

    def _stack(self, n, args, kwargs, result):
        known = [self.known.get(node) for node in n.args[0]]
        axes = {c.axis for c in known if isinstance(c, Channels)}
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % result.dim()
        joined = self._join_all(n, known, axes) if axes else None
        return joined and Channels(joined.axis + (dim <= joined.axis), joined.names)

    def _join_all(self, n, known, axes):
        """Tensors laid side by side along another dimension than that of their channels."""
        if len(axes) > 1 or not all(isinstance(c, Channels) for c in known):
            return self._give_up(n)
        for other in known[1:]:
            self.names.join(known[0].names, other.names)
        return known[0]

    def _pool(self, n, source, x, result):
        """An operation on the dimensions after the channels, which stay."""
        same = (
            isinstance(result, Tensor)
            and result.dim() == x.dim()
            and result.shape[: source.axis + 1] == x.shape[: source.axis + 1]
        )
        return source if same and source.axis <= 1 else self._give_up(n)

    def _reshape(self, n, source, args, kwargs, sizes, call=None):
        """Lay the elements out in another shape; a size written as a number cannot shrink with the channels.

        sizes: the size arguments, numbers or nodes; None when they follow from the input (flatten).
        """
        probe = _probe(source, args[0])
        laid = self._rerun(n, (probe, *args[1:]), kwargs, call)
        varying = _varying(laid)
        free = [d for d in varying if sizes is None or self._follows(sizes[d], source)]
        for dim, size in enumerate(sizes or ()):
            if dim not in free and isinstance(self.known.get(size) if isinstance(size, fx.Node) else None, Extent):
                self.names.pin(self.known[size].names, f"they set another dimension in {where(n)}")
        if len(free) != 1:
            self.names.pin(source.names, f"their number is fixed in {where(n)}")
            return None
        rows = np.moveaxis(source.names[laid], free[0], -1)
        for dim in reversed(range(rows.ndim - 1)):
            if dim not in [v if v < free[0] else v - 1 for v in varying if v != free[0]]:
                rows = rows.take(0, axis=dim)
        rows = rows.reshape(-1, rows.shape[-1])
        self._join_rows(rows)
        return Channels(free[0], rows[0])

    def _follows(self, size: Any, source: Channels) -> bool:
        """True if a size argument shrinks together with the channels of `source`."""
        if not isinstance(size, fx.Node):
            return size == -1
        extent = self.known.get(size)
        if not isinstance(extent, Extent):
            return False
        return set(self.names.roots(extent.names)) == set(self.names.roots(source.names))

    def _rearrange(self, n, source, args, kwargs):
        """Move dimensions, pick, split: done once more on the numbers of the channels to see where each one went."""
        laid = self._rerun(n, (_probe(source, args[0]), *args[1:]), kwargs)
        parts = laid if isinstance(laid, (tuple, list)) else [laid]
        found = [self._located(part, source) for part in parts]
        whole = np.arange(len(source.names))
        if all(f is not None and np.array_equal(f[1], whole) for f in found):
            passed = [Channels(f[0], source.names) for f in found]
        elif n.target == "chunk" or getattr(n.target, "__name__", "") == "chunk":
            passed = self._equal_parts(n, found, source)
        else:
            self.names.pin(source.names, f"a fixed choice of them is made in {where(n)}")
            passed = [f and Channels(f[0], source.names[f[1]]) for f in found]
        return passed if isinstance(laid, (tuple, list)) else passed[0]

    def _equal_parts(self, n, found, source):
        """Channels split into equal parts stay equal when the same places go from each."""
        if any(f is None or len(f[1]) != len(found[0][1]) for f in found):
            self._give_up(n)
            return [None] * len(found)
        parts = [Channels(axis, source.names[places]) for axis, places in found]
        self._join_rows(np.stack([part.names for part in parts]))
        return parts

    def _located(self, laid: np.ndarray, source: Channels):
        """Return (dimension, channel numbers along it), or None if they do not lie along one dimension."""
        varying = _varying(laid)
        if len(varying) != 1:
            return None
        line = np.moveaxis(laid, varying[0], -1).reshape(-1, laid.shape[varying[0]])[0]
        return varying[0], line

    def _rerun(self, n, args, kwargs, call=None):
        if call is not None:
            out = call(args[0])
        elif n.op == "call_method":
            method = "reshape" if n.target == "view" else n.target  # the probe's memory may not allow a view
            out = getattr(args[0], method)(*args[1:], **kwargs)
        else:
            out = n.target(*args, **kwargs)
        return [part.numpy() for part in out] if isinstance(out, (tuple, list)) else out.numpy()

    def _reduce(self, n, source, args, kwargs, result):
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dims is None or not isinstance(result, Tensor):
            return self._give_up(n)
        rank = args[0].dim()
        dims = {d % rank for d in (dims if isinstance(dims, (tuple, list)) else [dims])}
        if source.axis in dims:
            return self._give_up(n)
        gone = 0 if result.dim() == rank else sum(d < source.axis for d in dims)
        return Channels(source.axis - gone, source.names)

    # ------------------------------------------------------------------ shapes and numbers

    def _look_up(self, n: fx.Node, name: str, source: Channels | Shape) -> Any:
        """Follow `x.shape`, `x.size(1)`, `shape[1]`; other look-ups are not for here."""
        if isinstance(source, Shape):
            channels, dim = source.channels, n.args[1]
            if isinstance(dim, int):
                return Extent(channels.names) if dim % len(self.shapes[n.args[0]]) == channels.axis else None
            picked = range(len(self.shapes[n.args[0]]))[dim] if isinstance(dim, slice) else [channels.axis]
            return None if channels.axis not in picked else NotImplemented
        if name == "getitem":
            return NotImplemented
        if name == "size" and (len(n.args) > 1 or n.kwargs):
            dim = n.args[1] if len(n.args) > 1 else n.kwargs["dim"]
            return Extent(source.names) if dim % len(self.shapes[n.args[0]]) == source.axis else None
        if name == "size" or n.args[1] == "shape":
            return Shape(source)
        return None if n.args[1] in SHAPELESS else NotImplemented

    def _arithmetic(self, n: fx.Node) -> Extent | None:
        """Numbers computed from a count of channels are such a count too; two different counts hold both."""
        extents = [self.known[node] for node in n.all_input_nodes if self.known.get(node) is not None]
        if len(extents) == 1 and isinstance(extents[0], Extent):
            return extents[0]
        return None if not extents or getattr(n.target, "__name__", n.target) in SHAPELESS else self._give_up(n)

    # ------------------------------------------------------------------ helpers

    def _others_known(self, n: fx.Node) -> bool:
        return any(self.known.get(node) is not None for node in n.all_input_nodes if node is not n.args[0])

    def _join_rows(self, rows: np.ndarray) -> None:
        for row in rows[1:]:
            self.names.join(rows[0], row)

    def _fixed(self, count: int, reason: str) -> np.ndarray:
        names = self.names.fresh(count)
        self.names.pin(names, reason)
        return names

    def _give_up(self, n: fx.Node) -> None:
        return self._pin_inputs(n, f"they pass through {where(n)}, which is not followed")

    def _pin_inputs(self, n: fx.Node, reason: str) -> None:
        for node in n.all_input_nodes:
            for known in _flat(self.known.get(node)):
                channels = known.channels if isinstance(known, Shape) else known
                self.names.pin(channels.names, reason)


def _flat(known: Any) -> list:
    if known is None:
        return []
    return [k for part in known for k in _flat(part)] if isinstance(known, (list, tuple)) else [known]


def _sizes(n: fx.Node, name: str) -> list | None:
    """Return the size arguments of a reshape, numbers or nodes; None for flatten."""
    if name == "flatten":
        return None
    rest = list(n.args[1:]) or [n.kwargs.get("shape", n.kwargs.get("size", ()))]
    return list(rest[0]) if isinstance(rest[0], (tuple, list)) else rest


def _probe(source: Channels, x: Tensor) -> Tensor:
    """Return a tensor like `x` that holds, at each element, the number of its channel."""
    shape = [1] * x.dim()
    shape[source.axis] = -1
    return torch.arange(len(source.names)).reshape(shape).expand(x.shape)


def _varying(laid: np.ndarray) -> list[int]:
    """Return the dimensions along which the channel number changes."""
    return [d for d in range(laid.ndim) if laid.shape[d] > 1 and (laid != laid.take([0], axis=d)).any()]


def _unusual(layer: nn.Module) -> str | None:
    """Return why a layer's weight cannot be cut, or None: it must be a plain parameter under tensors of known shape."""
    if not parametrize.is_parametrized(layer, "weight"):
        plain = isinstance(layer._parameters.get("weight"), nn.Parameter)
        return None if plain else "its weight is computed from other tensors (weight or spectral norm)"
    stack = layer.parametrizations.weight
    if not isinstance(getattr(stack, "original", None), Tensor):
        return "its weight is computed from several tensors"
    full = stack.original.shape
    for each in stack:
        axis = getattr(each, "axis", None)
        along = () if axis is None else full[axis : axis + 1]
        whole = getattr(each, "whole", ())  # names of tensors that all channels share, as the levels of a codebook
        tensors = [tensor for name, tensor in stored_tensors(each).items() if name not in whole]
        if any(t.dim() and t.shape not in (full, along) for t in tensors):
            return f"{type(each).__name__} on its weight holds tensors of another shape"
    return None
