"""OpenVINO on the processor: fake-quantized layers become real int8 kernels, and the compiled model says which."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

from workbench.runtimes.base import Kernel, Prepared, Runtime, as_floats, precisions, product_macs, quiet
from workbench.runtimes.eager import is_fake_quantized
from workbench.runtimes.files import ModelFile, graph_of
from workbench.surgery import clone, weighted_layers
from workbench.weights import bake_weights

PRECISIONS = {"I8": "int8", "f32": "fp32", "f16": "fp16", "bf16": "bf16", "f64": "fp64", "u8": "int8", "i8": "int8"}

HELD = {"i8": "8-bit", "u8": "8-bit", "i4": "4-bit", "u4": "4-bit", "u2": "2-bit"}


@lru_cache(maxsize=1)
def _core():
    import openvino

    return openvino.Core()


class PreparedOpenVINO(Prepared):
    """A model compiled for one input shape; batches of other shapes are compiled when they come."""

    def __init__(self, runtime: OpenVINO, model: nn.Module | ModelFile, example: Tensor, threads: int):
        super().__init__(runtime, example, threads)
        self.model, self._floats = runnable(model), runtime.floats
        self._dtype = model.dtype if isinstance(model, ModelFile) else as_floats(example).dtype
        self._requests = {}
        self._request = self._filled(example)
        self.kernels = tuple(self.multiplying(self._request).values())
        self.precision = precisions([kernel.precision for kernel in self.kernels])
        self.note = self._note(isinstance(model, nn.Module) and is_fake_quantized(model))

    def _filled(self, batch: Tensor):
        import openvino

        shape = tuple(batch.shape)
        if shape not in self._requests:
            made = compiled(converted(self.model, batch), self.threads, self._floats)
            self._requests[shape] = made.create_infer_request()
        request = self._requests[shape]
        batch = batch.detach().to(self._dtype).contiguous()
        request.set_input_tensor(openvino.Tensor(batch.numpy(), shared_memory=False))
        return request

    def counting(self, copies: int) -> list:
        """Return requests of the same model, filled with the example, that count the time of each operation."""
        import openvino

        with quiet():
            made = converted(self.model, self.example)
        how, numbers = (self.threads, self._floats), self.example.detach().to(self._dtype).contiguous().numpy()
        requests = [compiled(made, *how, counters=True).create_infer_request() for _ in range(copies)]
        for request in requests:
            request.set_input_tensor(openvino.Tensor(numbers))
        return requests

    def multiplying(self, request) -> dict[str, Kernel]:
        """Return the multiplying layers of a request of this model by the names that its counters go by."""
        found = _multiplying(request.get_compiled_model(), _calls(self.model, self.example), self.batch)
        return {node.get_friendly_name(): kernel for node, kernel in found}

    def __call__(self, batch: Tensor) -> Tensor:
        request = self._filled(batch)
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data.copy())

    def run(self) -> None:
        self._request.infer()

    def _note(self, quantized: bool) -> str:
        names = ", ".join(sorted({kernel.implementation for kernel in self.kernels}))
        fast = sum(kernel.precision == "int8" for kernel in self.kernels)
        if quantized and not fast:
            return f"no layer runs an int8 kernel, rounded weights are multiplied as {self.precision} ({names})"
        return f"{fast} of {len(self.kernels)} layers run int8 kernels ({names})" if fast else f"kernels {names}"


class OpenVINO(Runtime):
    """Intel's inference engine on the processor, told to compute in `floats` wherever the model is not quantized."""

    def __init__(self, name: str = "openvino", floats: str = "f32"):
        self.name, self.floats = name, floats

    def available(self):
        try:
            _core()
        except ImportError:
            return False, "the package openvino is not installed; `pip install openvino` brings it"
        return True, ""

    def _prepare(self, model, example, threads):
        return PreparedOpenVINO(self, model, example, threads)

    def _prepare_file(self, file, example, threads):
        prepared = PreparedOpenVINO(self, file, example, threads)
        prepared.difference = None
        prepared.run()
        return prepared


def runnable(model: nn.Module | ModelFile) -> nn.Module | ModelFile:
    """Return a copy of `model` in which only what becomes an integer kernel is still computed from something else."""
    if isinstance(model, ModelFile):
        return model
    return bake_weights(clone(model), keep_quantizers=True).requires_grad_(False)


def converted(model: nn.Module | ModelFile, example: Tensor, any_batch: bool = False):
    """Return the OpenVINO model of a `runnable` model for the shape of `example`, or for batches of any size of it.

    Tracing a function instead of the module skips scripting every submodule, and the frontend is called directly:
    together four times quicker than `openvino.convert_model`, which stays the way out where the short way fails.
    """
    import openvino

    if isinstance(model, ModelFile):
        return _named_once(graph_of(model, example))
    with torch.no_grad():
        traced = torch.jit.trace(lambda batch: model(batch), example, check_trace=False)
    shape = [-1 if any_batch else len(example), *example.shape[1:]]
    try:
        return _convert_directly(traced, example, shape)
    except Exception as error:
        logging.getLogger(__name__).info("Direct conversion failed (%s); using openvino.convert_model.", error)
        return openvino.convert_model(traced, example_input=example, input=[shape])


