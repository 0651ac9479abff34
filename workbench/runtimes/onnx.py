"""ONNX: a model as a graph that other programs read, and ONNX Runtime, which runs it here.

Weights that are rounded to integers stand in the graph as int8 tensors with a DequantizeLinear behind each; the inputs
of layers that are rounded go through QuantizeLinear and DequantizeLinear. Runtimes make integer kernels of these pairs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import os
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from workbench.runtimes.base import Kernel, Prepared, Runtime, RuntimeFailed, as_floats, precisions, quiet
from workbench.runtimes.eager import bake, is_fake_quantized
from workbench.runtimes.files import ModelFile
from workbench.surgery import clone, model_class, weighted_layers
from workbench.weights import FakeQuantize, InputQuantizer, WeightCode, describe, split_groups

OPSET = 17  # has every operator needed, and is read by runtimes some years old
FLOATS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "double": "fp64"}  # by ONNX's words for them
LOG_SWITCH = "_jit_set_onnx_log_enabled"  # of torch's exporter
BLOCK = 16  # channels: kernels that compute so many at once hold weights filled up with zeros


class RoundedInput(nn.Module):
    """Round as an `InputQuantizer` does, with its scale and zero point as plain numbers, which the exporter needs."""

    def __init__(self, quantizer: InputQuantizer):
        super().__init__()
        self.scale, self.zero_point = float(quantizer.scale), int(quantizer.zero_point)
        self.ends = (quantizer.quant_min, quantizer.quant_max)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, *self.ends)


def onnx_model(model: nn.Module, example: Tensor) -> Any:
    """Return `model` as an onnx.ModelProto for batches of any size of inputs shaped like `example`.

    Input and output are called "input" and "output", and are float32; an input of whole numbers stays what it is.
    Raises ImportError without the package onnx.
    """
    import onnx

    codes = _rounded_weights(clone(model).float())
    plain = bake(model).float()
    for layer in list(plain.modules()):
        if isinstance(getattr(layer, "input_quantizer", None), InputQuantizer):
            layer.input_quantizer = RoundedInput(layer.input_quantizer)
    graph = onnx.load_from_string(_exported(plain, as_floats(example)))
    _store_integers(graph.graph, codes)
    return graph


def _rounded_weights(model: nn.Module) -> dict[str, WeightCode]:
    """Return the codes of each parameter that is rounded to integers, by its name in the baked model."""
    codes = {}
    for name, layer in model.named_modules():
        for tensor in getattr(layer, "parametrizations", {}):
            code = describe(layer, tensor)
            if isinstance(code.coder, FakeQuantize) and code.values.dtype == torch.float32:
                codes[f"{name}.{tensor}" if name else tensor] = code
    return codes


def _exported(model: nn.Module, example: Tensor) -> bytes:
    """Return the ONNX file of a model of plain layers; its weights keep their names."""
    file = io.BytesIO()
    with quiet(), torch.no_grad(), _attention_in_parts(), _no_dump():
        torch.onnx.export(
            model,
            (example,),
            file,
            dynamo=False,  # the newer exporter needs one more package, and rounds in no way that runtimes know
            opset_version=OPSET,
            training=torch.onnx.TrainingMode.PRESERVE,  # else BatchNorm is folded into weights that are codes
            do_constant_folding=False,  # else weights lose their names
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
        )
    return file.getvalue()


@contextlib.contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Keep torch from its one operator for a whole attention layer, which ONNX does not have."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _no_dump() -> Iterator[None]:
    """Keep torch from writing the whole graph to standard output where an export fails: it always turns that log on."""
    switch = getattr(torch._C, LOG_SWITCH, None)
    if switch is not None:
        switch(False)  # an export elsewhere leaves it on
        setattr(torch._C, LOG_SWITCH, lambda _on: None)
    try:
        yield
    finally:
        if switch is not None:
            setattr(torch._C, LOG_SWITCH, switch)


def _store_integers(graph: Any, codes: dict[str, WeightCode]) -> None:
    """Put int8 codes and the nodes that read them in the place of each rounded weight, in place."""
    kept, nodes = [], []
    for tensor in graph.initializer:
        if tensor.name in codes:
            tensors, reading = _as_integers(tensor.name, codes[tensor.name])
            kept += tensors
            nodes += reading
        else:
            kept.append(tensor)
    nodes += graph.node
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)


def _as_integers(name: str, code: WeightCode) -> tuple[list, list]:
    """Return the tensors and nodes that give the weight called `name` from its int8 codes."""
    from onnx import helper, numpy_helper

    coder, symbols = code.coder, code.symbols
    grouped = coder.group_size is not None
    if grouped:
        symbols = split_groups(symbols.flatten(1), coder.group_size)
    parts = {"codes": symbols.to(torch.int8), "scale": coder.step.detach(), "zero_point": coder.zero_point}
    parts["zero_point"] = parts["zero_point"].to(torch.int8)
    if coder.axis is not None:
        parts |= {part: parts[part].flatten() for part in ("scale", "zero_point")}
    steps = [("DequantizeLinear", ("scale", "zero_point"), {} if coder.axis is None else {"axis": coder.axis})]
    if grouped:  # laid side by side again, without what fills up the last group of a row
        shape = list(code.symbols.shape)
        numbers = {"rows": [shape[0], -1], "start": [0], "end": [code.symbols[0].numel()], "dim": [1], "shape": shape}
        parts |= {part: torch.tensor(values) for part, values in numbers.items()}
        steps += [("Reshape", ("rows",), {}), ("Slice", ("start", "end", "dim"), {}), ("Reshape", ("shape",), {})]
    tensors = [numpy_helper.from_array(v.cpu().contiguous().numpy(), f"{name}.{part}") for part, v in parts.items()]
    nodes, before = [], f"{name}.codes"
    for number, (kind, reads, options) in enumerate(steps, 1):
        after = name if number == len(steps) else f"{name}.step{number}"
        inputs = [before, *(f"{name}.{part}" for part in reads)]
        nodes.append(helper.make_node(kind, inputs, [after], f"{after}.{kind}", **options))
        before = after
    return tensors, nodes


def session(source: bytes | str, threads: int = 1, optimized: str = "", profile: str = "") -> Any:
    """Return an onnxruntime.InferenceSession on the processor for a model's bytes or path.

    `optimized`: where the graph is written as it really runs. `profile`: how the name of the file begins that the
    session's `end_profiling` writes, with the time of each node of each call.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")  # else sums saturate on processors without VNNI
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else idle threads slow what is timed next
    if optimized:
        options.optimized_model_filepath = optimized
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class PreparedOnnxRuntime(Prepared):
    """A session of ONNX Runtime; batches of other sizes run in the same one."""

    def __init__(self, runtime: Runtime, model: nn.Module | ModelFile, example: Tensor, threads: int):
        super().__init__(runtime, example, threads)
        self.model, named = model, isinstance(model, ModelFile)
        self._takes = (model.input_name, model.dtype) if named else ("input", as_floats(example).dtype)
        with tempfile.TemporaryDirectory() as folder:
            self._session, nodes = self._begun(folder)
        self.kernels = tuple(node.kernel for node in nodes if node.multiplies)
        self.precision = precisions([kernel.precision for kernel in self.kernels])
        self._feed = feed(example, *self._takes)
        if not named and is_fake_quantized(model):
            fast = sum(kernel.precision == "int8" for kernel in self.kernels)
            self.note = f"{fast} of {len(self.kernels)} layers run int8 kernels"

    def _begun(self, folder: str, profile: str = "") -> tuple[Any, list[Node]]:
        """Return a session of the model, and the nodes that it really runs, which it writes to `folder`."""
        path = os.path.join(folder, "runs.onnx")
        named = isinstance(self.model, ModelFile)
        source = str(self.model.path) if named else onnx_model(self.model, self.example).SerializeToString()
        return session(source, self.threads, path, profile), _nodes(path, _calls(self.model, self.example))

    def profiling(self, folder: str) -> tuple[Any, list[Node]]:
        """Return a session of the same model that notes the time of each node, and those nodes; see `session`."""
        with quiet(), torch.inference_mode():
            return self._begun(folder, os.path.join(folder, "profile"))

    def __call__(self, batch: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(None, feed(batch, *self._takes))[0])

    def run(self) -> None:
        self._session.run(None, self._feed)


