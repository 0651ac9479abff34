"""Model files of other programs, ONNX and OpenVINO's IR: what they take, what is in them, and their path for a runtime.

A `ModelFile` goes wherever a torch model goes to be measured: `runtime("openvino").prepare(file, example)`. What torch
alone can do (eager, compression, hooks) refuses it with a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from workbench.runtimes.base import RuntimeFailed, cause

FORMATS = {".onnx": "ONNX", ".xml": "OpenVINO IR"}
READERS = {".onnx": "onnx", ".xml": "ir"}  # what OpenVINO calls its readers
DTYPES = {"f32": torch.float32, "f16": torch.float16, "f64": torch.float64}
DTYPES |= {"i64": torch.int64, "i32": torch.int32, "u8": torch.uint8, "i8": torch.int8}
KINDS = {"Convolution": "Convolution", "GroupConvolution": "Convolution", "MatMul": "MatMul"}


class FileLayer(NamedTuple):
    """One multiplying layer of a file, counted on one image; `nonzero` counts the weights that are not 0.

    `weight_shape` is that of its weights as torch would hold them, with groups inside the first axis.
    """

    name: str
    kind: str
    parameters: int
    nonzero: int
    macs: int
    output_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelFile:
    """A model in a file. `shape`: of its one input, 0 where the file leaves a size open; `dtype`: of its numbers."""

    path: Path
    format: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    input_name: str

    @property
    def size_bytes(self) -> int:
        """The bytes of the file, and of the files beside it that hold its weights."""
        return sum(path.stat().st_size for path in (self.path, *self._beside()) if path.is_file())

    def _beside(self) -> set[Path]:
        """Return where an IR, or an ONNX file with external data, says that its weights lie."""
        if self.format == FORMATS[".xml"]:
            return {self.path.with_suffix(".bin")}
        try:
            import onnx
        except ImportError:  # OpenVINO runs such a file without that package, and does not tell where its data lie
            return set()
        tensors = onnx.load(self.path, load_external_data=False).graph.initializer
        places = [entry.value for one in tensors for entry in one.external_data if entry.key == "location"]
        return {self.path.parent / place for place in places}

    @property
    def fixed_batch(self) -> int:
        """The only batch that the file takes, or 0 where it takes any."""
        return self.shape[0]

    def example(self, shape: tuple[int, ...] | None = None, batch: int = 1) -> Tensor:
        """Return one batch of random numbers, of `shape`, or of the file's own with `batch` where that is left open.

        Raises ValueError where the file's sizes and the given ones differ, or where another size is left open too.
        """
        wanted = shape or (self.fixed_batch or batch, *self.shape[1:])
        if len(wanted) != len(self.shape) or any(o and o != w for o, w in zip(self.shape, wanted, strict=True)):
            raise ValueError(f"{self.path.name} takes inputs of shape {shape_text(self.shape)}, not {wanted}.")
        if not all(wanted):
            open_shape = shape_text(self.shape)
            raise ValueError(
                f"{self.path.name} takes inputs of shape {open_shape}; say which, as in --input 1,3,224,224."
            )
        return random_batch(wanted, self.dtype)

    def layers(self, example: Tensor) -> list[FileLayer]:
        """Count weights and multiply-adds of the layers that multiply, for one image of the shape of `example`."""
        nodes = graph_of(self, example).get_ordered_ops()
        fixed = _fixed(nodes)
        return [counted for node in nodes for counted in _counted(node, fixed, len(example))]

    def parameters(self) -> int:
        """Count the numbers that the file holds: its constants with more than one value, shapes and axes left out."""
        constants = [node for node in _read(self.path).get_ordered_ops() if node.get_type_name() == "Constant"]
        return sum(_values(node) for node in constants if _values(node) > 1 and _weighs(node))


def is_model_file(word: str | Path) -> bool:
    """Return True for a path that ends as an ONNX file or an IR does."""
    return Path(word).suffix.lower() in FORMATS


def read_model_file(path: str | Path) -> ModelFile:
    """Read what an ONNX file or an IR takes; raises RuntimeFailed saying what is wrong with the file."""
    path = Path(path)
    if not path.is_file() or not is_model_file(path):
        raise RuntimeFailed(f"There is no model file {path}; its name ends in {' or '.join(FORMATS)}.")
    model = _read(path)
    for ends, ports in (("input", model.inputs), ("output", model.outputs)):
        if len(ports) != 1:
            names = ", ".join(one.any_name for one in ports)
            raise RuntimeFailed(f"{path.name} has {len(ports)} {ends}s ({names}); models of one can be profiled.")
    given, kind = model.inputs[0], model.inputs[0].get_element_type().get_type_name()
    if kind not in DTYPES:
        raise RuntimeFailed(f"{path.name} takes numbers of type {kind}; export it for one of {', '.join(DTYPES)}.")
    partial = given.get_partial_shape()
    if partial.rank.is_dynamic:
        raise RuntimeFailed(f"{path.name} does not say how many dimensions its input has; export it with a shape.")
    if not len(partial):
        raise RuntimeFailed(f"{path.name} takes a single number; export it with a batch in front, as (batch, ...).")
    shape = tuple(0 if size.is_dynamic else size.get_length() for size in partial)
    return ModelFile(path, FORMATS[path.suffix.lower()], shape, DTYPES[kind], given.any_name)


def random_batch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the same random numbers each time: normal ones, or 0 and 1 for a model that takes integers."""
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator, dtype=dtype)


