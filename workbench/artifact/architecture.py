"""Which layers a model has: written down as a table of names and constructor arguments, and built again from it.

A row is `["Conv2d", 1, 32, 3, {"padding": 1}]` for the layers of torch.nn that may be built again,
`["own", "MyNet", {tensor: shape}]` for anything else, which only `like` can supply, and `["same", "block.0"]` for a
layer that is used under a second name. Nothing in a file names code to run.
"""

from __future__ import annotations

import inspect
import json
import numbers
import zlib
from collections.abc import Collection, Iterator
from functools import cache, lru_cache
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from workbench import weights
from workbench.artifact.format import ArtifactError
from workbench.models import MODELS, build
from workbench.surgery import Parallel, clone, model_class

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, Parallel)
MAY_STAND_IN = ("Sequential", "Parallel", "Identity")  # what compression puts where a layer was
# fmt: off
BUILDABLE = {kind.__name__: kind for kind in (
    *CONTAINERS,
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Embedding, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softmax, nn.LogSoftmax,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Flatten, nn.Upsample, nn.PixelShuffle,
    nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d,
)}
# fmt: on
_NOT_SETTINGS = {"self", "device", "dtype", "_weight", "_freeze"}
_PER_DIMENSION = {"kernel_size", "stride", "padding", "output_padding", "dilation"}  # (3, 3) says the same as 3

Spec = list  # one row of the table
Table = dict[str, Spec]  # layer name -> row, parents before children, "" is the model itself


def walk(model: nn.Module, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, layer) of the model and all layers in it, without parametrizations and input quantizers.

    A layer that is used under two names comes twice, what is inside it once.
    """
    yield name, model
    seen = set() if seen is None else seen
    if id(model) in seen:
        return
    seen.add(id(model))
    for child_name, child in model._modules.items():
        if child is None or isinstance(child, weights.InputQuantizer) or _holds_parametrizations(model, child_name):
            continue
        yield from walk(child, f"{name}.{child_name}" if name else child_name, seen)


def distinct(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, layer) of every layer once, in the order of `walk`."""
    seen = {}
    for name, layer in walk(model):
        seen.setdefault(id(layer), (name, layer))
    return list(seen.values())


def _holds_parametrizations(layer: nn.Module, child_name: str) -> bool:
    return child_name == "parametrizations" and parametrize.is_parametrized(layer)


def tensor_names(layer: nn.Module) -> list[str]:
    """Return the sorted names of the layer's own parameters and persistent buffers that inference needs."""
    names = {name for name, value in layer._parameters.items() if value is not None}
    names |= {name for name, value in layer._buffers.items() if value is not None}
    names -= {*layer._non_persistent_buffers_set, "num_batches_tracked"}
    if parametrize.is_parametrized(layer):
        names |= set(layer.parametrizations)
    return sorted(names)


def tensor_shapes(layer: nn.Module) -> dict[str, list[int]]:
    """Return the shapes of the layer's own tensors by name; raises ArtifactError for lazy ones without a shape."""
    try:
        return {name: list(_shape(layer, name)) for name in tensor_names(layer)}
    except RuntimeError:
        raise ArtifactError(f"{layer} has no shape yet; run the model once on an example before saving it.") from None


def _shape(layer: nn.Module, name: str) -> torch.Size:
    """Return the tensor's shape, without computing a parametrized one where torch ensures that it stays the same."""
    if parametrize.is_parametrized(layer, name):
        stack = layer.parametrizations[name]
        if hasattr(stack, "original") and not stack.unsafe:
            return stack.original.shape
    return getattr(layer, name).shape


# --- writing the table ----------------------------------------------------------------------------------------------


def layer_table(model: nn.Module) -> Table:
    """Return the table of all layers, parents before children."""
    table, names = {}, {}
    for name, layer in walk(model):
        first = names.setdefault(id(layer), name)
        table[name] = layer_spec(layer) if first == name else ["same", first]
    return table


