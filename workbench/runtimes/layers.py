"""A prepared model that also tells how long each of its layers took: torch by its modules, OpenVINO by its counters.

torch times each layer around its own `forward` with the processor's clock or the GPU's events; OpenVINO counts inside
(`PERF_COUNT`, as `benchmark_app -pc` does). Both are copies: the model that is timed end to end stays undisturbed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from workbench.runtimes.base import Prepared, RuntimeFailed
from workbench.runtimes.cuda import PreparedCuda, PreparedGraph
from workbench.runtimes.eager import DTYPES, PreparedEager
from workbench.runtimes.files import ModelFile
from workbench.runtimes.openvino import PreparedOpenVINO, executed
from workbench.runtimes.sparse import SPARSE_KERNEL, SparseLayer
from workbench.surgery import clone, model_class, weighted_layers

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)
COUNTERS = 4  # copies that OpenVINO counts in: it gives only averages, and those of the least disturbed copy are taken
COLD_CALLS = 5  # the first calls of a compiled model set up its scratch space, and the counters cannot be cleared
IN_A_ROW = 20  # calls of one copy before the next


@dataclass(frozen=True)
class Part:
    """A layer as a runtime holds it; multiply-adds and bytes are those of one call with the whole batch."""

    name: str
    kind: str
    macs: int
    weight_bytes: int
    activation_bytes: int
    precision: str
    implementation: str


class Instrumented(Prepared):
    """A copy of a prepared model that notes its layers' times whenever it runs."""

    parts: tuple[Part, ...]

    def __init__(self, prepared: Prepared):
        self.__dict__.update(prepared.__dict__)

    def times_ms(self) -> np.ndarray:
        """Return how long each of `parts` took in a typical call so far, float (len(parts),)."""
        raise NotImplementedError


def instrumented(prepared: Prepared) -> Instrumented:
    """Return a copy of `prepared` that times its layers; raises RuntimeFailed if its runtime does not show them."""
    if isinstance(prepared, PreparedGraph):
        raise RuntimeFailed(
            f"{prepared.runtime} launches all layers as one and cannot tell them apart; choose cuda half."
        )
    if isinstance(prepared, PreparedEager):
        return InstrumentedTorch(prepared)
    if isinstance(prepared, PreparedOpenVINO):
        return InstrumentedOpenVINO(prepared)
    raise RuntimeFailed(f"{prepared.runtime} does not show its layers; choose eager, openvino or cuda.")


# --- torch ---------------------------------------------------------------------------------------------------------


class InstrumentedTorch(Instrumented):
    """A torch model whose layers' `forward` is wrapped with two looks at the clock."""

    def __init__(self, prepared: PreparedEager):
        super().__init__(prepared)
        self.model = clone(prepared.model)
        layers = dict(layers_inside(self.model))
        self.parts = tuple(parts_of(self.model, self.example))
        if prepared.precision == "tf32":  # which is how fp32 numbers are multiplied, so that no weight tells of it
            self.parts = tuple(replace(part, precision="tf32") if part.macs else part for part in self.parts)
        self._marks: list[tuple[int, object, object]] = []
        self._rows: list[np.ndarray] = []
        self._gpu = prepared if isinstance(prepared, PreparedCuda) else None
        for index, part in enumerate(self.parts):
            self._wrap(index, layers[part.name])

    def _wrap(self, index: int, layer: nn.Module) -> None:
        forward, marks, now = layer.forward, self._marks, self._now

        def timed_forward(*args, **kwargs):
            start = now()
            output = forward(*args, **kwargs)
            marks.append((index, start, now()))
            return output

        layer.forward = timed_forward

    def _now(self):
        if self._gpu is None:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def run(self) -> None:
        self._marks.clear()
        PreparedEager.run(self) if self._gpu is None else self._gpu.time(lambda: self.model(self.example))
        row = np.zeros(len(self.parts))
        for index, start, end in self._marks:
            row[index] += (end - start) / 1e6 if self._gpu is None else start.elapsed_time(end)
        self._rows.append(row)

    def timed(self) -> float:
        start = time.perf_counter_ns()
        self.run()
        return (time.perf_counter_ns() - start) / 1e6

    def times_ms(self) -> np.ndarray:
        return np.median(self._rows, axis=0)