def graph_of(file: ModelFile, example: Tensor) -> Any:
    """Return the openvino.Model of a file for inputs of the shape of `example`; raises RuntimeFailed if it has none."""
    if file.fixed_batch and len(example) != file.fixed_batch:  # OpenVINO would make another model for another batch
        raise RuntimeFailed(f"{file.path.name} takes batches of {file.fixed_batch} only, not of {len(example)}.")
    graph = _read(file.path)
    try:
        graph.reshape(list(example.shape))
    except Exception as error:
        shapes = f"{tuple(example.shape)}; it was written for {shape_text(file.shape)}"
        raise RuntimeFailed(f"{file.path.name} does not work for inputs of shape {shapes} ({cause(error)}).") from error
    return graph


def shape_text(shape: tuple[int, ...]) -> str:
    """Write a shape with a question mark for sizes left open: (?, 3, 224, 224)."""
    return f"({', '.join(str(size) if size else '?' for size in shape)})"


def _read(path: Path) -> Any:
    """Return the openvino.Model of a file, by the reader of its format; Core.read_model would ask every other too."""
    from openvino.frontend import FrontEndManager

    reader = FrontEndManager().load_by_framework(READERS[path.suffix.lower()])
    try:
        model = reader.convert(reader.load(str(path)))
    except Exception as error:  # of classes that OpenVINO does not name in public
        raise _unreadable(path, str(error).strip().splitlines()[-1].rstrip(".!")) from error
    if not model.outputs:
        raise _unreadable(path, "there is no model in it")
    return model


def _unreadable(path: Path, why: str) -> RuntimeFailed:
    beside = "; its .bin belongs beside it" if path.suffix.lower() == ".xml" else ""
    return RuntimeFailed(f"{path} cannot be read as {FORMATS[path.suffix.lower()]}: {why}{beside}.")


def _fixed(nodes: list) -> set[str]:
    """Return the names of those of the ordered nodes in which the input has no part: constants, and what reads them."""
    found = set()
    for node in nodes:
        reads = [port.get_source_output().get_node().get_name() for port in node.inputs()]
        if node.get_type_name() == "Constant" or (reads and found.issuperset(reads)):
            found.add(node.get_name())
    return found


def _counted(node, fixed: set[str], batch: int) -> Iterator[FileLayer]:
    """Yield the counts of a node that multiplies by constants; products of two activations have no weights."""
    kind = KINDS.get(node.get_type_name())
    ports = {"Convolution": node.inputs()[1:2], "MatMul": node.inputs()}.get(kind, [])
    held = [port.get_source_output() for port in ports if port.get_source_output().get_node().get_name() in fixed]
    if len(held) != 1:
        return
    shape, output = tuple(held[0].get_shape()), tuple(node.get_output_shape(0))
    size, values = math.prod(shape), _evaluated(held[0])
    nonzero = size if values is None else int(np.count_nonzero(values.data))
    macs = _multiplications(node, kind) * math.prod(output) // batch
    shape = (shape[0] * shape[1], *shape[2:]) if node.get_type_name() == "GroupConvolution" else shape
    yield FileLayer(node.get_friendly_name(), kind, size, nonzero, macs, (1, *output[1:]), shape)


def _multiplications(node, kind: str) -> int:
    """Return how many multiplications are behind one output number."""
    if kind == "Convolution":
        return math.prod(node.input(1).get_shape()) // node.get_output_shape(0)[1]
    shape = node.input(0).get_shape()
    return shape[-2 if node.get_attributes()["transpose_a"] and len(shape) > 1 else -1]


def _evaluated(output) -> Any:
    """Return what is computed from constants alone, an openvino.Tensor; None where OpenVINO shows no such numbers."""
    from openvino import Tensor

    node = output.get_node()
    given = [_evaluated(port.get_source_output()) for port in node.inputs()]
    results = [Tensor(one.get_element_type(), one.get_shape()) for one in node.outputs()]
    told = all(one is not None for one in given) and node.evaluate(results, given)
    return results[output.get_index()] if told else None


def _values(node) -> int:
    return math.prod(node.get_output_shape(0))


def _weighs(node) -> bool:
    """Return True for numbers that are computed with; constants of 32 or 64 whole bits are shapes, axes, indices."""
    return node.get_element_type().get_type_name() not in ("i64", "i32", "u64", "boolean", "string")