def layer_spec(layer: nn.Module) -> Spec:
    """Return the row of one layer: buildable if a layer built from it has the same tensors, else "own"."""
    kind, shapes = model_class(layer), tensor_shapes(layer)
    if BUILDABLE.get(kind.__name__) is kind:
        spec = _buildable_spec(layer, kind)
        if spec is not None and _shapes_of(json.dumps(spec)) == shapes:
            return spec
    return ["own", kind.__name__, *([shapes] if shapes else [])]


def _buildable_spec(layer: nn.Module, kind: type) -> Spec | None:
    if kind in CONTAINERS:
        return [kind.__name__, *layer._modules]
    required, optional = _arguments(kind)
    try:
        values = {name: _plain(name, _value(layer, name, optional)) for name in (*required, *optional)}
    except TypeError:
        return None
    changed = {name: values[name] for name in optional if values[name] != _plain(name, optional[name])}
    return [kind.__name__, *(values[name] for name in required), *([changed] if changed else [])]


@cache
def _arguments(kind: type) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the constructor's required names and its optional ones with their defaults."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    known = [p for p in parameters if p.name not in _NOT_SETTINGS and p.kind is p.POSITIONAL_OR_KEYWORD]
    required = tuple(p.name for p in known if p.default is p.empty)
    return required, {p.name: p.default for p in known if p.default is not p.empty}


def _value(layer: nn.Module, name: str, optional: dict[str, Any]) -> Any:
    value = getattr(layer, name, optional.get(name))
    return value is not None if name == "bias" else value


def _plain(name: str, value: Any) -> Any:
    """Return the value as JSON holds it; raises TypeError for anything but numbers, words and lists of them."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} is {value!r}")
    values = [_plain(name, v) for v in value]
    return values[0] if name in _PER_DIMENSION and len(set(map(str, values))) == 1 else values


@lru_cache(maxsize=4096)
def _shapes_of(spec: str) -> dict[str, list[int]]:
    """Return the tensor shapes that a layer built from this row would have, without allocating them."""
    return tensor_shapes(build_layer(json.loads(spec), "meta"))


def count_numbers(table: Table) -> int:
    """Return how many numbers the tensors of all layers in the table hold, without allocating any."""
    return sum(prod(shape) for spec in table.values() for shape in _shapes(spec).values())


def _shapes(spec: Spec) -> dict[str, list[int]]:
    if spec[0] in ("own", "same"):
        return spec[2] if len(spec) > 2 else {}
    return _shapes_of(json.dumps(spec))


# --- models that can be built by name: only the differences are written ---------------------------------------------


@lru_cache(maxsize=64)
def _base_table(architecture: str) -> Table:
    with torch.device("meta"):
        return layer_table(build(**json.loads(architecture)))


def base_table(architecture: dict[str, Any]) -> Table:
    """Return the table of `models.build(**architecture)`."""
    return _base_table(json.dumps(architecture, sort_keys=True))


def shortened(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `models.build` without those that say what it does anyway; `completed` undoes it."""
    usual = completed({"name": architecture["name"]})
    return {key: value for key, value in architecture.items() if key == "name" or usual.get(key, usual) != value}


