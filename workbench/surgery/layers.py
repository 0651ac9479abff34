"""Copy a model, find its layers, replace one of them, and remember what was computed from its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.utils import parametrize

T = TypeVar("T")
_REMEMBERED: WeakKeyDictionary[nn.Module, dict[Any, tuple[tuple, Any]]] = WeakKeyDictionary()


class Parallel(nn.Sequential):
    """Layers side by side: each gets the same input, and their outputs are added."""

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(x) for layer in self)


def clone(model: nn.Module) -> nn.Module:
    """Return a deep copy in eval mode that shares no memory with `model`."""
    return copy.deepcopy(model).eval()


def model_class(layer: nn.Module) -> type:
    """Return the class of a layer as it was before something was stacked on its weight."""
    return type(layer).__bases__[0] if parametrize.is_parametrized(layer) else type(layer)


def weighted_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return (name, layer) of every linear and convolution layer with weights, in the order of definition."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, kinds))
    return [(name, layer) for name, layer in found if layer.weight.numel()]


def layers_to_compress(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Do as `weighted_layers` does; raises ValueError where there is no such layer."""
    layers = weighted_layers(model)
    if not layers:
        kind = type(model).__name__
        raise ValueError(
            f"There is no linear or convolution layer in {kind} (Linear and Conv1d to Conv3d are known): there is "
            "nothing to compress."
        )
    return layers


def layer_at(model: nn.Module, name: str) -> nn.Module:
    """Return the layer called `name`, as in `named_modules`."""
    return model.get_submodule(name)


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` where the layer called `name` was, in place; raises AttributeError if there is none."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    if child not in owner._modules:
        raise AttributeError(f"There is no layer called {name!r} to replace.")
    owner._modules[child] = layer


def remembered(model: nn.Module, key: Any, compute: Callable[[], T]) -> T:
    """Return `compute()`, computed once for this model and key as long as the model's tensors stay unchanged.

    This is what makes a slider quick: factors, sorted magnitudes and activation ranges do not depend on it. A tensor
    that is changed through `.data` counts as unchanged, since torch does not count such changes: write
    `with torch.no_grad(): weight.copy_(new)`.
    """
    tensors = [*model.parameters(), *model.buffers()]
    version = tuple((id(t), t.data_ptr(), t._version) for t in tensors)
    store = _REMEMBERED.setdefault(model, {})
    if key not in store or store[key][0] != version:
        store[key] = (version, compute())
    return store[key][1]


def identity(data: Any) -> tuple[int, int]:
    """Return what tells data from others in a key of `remembered`: its id, and how often a tensor was changed in place.

    Keep a reference to the data beside what was computed from it, so that its id is not given to another.
    """
    return id(data), data._version if isinstance(data, Tensor) and not data.is_inference() else 0
