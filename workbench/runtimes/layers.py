"""A prepared model that also tells how long each of its layers took: torch by its modules, the others by themselves.

torch times each layer around its own `forward` with the processor's clock or the GPU's events; OpenVINO counts inside
(`PERF_COUNT`, as `benchmark_app -pc` does), and ONNX Runtime has a profiler. All are copies: the model that is timed
end to end stays undisturbed.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from workbench.runtimes.base import Prepared, RuntimeFailed, product_macs
from workbench.runtimes.base import threads as using_threads
from workbench.runtimes.cuda import PreparedCuda, PreparedGraph
from workbench.runtimes.eager import DTYPES, PreparedEager
from workbench.runtimes.files import ModelFile
from workbench.runtimes.onnx import FLOATS, Node, OnnxRuntime, PreparedOnnxRuntime
from workbench.runtimes.openvino import PreparedOpenVINO, executed
from workbench.runtimes.sparse import SPARSE_KERNEL, SparseLayer
from workbench.surgery import clone, model_class, weighted_layers

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)
COUNTERS = 4  # copies that OpenVINO counts in: it gives only averages, and those of the least disturbed copy are taken
COLD_CALLS = 5  # the first calls of a compiled model set up its scratch space, and the counters cannot be cleared
IN_A_ROW = 20  # calls of one copy before the next
EMPTY_NODES = 64  # in the model that shows what ONNX Runtime's profiler takes by itself
EMPTY_CALLS = 100
SHOW_LAYERS = ("openvino", "eager", "cuda", "onnxruntime")  # runtimes that do; a report asks the first that runs
TYPES = FLOATS | {"uint8": "int8"}  # of ONNX


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
    grows = True  # its times can be asked for while it runs; else asking ends them

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
    if isinstance(prepared, PreparedOnnxRuntime):
        return InstrumentedOnnxRuntime(prepared)
    raise RuntimeFailed(f"{prepared.runtime} does not show its layers; choose one of {', '.join(SHOW_LAYERS)}.")


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
        # The copies run the same operations in one order, but each numbers those that OpenVINO itself puts in.
        order = {info.node_name: place for place, info in enumerate(requests[0].get_profiling_info())}
        self._copies = [_Counted(request, [order[name] for name in parts]) for request in requests]

    def run(self) -> None:
        self._copies[self._calls // IN_A_ROW % COUNTERS].run()
        self._calls += 1

    def times_ms(self) -> np.ndarray:
        used = [copy.times_ms() for copy in self._copies if copy.calls > COLD_CALLS]
        return min(used, key=np.sum)


class _Counted:
    """One compiled copy, with the places of its operations among its counters.

    Those are averages over all calls, in whole microseconds, and cannot be cleared.
    """

    def __init__(self, request, places: list[int]):
        self.request, self.places, self.calls = request, places, 0
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
        told = self.request.get_profiling_info()
        return np.array([1e6 * told[place].real_time.total_seconds() for place in self.places])


def _openvino_parts(prepared: PreparedOpenVINO, request) -> dict[str, Part]:
    """Return the operations that run, by the names that their counters go by, in the order they run."""
    request.infer()  # the first call is slow, so that even the quickest operation is seen to run
    ran = {info.node_name for info in request.get_profiling_info() if info.status.name == "EXECUTED"}
    kernels, layers, parts = prepared.multiplying(request), _layers_of(prepared), {}
    for name, operation, outputs in executed(request.get_compiled_model(), ran | set(kernels)):
        layer = layers.get(kernels[name].layer) if name in kernels else None
        if layer is not None:
            operation["kind"], each = layer
            operation["macs"] = each * outputs
        parts[name] = Part(name if layer is None else kernels[name].layer, **operation)
    return parts


def _layers_of(prepared: PreparedOpenVINO) -> dict[str, tuple[str, int]]:
    """Return (kind, multiply-adds for each output value) of the layers that multiply, by name."""
    if isinstance(prepared.model, ModelFile):
        counted = prepared.model.layers(prepared.example)
        return {layer.name: (layer.kind, layer.macs // math.prod(layer.output_shape)) for layer in counted}
    return {name: (model_class(x).__name__, x.weight[0].numel()) for name, x in weighted_layers(prepared.model)}


# --- ONNX Runtime --------------------------------------------------------------------------------------------------


class InstrumentedOnnxRuntime(Instrumented):
    """A second session of the same model, under ONNX Runtime's own profiler, which tells only when it is ended.

    The profiler's own work falls inside each node's time, and is several times what a small node takes: it is measured
    once, on nodes that compute next to nothing, with weights and without, and taken off.
    """

    grows = False

    def __init__(self, prepared: PreparedOnnxRuntime):
        super().__init__(prepared)
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._session, self._nodes = prepared.profiling(folder.name)
        self._folder = folder  # goes with this copy, after the session that has a file open in it

    def run(self) -> None:
        self._session.run(None, self._feed)

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(_onnx_parts(self._ended[0], self._nodes))

    def times_ms(self) -> np.ndarray:
        own = np.array([_profiler_ms(self.threads, part.weight_bytes > 0) for part in self.parts])
        return np.maximum(self.noted_ms() - own, 0)

    def noted_ms(self) -> np.ndarray:
        """Return the mean of the middle half of each node's times: a median would be in whole microseconds."""
        rows = np.sort(self._ended[1], axis=0)
        quarter = len(rows) // 4
        return rows[quarter : len(rows) - quarter].mean(axis=0)

    @cached_property
    def _ended(self) -> tuple[list[dict], np.ndarray]:
        """End the profiler and return what it told of each node, in the order they ran, and float (calls, nodes)."""
        with open(self._session.end_profiling(), encoding="utf-8") as file:
            events = [event for event in json.load(file) if event["cat"] == "Node"]
        taken, told = defaultdict(list), {}
        for event in events:
            key = (event["name"], event["args"]["node_index"])
            taken[key].append(event["dur"] / 1000)
            told.setdefault(key, event)
        calls = min(map(len, taken.values()))  # ONNX Runtime notes a million events at most, and leaves out the rest
        return list(told.values()), np.array([ms[:calls] for ms in taken.values()]).T