def _named_once(graph):
    """Return the graph after the compiler's first fusions; else each compilation gives what it fused other names."""
    from openvino._offline_transformations import apply_moc_transformations

    apply_moc_transformations(graph, cf=False)
    return graph


def _convert_directly(traced, example: Tensor, shape: list[int]):
    from openvino._offline_transformations import apply_moc_transformations, compress_quantize_weights_transformation
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced, example_input=example)  # the frontend does not keep it alive itself
    made = frontend.convert(frontend.load(decoder))
    made.reshape(shape)
    apply_moc_transformations(made, cf=False, smart_reshape=True)  # both as convert_model does: without them
    compress_quantize_weights_transformation(made)  # the compiler picks fp32 kernels for quantized layers
    return made


def compiled(converted, threads: int, floats: str = "f32", counters: bool = False):
    """Return the compiled model, which computes in `floats`, "f32" or "bf16", wherever the model is not quantized.

    `counters` time each of its operations.
    """
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": floats,  # else bf16 wherever the processor has it, unasked
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # else activations of weight-only models are quantized, unasked
        "PERF_COUNT": counters,
    }
    return _core().compile_model(converted, "CPU", settings)


def _calls(model: nn.Module | ModelFile, example: Tensor) -> list[tuple[str, int, int]]:
    """Return (layer, number of output values, of weights) of each call of a multiplying layer on one image, in order.

    A file's layers are those that it names.
    """
    if isinstance(model, ModelFile):
        return [(one.name, math.prod(one.output_shape), one.parameters) for one in model.layers(example)]
    calls, hooks = [], []
    for name, layer in weighted_layers(model):
        hook = lambda held, _args, output, name=name: calls.append((name, output.numel(), held.weight.numel()))
        hooks.append(layer.register_forward_hook(hook))
    try:
        model(example[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return calls


MULTIPLY = ("Convolution", "FullyConnected", "MatMul")


def _multiplying(compiled, calls: list[tuple[str, int, int]], batch: int) -> Iterator[tuple]:
    """Yield (operation, Kernel) of each product, named after the next torch layer of as many outputs and weights.

    A product that is no call of a torch layer, as inside of attention, keeps the name that OpenVINO gave it.
    """
    waiting = list(calls)
    for node in compiled.get_runtime_model().get_ordered_ops():
        kind, match = _info(node, "layerType"), None
        if kind not in MULTIPLY:
            continue
        if kind != "MatMul":
            made = (math.prod(node.get_output_shape(0)) // batch, _weights(node))
            match = next((call for call in waiting if call[1:] == made), None)
        if match:
            waiting.remove(match)
        name = match[0] if match else node.get_friendly_name()
        yield node, Kernel(name, _precision(node), _implementation(node))


def executed(compiled, names: set[str]) -> Iterator[tuple[str, dict, int]]:
    """Yield (name, what is known of it, number of output values) of those operations of a compiled model."""
    for node in compiled.get_runtime_model().get_ordered_ops():
        if node.get_friendly_name() in names:
            weights, activations = _moved(node)
            operation = {
                "kind": _info(node, "layerType"),
                "weight_bytes": weights,
                "activation_bytes": activations,
                "precision": _precision(node),
                "implementation": _implementation(node),
                "macs": _macs(node),
            }
            yield node.get_friendly_name(), operation, math.prod(node.get_output_shape(0))


def _moved(node) -> tuple[int, int]:
    """Return the bytes of an operation's constants, and of its other inputs and its outputs."""
    weights, activations = 0, sum(_bytes(port) for port in node.outputs())
    for port in node.inputs():
        source = port.get_source_output()
        if _info(source.get_node(), "layerType") == "Const":
            weights += _bytes(source)
        else:
            activations += _bytes(source)
    return weights, activations


def _macs(node) -> int:
    """Return the multiply-adds of a convolution or a matrix product, by its shapes; 0 of anything else."""
    kind, outputs = _info(node, "layerType"), node.get_output_shape(0)
    if kind in ("Convolution", "FullyConnected"):
        return math.prod(outputs) * _weights(node) // outputs[1 if kind == "Convolution" else -1]
    if kind != "MatMul":
        return 0
    return product_macs(*(tuple(node.get_input_shape(place)) for place in range(2)), tuple(outputs))


def _weights(node) -> int:
    """Return how many weights a convolution or a linear layer multiplies by, also where it reads them from codes."""
    return math.prod(node.get_input_shape(1))


def _bytes(port) -> int:
    return math.prod(port.get_shape()) * port.get_element_type().bitwidth // 8


def _precision(node) -> str:
    """Return what a layer multiplies in: the suffix of its implementation, as in `brgconv_avx512_I8`.

    `runtimePrecision` comes second: for weights held in 4 bits and multiplied in fp32 it says `i4`.
    """
    suffix = _info(node, "primitiveType").rpartition("_")[2]
    stored = _info(node, "runtimePrecision")
    return PRECISIONS.get(suffix) or PRECISIONS.get(stored, stored)


def _implementation(node) -> str:
    held = HELD.get(_info(node, "runtimePrecision"), "")
    weights = f" on {held} weights" if held and _precision(node) != "int8" else ""
    return _info(node, "primitiveType") + weights


def _info(node, key: str) -> str:
    info = node.get_rt_info()
    return info[key].astype(str) if key in info else ""