def completed(architecture: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of `models.build` that a model remembers, those left out as it takes them."""
    return {"name": architecture["name"], "width": 1.0, "classes": MODELS[architecture["name"]].classes, **architecture}


def fingerprint(table: Table) -> int:
    """Return 16 bits that tell one base from another, so that a later version's base is never taken for it."""
    return zlib.crc32(json.dumps(table).encode()) & 0xFFFF


def difference(base: Table, table: Table) -> Table:
    """Return the rows of `table` that `base` has differently, each followed by all rows inside it."""
    changed = {name for name, spec in table.items() if base.get(name) != spec}
    return {name: spec for name, spec in table.items() if name in changed or _inside(name, changed)}


def patch(base: Table, changes: Table) -> Table:
    """Return `base` with the changed rows; whatever lies inside a changed layer comes from `changes` alone."""
    table = {}
    for name, spec in base.items():
        if name in changes:
            table |= {other: row for other, row in changes.items() if other == name or _inside(other, {name})}
        elif not _inside(name, changes):
            table[name] = spec
    return table


def _inside(name: str, others: Collection[str]) -> bool:
    parents = {name[:i] for i, letter in enumerate(name) if letter == "."} | ({""} if name else set())
    return any(parent in others for parent in parents)


# --- building -------------------------------------------------------------------------------------------------------


def build_layer(spec: Spec, device: str = "cpu") -> nn.Module:
    """Build the layer of one row; a container comes empty. Only the classes in BUILDABLE, only plain arguments."""
    name, *args = spec
    if name not in BUILDABLE:
        raise ArtifactError(f"it asks for a layer of class {name!r}, which is not one that a file may build.")
    kind = BUILDABLE[name]
    if kind in CONTAINERS:
        return kind()
    required, optional = _arguments(kind)
    options = args.pop() if args and isinstance(args[-1], dict) else {}
    if len(args) != len(required) or not options.keys() <= optional.keys():
        raise ArtifactError(f"it gives {name} the arguments {args} {options}, which do not fit; save it again.")
    place = {"device": device} if "device" in inspect.signature(kind.__init__).parameters else {}
    return kind(*map(_tupled, args), **{key: _tupled(value) for key, value in options.items()}, **place)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def assemble(model: nn.Module | None, table: Table) -> nn.Module:
    """Return `model`, changed in place until its layers are those of the table; None starts from the table alone.

    Raises ArtifactError naming the first layer that differs where it may not.
    """
    used = set()
    for name, spec in table.items():
        have = _find(model, name)
        if spec[0] == "same":
            _share(model, name, spec[1])
            continue
        if have is None or id(have) in used or layer_spec(have) != spec:
            _check_replaceable(model, name, have, spec)
            model = _put(model, name, build_layer(spec))
        used.add(id(_find(model, name)))
    for name, _ in walk(model):
        if name not in table:
            raise ArtifactError(f"layer {name!r} is in the given model but not in the file; {_ADVICE}")
    return model


_ADVICE = "pass a model of the class and structure that was saved."


def _find(model: nn.Module | None, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name) if model is not None else None
    except AttributeError:
        return None


def _put(model: nn.Module | None, name: str, layer: nn.Module) -> nn.Module:
    if not name:
        return layer
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent).add_module(child, layer)
    return model


def _share(model: nn.Module, name: str, first: str) -> None:
    """Put the layer called `first` under a second name."""
    layer, parent = model.get_submodule(first), model.get_submodule(name.rpartition(".")[0])
    if any(inner is parent for inner in layer.modules()):
        raise ArtifactError(f"its layer {name!r} lies inside itself; save it again.")
    if _find(model, name) is not layer:
        _put(model, name, layer)


def _check_replaceable(model: nn.Module | None, name: str, have: nn.Module | None, spec: Spec) -> None:
    """Let a layer change its size, or become one of MAY_STAND_IN; other changes mean another architecture."""
    if model is None:
        return
    where = f"layer {name!r}" if name else "the model itself"
    if have is None:
        if type(_find(model, name.rpartition(".")[0])) not in CONTAINERS:
            raise ArtifactError(f"{where} ({_words(spec)}) is in the file but not in the given model; {_ADVICE}")
        return
    old = layer_spec(have)
    dropped = bool(name) and spec == ["Identity"]  # a block that was taken out whole
    if not dropped and ("own" in (old[0], spec[0]) or spec[0] not in (old[0], *MAY_STAND_IN)):
        raise ArtifactError(f"{where} is {_words(spec)} in the file but {_words(old)} in the given model; {_ADVICE}")


def _words(spec: Spec) -> str:
    name, *args = spec[1:] if spec[0] == "own" else spec
    return f"{name}({', '.join(map(str, args))})" if args else name


def bare_copy(model: nn.Module) -> nn.Module:
    """Return a copy on the CPU without parametrizations and input quantizers."""
    model = weights.bake_weights(clone(model).cpu())
    for layer in list(model.modules()):
        if isinstance(getattr(layer, "input_quantizer", None), weights.InputQuantizer):
            del layer.input_quantizer
            for key in [k for k, hook in layer._forward_pre_hooks.items() if hook is weights._quantize_input]:
                del layer._forward_pre_hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)
    return model