@lru_cache(maxsize=8)
def _profiler_ms(threads: int, weights: bool) -> float:
    """Return what the profiler takes inside a node's time: that time less what an empty node takes without it."""
    empty = nn.Sequential(*(nn.Linear(1, 1) if weights else nn.Tanh() for _ in range(EMPTY_NODES))).eval()
    prepared = PreparedOnnxRuntime(OnnxRuntime(), empty, torch.zeros(1, 1), threads)
    copy, taken = InstrumentedOnnxRuntime(prepared), []
    with using_threads(threads):
        for _ in range(EMPTY_CALLS):
            taken.append(prepared.timed())
            copy.run()
    noted = copy.noted_ms()
    return max(0.0, float(np.median(noted)) - float(np.median(taken)) / len(noted))


def _onnx_parts(events: list[dict], nodes: list[Node]) -> Iterator[Part]:
    """Yield one part an event; a node without a name goes by its kind, in the order in which both run."""
    waiting = list(nodes)
    for event in events:
        name, told = event["name"].removesuffix("_kernel_time"), event["args"]
        ran = next((n for n in waiting if n.name == name), None) or next(
            (n for n in waiting if not n.name and n.kind == told["op_name"]), Node(name, told["op_name"], None, 0, 0)
        )
        if ran in waiting:
            waiting.remove(ran)
        moved = int(told["activation_size"]) + int(told["output_size"]) - ran.computed_bytes
        kernel, call = ran.kernel, ran.call
        computes = kernel.precision if ran.multiplies else _type_of(told)
        which = (call.layer, call.kind, call.macs) if call else (name, ran.kind, _onnx_macs(told))
        yield Part(*which, ran.weight_bytes, moved, computes, ran.kind)


def _onnx_macs(told: dict) -> int:
    """Return the multiply-adds of a matrix product that is no layer, as inside of attention, 0 of anything else."""
    shapes = lambda end: [tuple(shape) for one in told[f"{end}_type_shape"] for shape in one.values()]
    inputs = shapes("input")  # without a factor that is constant
    if not inputs or told["op_name"] not in ("MatMul", "FusedMatMul", "Gemm"):
        return 0
    outputs = shapes("output")[0]
    return product_macs(*inputs[:2], outputs) if len(inputs) > 1 else math.prod(outputs) * inputs[0][-1]


def _type_of(told: dict) -> str:
    """Return what numbers a node gives, as ONNX Runtime's profiler tells."""
    kind = next((kind for shape in told["output_type_shape"] for kind in shape), "float")
    return TYPES.get(kind, kind)