def feed(batch: Tensor, name: str = "input", dtype: torch.dtype = torch.float32) -> dict:
    """Return what a session takes for this batch."""
    return {name: batch.detach().to(dtype).contiguous().numpy()}


class Call(NamedTuple):
    """A call of a multiplying layer with the whole batch; `shape` is that of its weights."""

    layer: str
    kind: str
    macs: int
    shape: tuple[int, ...]


class Node(NamedTuple):
    """A node of the graph that a session really runs.

    `call` is that of the layer that it stems from, None where it multiplies nothing by weights. `weight_bytes` are
    those of its constants; `computed_bytes` those of them that another node computes from constants in each call.
    `floats` is the type of its first input of floats, in which a kernel computes that is none for integers.
    """

    name: str
    kind: str
    call: Call | None
    weight_bytes: int
    computed_bytes: int
    floats: str = "fp32"

    @property
    def multiplies(self) -> bool:
        return any(word in self.kind for word in ("Conv", "Gemm", "MatMul")) and "Cast" not in self.kind

    @property
    def kernel(self) -> Kernel:
        whole = self.kind.startswith("Q") or "Integer" in self.kind or "Quantize" in self.kind
        return Kernel(self.call.layer if self.call else self.name, "int8" if whole else self.floats, self.kind)


