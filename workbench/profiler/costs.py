"""What a forward pass costs before any clock runs: parameters, multiply-adds, and the memory of its activations."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workbench.runtimes import MEASURING, bake
from workbench.surgery import clone, weighted_layers


@dataclass(frozen=True)
class LayerCost:
    """Counted costs of one linear or convolution layer on one image; `nonzero` counts the weights that are not 0.

    `parameters` are the weights and the bias; in files of other programs, where a bias is no part of the layer, the
    weights alone.
    """

    name: str
    kind: str
    parameters: int
    weights: int
    nonzero: int
    macs: int
    output_shape: tuple[int, ...]


def layer_costs(model: nn.Module, example: Tensor) -> list[LayerCost]:
    """Count parameters and multiply-adds of each linear and convolution layer on one image of `example`.

    Multiply-adds come from the outputs of one real forward: numbers in the output × multiplications for each. A layer
    that is called twice costs twice; one that is never called costs none.
    """
    model, outputs = clone(model), {}
    for name, layer in weighted_layers(model):
        hook = lambda _layer, _args, out, name=name: outputs.setdefault(name, []).append(out.shape)
        layer.register_forward_hook(hook)
    with torch.inference_mode():
        model(example[:1])
    return [_cost(name, layer, outputs.get(name, [])) for name, layer in weighted_layers(model)]


def _cost(name: str, layer: nn.Module, shapes: list[torch.Size]) -> LayerCost:
    weight, bias = layer.weight.detach(), layer.bias
    each = weight[0].numel()  # of (out, in/groups, kernel…) or (out, in): the multiplications behind one output number
    macs = each * sum(math.prod(shape) for shape in shapes)
    parameters = weight.numel() + (0 if bias is None else bias.numel())
    kind = next(kind.__name__ for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) if isinstance(layer, kind))
    counts = (parameters, weight.numel(), int((weight != 0).sum()), macs)
    return LayerCost(name, kind, *counts, tuple(shapes[-1]) if shapes else ())


def peak_activation_bytes(model: nn.Module, example: Tensor) -> int:
    """Measure the most memory that one eager forward of `example` holds at a time, weights and input not counted.

    It is the running maximum of what torch's allocator reports: every allocation and release, scratch space included.
    """
    model = bake(model)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler writes to stderr about GPUs that are not there
    with MEASURING, torch.inference_mode():
        model(example)  # what is allocated once and kept does not belong to the activations
        with torch.autograd.profiler.profile(profile_memory=True, acc_events=False) as recorded:
            model(example)
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
