"""torch as it is: one kernel call a layer, weights in the layout of one's choice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.runtimes.base import Prepared, Runtime, as_floats
from workbench.surgery import clone, weighted_layers
from workbench.weights import FakeQuantize, InputQuantizer, bake_weights, weight_parametrizations

DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


def bake(model: nn.Module) -> nn.Module:
    """Return a copy whose weights are plain tensors, so that no forward computes masks and rounding again."""
    return bake_weights(clone(model)).requires_grad_(False)


def is_fake_quantized(model: nn.Module) -> bool:
    """Return True when rounding to integers is simulated somewhere, in a weight or in a layer's input."""
    layers = [layer for _, layer in weighted_layers(model)]
    weights = any(isinstance(p, FakeQuantize) for layer in layers for p in weight_parametrizations(layer))
    return weights or any(isinstance(module, InputQuantizer) for module in model.modules())


class PreparedEager(Prepared):
    """A torch model run layer by layer."""

    def __init__(self, runtime: Runtime, model: nn.Module, example: Tensor, threads: int, layout: torch.memory_format):
        super().__init__(runtime, example, threads)
        self.model = bake(model).to(memory_format=layout)
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        self.precision = DTYPES.get(dtype, str(dtype))
        layout = layout if example.dim() == 4 else torch.contiguous_format
        self.example = as_floats(example, dtype).contiguous(memory_format=layout)
        if is_fake_quantized(model):
            self.note = "rounding to integers is only simulated, so this is not the time of an int8 kernel"

    def __call__(self, batch: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model(batch.to(self.example.dtype)).float()

    def run(self) -> None:
        with torch.inference_mode():
            self.model(self.example)


class Eager(Runtime):
    """torch eager, with images and convolution weights channels first or channels last in memory."""

    def __init__(self, name: str, layout: torch.memory_format):
        self.name, self.layout = name, layout

    def _prepare(self, model, example, threads):
        return PreparedEager(self, model, example, threads, self.layout)
