"""Put other layers where one layer was: which layers may go, how a thinner one is made, and how it takes the place."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.surgery import clone, identity, layers_to_compress, model_class, remembered, weighted_layers
from workbench.techniques.moments import second_moments
from workbench.techniques.repair import calibration_batches
from workbench.weights import finite_weight

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
T = TypeVar("T")


def replaceable_layers(model: nn.Module, held: bool = True) -> list[tuple[str, nn.Module]]:
    """Return (name, layer) of each linear and each ungrouped convolution layer that others can stand in for.

    Left out are layers that share a tensor with another layer; that have a forward of their own; whose weight the code
    around them reads, as attention does; and, unless `held`, those that carry a mask, codes or an input quantizer of an
    earlier stage. Raises ValueError where that leaves none of many.
    """
    single = [(name, layer) for name, layer in weighted_layers(model) if getattr(layer, "groups", 1) == 1]
    kept = [] if held else [name for name, layer in single if _is_held(layer)]
    if kept and len(kept) == len(single):
        raise ValueError(
            f"Every layer ({', '.join(kept[:3])}, …) carries a mask or codes of an earlier stage, which new weights "
            "would undo. Put this stage before those that prune, cluster or quantize."
        )
    uses = Counter(id(p) for layer in model.modules() for p in layer._parameters.values() if p is not None)
    return [
        (name, layer)
        for name, layer in single
        if model_class(layer) in PLAIN
        and name not in kept
        and all(uses[id(p)] == 1 for p in layer.parameters())
        and not _is_read(model, name)
    ]


def _is_held(layer: nn.Module) -> bool:
    return parametrize.is_parametrized(layer) or hasattr(layer, "input_quantizer")


def _is_read(model: nn.Module, name: str) -> bool:
    """Return whether code around the layer called `name` reads the weight of a layer of its name."""
    *above, child = name.split(".")
    around = (model.get_submodule(".".join(above[:depth])) for depth in range(len(above) + 1))
    return any(f".{child}.weight" in _code(type(module)) for module in around)


@cache
def _code(kind: type) -> str:
    """Return the source of a class's methods, without those that set weights up."""
    methods = [
        value
        for each in kind.__mro__
        if each not in (nn.Module, object)
        for name, value in vars(each).items()
        if inspect.isfunction(value) and "init" not in name and "reset" not in name
    ]
    try:
        return "".join(map(inspect.getsource, methods))
    except OSError:  # typed at a prompt: there is no file to read
        return ""


def fitted(
    model: nn.Module,
    data: Any,
    key: Any,
    objective: str,
    fit: Callable[[Tensor, Tensor | None], T],
    suits: Callable[[nn.Module], bool] = lambda layer: True,
) -> dict[str, T]:
    """Return `fit(weight, moment)` for each replaceable layer that `suits`, by name; computed once for each `key`.

    `weight`: float32, of the layer's shape. `moment`: the second moment of its inputs on calibration images, or None
    with the objective "weights", without a `Data`, and for layers that `second_moments` leaves out. Raises ValueError
    for a weight with NaN.
    """
    layers_to_compress(model)
    batches = calibration_batches(model, data) if objective == "outputs" else []

    def compute():
        layers = [(name, layer) for name, layer in replaceable_layers(model) if suits(layer)]
        moments = second_moments(clone(model).float(), [b.float() for b in batches]) if batches and layers else {}
        weights = {name: finite_weight(name, layer.weight.detach()).float() for name, layer in layers}
        return data, {name: fit(weight, moments.pop(name, None)) for name, weight in weights.items()}

    return remembered(model, (key, objective, identity(data) if batches else None), compute)[1]


def is_spatial(layer: nn.Module) -> bool:
    """Return whether the layer is a convolution whose kernel is larger than one place."""
    return not isinstance(layer, nn.Linear) and layer.weight[0, 0].numel() > 1


def thin(layer: nn.Module, weight: Tensor, *, along: str | int = "none", groups: int = 1, last: bool = False):
    """Return a layer like `layer` with another `weight`; the `last` of several takes its bias over.

    `along` says on which axes of the image it moves with the kernel, stride, padding and dilation of `layer`: "all",
    one axis by its number, or "none" for a pointwise one.
    """
    outputs, inputs, bias = weight.shape[0], weight.shape[1] * groups, last and layer.bias is not None
    if isinstance(layer, nn.Linear):
        made = nn.Linear(inputs, outputs, bias=bias, device="meta")
    else:
        kernel, options = _geometry(layer, along)
        made = model_class(layer)(inputs, outputs, kernel, groups=groups, bias=bias, device="meta", **options)
    made.weight = nn.Parameter(weight.detach().to(layer.weight).reshape(made.weight.shape).contiguous().clone())
    if bias:
        made.bias = nn.Parameter(layer.bias.detach().clone())
    return made.train(layer.training)


def _geometry(layer: nn.Module, along: str | int) -> tuple[tuple[int, ...], dict[str, Any]]:
    axes = range(len(layer.kernel_size))
    moving = {"all": set(axes), "none": set()}.get(along, {along})
    chosen = lambda name, still: tuple(getattr(layer, name)[axis] if axis in moving else still for axis in axes)
    if not moving:
        return chosen("kernel_size", 1), {}
    padding = layer.padding if isinstance(layer.padding, str) else chosen("padding", 0)
    options = {"stride": chosen("stride", 1), "padding": padding, "dilation": chosen("dilation", 1)}
    return chosen("kernel_size", 1), {**options, "padding_mode": layer.padding_mode}


def put(model: nn.Module, layers: dict[str, nn.Module]) -> nn.Module:
    """Put each new layer where the layer of that name stands, in place, and return the model.

    A layer that is used under several names is replaced under all of them.
    """
    new = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in new:
                parent._modules[name] = new[id(child)]
    return new.get(id(model), model)


def replaced(model: nn.Module, make: Callable[[str, nn.Module], list[nn.Module]], names: Iterable[str]) -> nn.Module:
    """Put `make(name, layer)`, layers in a row, in the place of each named layer where they hold fewer weights.

    Changes `model` and returns it; biases do not count.
    """
    rows = {}
    for name in names:
        layer = model.get_submodule(name)
        row = make(name, layer)
        if sum(p.numel() for part in row for p in part.parameters() if p.dim() > 1) < layer.weight.numel():
            rows[name] = (row[0] if len(row) == 1 else nn.Sequential(*row)).train(layer.training)
    return put(model, rows)