def _calls(model: nn.Module | ModelFile, example: Tensor) -> list[Call]:
    """Return the calls of multiplying layers in their order; a file's layers are those that it names."""
    if isinstance(model, ModelFile):
        found = model.layers(example)
        return [Call(one.name, one.kind, one.macs * len(example), one.weight_shape) for one in found]
    calls, hooks = [], []
    for name, layer in weighted_layers(model):

        def hook(held, _args, output, name=name):
            shape = tuple(held.weight.shape)
            calls.append(Call(name, model_class(held).__name__, math.prod(shape[1:]) * output.numel(), shape))

        hooks.append(layer.register_forward_hook(hook))
    try:
        model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


class _Constant(NamedTuple):
    """A tensor that does not depend on the input; `computed` where a node makes it anew in each call."""

    shape: tuple[int, ...]
    nbytes: int
    computed: bool


def _nodes(path: str, calls: list[Call]) -> list[Node]:
    """Read the graph that a session wrote, and find the layer of each node that multiplies."""
    import onnx
    from onnx.helper import tensor_dtype_to_np_dtype

    graph, waiting, nodes = onnx.load(path, load_external_data=False).graph, list(calls), []
    floats = _floats(graph)
    constants = {
        one.name: _Constant(
            tuple(one.dims), math.prod(one.dims) * tensor_dtype_to_np_dtype(one.data_type).itemsize, False
        )
        for one in graph.initializer
    }
    for node in graph.node:
        held = {name: constants[name] for name in node.input if name in constants}
        if held and len(held) == len(set(filter(None, node.input))):  # weights that are read from their codes
            shape = max((one.shape for one in held.values()), key=math.prod)
            constants |= {name: _Constant(shape, 4 * math.prod(shape), True) for name in node.output}
        total, computed = (sum(one.nbytes for one in held.values() if one.computed >= only) for only in (False, True))
        reads = next((floats[name] for name in node.input if name in floats), "fp32")
        found = Node(node.name, node.op_type, None, total, computed, reads)
        nodes.append(found._replace(call=_call_of(node.name, held, waiting)) if found.multiplies else found)
    return nodes


def _floats(graph: Any) -> dict[str, str]:
    """Return the types of the tensors that hold floats, by name; only constants and the graph's ends tell their own.

    Any other holds what the node that gives it reads, except behind a Cast.
    """
    from onnx import TensorProto

    word = lambda number: FLOATS.get(TensorProto.DataType.Name(number).lower())
    ends = {one.name: word(one.type.tensor_type.elem_type) for one in [*graph.input, *graph.output]}
    found = ends | {one.name: word(one.data_type) for one in graph.initializer}
    for node in graph.node:
        cast = next((word(one.i) for one in node.attribute if one.name == "to"), None)
        reads = next((found[name] for name in node.input if found.get(name)), None)
        found |= {name: cast or reads for name in node.output if name not in found}
    return {name: kind for name, kind in found.items() if kind}


def _call_of(name: str, held: dict[str, _Constant], waiting: list[Call]) -> Call | None:
    """Take the first of the waiting calls that a node computes: by a name that was kept, else by its weights' shape."""
    if not held:
        return None
    weight, constant = max(held.items(), key=lambda item: math.prod(item[1].shape))
    same = (
        lambda call: call.layer == name or f"{weight}.".startswith(f"{call.layer}.weight."),
        lambda call: constant.shape in (call.shape, call.shape[::-1]),
        lambda call: _filled_up(constant.shape, call.shape),
    )
    found = next((call for alike in same for call in waiting if alike(call)), None)
    if found:
        waiting.remove(found)
    return found


def _filled_up(held: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Return True where weights are those of `shape` with channels added until their blocks are full."""
    return held[2:] == shape[2:] and all(0 <= a - b < BLOCK for a, b in zip(held[:2], shape[:2], strict=False))


class OnnxRuntime(Runtime):
    """Microsoft's inference engine on the processor; rounded layers become integer kernels where it has them."""

    name = "onnxruntime"

    def available(self):
        missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            return False, f"{' and '.join(missing)} not installed; `pip install 'workbench[onnx]'` brings it"
        return True, ""

    def _prepare(self, model, example, threads):
        return PreparedOnnxRuntime(self, model, example, threads)

    def _prepare_file(self, file, example, threads):
        if file.format != "ONNX":
            raise RuntimeFailed(f"The runtime {self.name} reads ONNX, and {file.path.name} is {file.format}.")
        prepared = PreparedOnnxRuntime(self, file, example, threads)
        prepared.difference = None
        prepared.run()
        return prepared
