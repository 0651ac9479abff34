"""ONNX: a model as a graph that other programs read, and ONNX Runtime, which runs it here.

Weights that are rounded to integers stand in the graph as int8 tensors with a DequantizeLinear behind each; the inputs
of layers that are rounded go through QuantizeLinear and DequantizeLinear. Runtimes make integer kernels of these pairs.
"""

from __future__ import annotations

import importlib.util
import io
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from workbench.runtimes.base import Kernel, Prepared, Runtime, RuntimeFailed, precisions, quiet
from workbench.runtimes.eager import bake, is_fake_quantized
from workbench.runtimes.files import ModelFile
from workbench.surgery import clone
from workbench.weights import FakeQuantize, InputQuantizer, WeightCode, describe, split_groups

OPSET = 17  # has every operator needed, and is read by runtimes some years old


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

    Input and output are called "input" and "output", and are float32. Raises ImportError without the package onnx.
    """
    import onnx

    codes = _rounded_weights(clone(model).float())
    plain = bake(model).float()
    for layer in list(plain.modules()):
        if isinstance(getattr(layer, "input_quantizer", None), InputQuantizer):
            layer.input_quantizer = RoundedInput(layer.input_quantizer)
    graph = onnx.load_from_string(_exported(plain, example.float()))
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
    with quiet(), torch.no_grad():
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


def session(source: bytes | str, threads: int = 1, optimized: str | None = None) -> Any:
    """Return an onnxruntime.InferenceSession on the processor for a model's bytes or path.

    `optimized`: where the graph is written as it really runs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")  # else sums saturate on processors without VNNI
    if optimized:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class PreparedOnnxRuntime(Prepared):
    """A session of ONNX Runtime; batches of other sizes run in the same one."""

    def __init__(self, runtime: Runtime, model: nn.Module | ModelFile, example: Tensor, threads: int):
        super().__init__(runtime, example, threads)
        named = isinstance(model, ModelFile)
        self._takes = (model.input_name, model.dtype) if named else ("input", torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "runs.onnx")
            source = str(model.path) if named else onnx_model(model, example).SerializeToString()
            self._session = session(source, threads, path)
            self.kernels = tuple(_kernels(path))
        self.precision = precisions([kernel.precision for kernel in self.kernels])
        self._feed = feed(example, *self._takes)
        if not named and is_fake_quantized(model):
            fast = sum(kernel.precision == "int8" for kernel in self.kernels)
            self.note = f"{fast} of {len(self.kernels)} layers run int8 kernels"

    def __call__(self, batch: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(None, feed(batch, *self._takes))[0])

    def run(self) -> None:
        self._session.run(None, self._feed)


def feed(batch: Tensor, name: str = "input", dtype: torch.dtype = torch.float32) -> dict:
    """Return what a session takes for this batch."""
    return {name: batch.detach().to(dtype).contiguous().numpy()}


def _kernels(path: str) -> Iterator[Kernel]:
    """Read the multiplying layers from the graph that a session really runs."""
    import onnx

    for node in onnx.load(path, load_external_data=False).graph.node:
        if any(word in node.op_type for word in ("Conv", "Gemm", "MatMul")) and "Cast" not in node.op_type:
            whole = node.op_type.startswith("Q") or "Integer" in node.op_type
            yield Kernel(node.name, "int8" if whole else "fp32", node.op_type)


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