def layers_inside(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, layer) of the modules that compute: those without children, and torch's own that are no containers.

    What hangs on such a layer, like a quantizer of its inputs, runs beside its `forward` and is a layer of its own.
    """
    inner: list[str] = []  # names of layers whose parts are not looked into
    for name, module in model.named_modules():
        foreign = not type(module).__module__.startswith("torch.nn.")
        if any(name.startswith(outer) for outer in inner) and not foreign:
            continue
        if not foreign and not isinstance(module, CONTAINERS):
            inner.append(f"{name}.")
        elif next(module.children(), None) is not None:
            continue
        yield name, module


def parts_of(model: nn.Module, example: Tensor) -> list[Part]:
    """Run a model of plain layers once and return those that are called, in the order of their first call."""
    calls: dict[str, list[tuple[int, int]]] = {}
    layers = dict(layers_inside(model))

    def note(name: str, layer: nn.Module):
        def hook(_layer, args, output):
            calls.setdefault(name, []).append((_macs(layer, output), _nbytes(args) + _nbytes(output)))

        return layer.register_forward_hook(hook)

    hooks = [note(name, layer) for name, layer in layers.items()]
    with torch.inference_mode():
        model(example)
    for hook in hooks:
        hook.remove()
    sums = {name: [sum(column) for column in zip(*found, strict=True)] for name, found in calls.items()}
    return [_torch_part(name, layers[name], *counted) for name, counted in sums.items()]


def _macs(layer: nn.Module, output) -> int:
    if isinstance(layer, SparseLayer):
        return layer.inputs * output.numel()
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and isinstance(output, Tensor):
        return layer.weight[0].numel() * output.numel()
    return 0


def _nbytes(values) -> int:
    if isinstance(values, Tensor):
        return values.nbytes
    return sum(map(_nbytes, values)) if isinstance(values, list | tuple) else 0


def _torch_part(name: str, layer: nn.Module, macs: int, activations: int) -> Part:
    if isinstance(layer, SparseLayer):
        return Part(name, layer.kind, macs, layer.weight_bytes, activations, "fp16", SPARSE_KERNEL)
    held = list(layer.parameters())
    weights = sum(p.nbytes for p in held)
    computes = DTYPES.get(held[0].dtype, str(held[0].dtype)) if held else "fp32"
    return Part(name, type(layer).__name__, macs, weights, activations, computes, type(layer).__name__)


# --- OpenVINO ------------------------------------------------------------------------------------------------------


class InstrumentedOpenVINO(Instrumented):
    """The same model compiled several times, with counters; the copies take turns."""

    def __init__(self, prepared: PreparedOpenVINO):
        super().__init__(prepared)
        requests = prepared.counting(COUNTERS)
        parts = _openvino_parts(prepared, requests[0])
        self.parts, self._calls = tuple(parts.values()), 0
        self._copies = [_Counted(request, list(parts)) for request in requests]

    def run(self) -> None:
        self._copies[self._calls // IN_A_ROW % COUNTERS].run()
        self._calls += 1

    def times_ms(self) -> np.ndarray:
        used = [copy.times_ms() for copy in self._copies if copy.calls > COLD_CALLS]
        return min(used, key=np.sum)


class _Counted:
    """One compiled copy; its counters are averages over all calls, in whole microseconds, and cannot be cleared."""

    def __init__(self, request, names: list[str]):
        self.request, self.names, self.calls = request, names, 0
        for _ in range(COLD_CALLS):
            self.run()
        self.cold_us = self._averages_us()

    def run(self) -> None:
        self.request.infer()
        self.calls += 1

    def times_ms(self) -> np.ndarray:
        """Return the averages over the calls that were not cold."""
        sums_us = self._averages_us() * self.calls - self.cold_us * COLD_CALLS
        return np.maximum(sums_us, 0) / (self.calls - COLD_CALLS) / 1000

    def _averages_us(self) -> np.ndarray:
        found = {info.node_name: info.real_time.total_seconds() for info in self.request.get_profiling_info()}
        return np.array([1e6 * found[name] for name in self.names])


def _openvino_parts(prepared: PreparedOpenVINO, request) -> dict[str, Part]:
    """Return the operations that run, by the names that their counters go by, in the order they run."""
    request.infer()  # the first call is slow, so that even the quickest operation is seen to run
    ran = {info.node_name for info in request.get_profiling_info() if info.status.name == "EXECUTED"}
    kernels, layers, parts = prepared.multiplying(request), _layers_of(prepared), {}
    for name, operation, outputs in executed(request.get_compiled_model(), ran | set(kernels)):
        layer = layers.get(kernels[name].layer) if name in kernels else None
        if layer is None:
            parts[name] = Part(name, operation.pop("kind"), 0, **operation)
        else:
            operation["kind"], each = layer
            parts[name] = Part(kernels[name].layer, macs=each * outputs, **operation)
    return parts


def _layers_of(prepared: PreparedOpenVINO) -> dict[str, tuple[str, int]]:
    """Return (kind, multiply-adds for each output value) of the layers that multiply, by name."""
    if isinstance(prepared.model, ModelFile):
        counted = prepared.model.layers(prepared.example)
        return {layer.name: (layer.kind, layer.macs // math.prod(layer.output_shape)) for layer in counted}
    return {name: (model_class(x).__name__, x.weight[0].numel()) for name, x in weighted_layers(prepared.model)}
