"""Write a model as a file that other programs run: ONNX, or OpenVINO's IR. Each file is run before it is handed over.

    export_onnx(small, "small.onnx", example)
    export_openvino(small, "small.xml", example)  # and small.bin beside it

Weights that are rounded to integers are int8 in the file, and their runtimes make integer kernels of them.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from workbench.runtimes.base import RuntimeFailed, as_floats, outputs, quiet
from workbench.runtimes.eager import is_fake_quantized
from workbench.surgery import clone

TOLERANCE = 1e-3  # of the largest output: the same sums in another order
TOLERANCE_ROUNDED = 0.1  # a sum in another order may put an input on the next of its 256 levels, and so on upwards


class ExportError(RuntimeError):
    """A model cannot be written in this format, or its file does not answer as the model does."""


@dataclass(frozen=True)
class Exported:
    """What was written: the files, their bytes, and the largest difference from torch, relative to the largest output.

    `difference` is None where the program that runs such files is not installed.
    """

    files: tuple[Path, ...]
    size_bytes: int
    difference: float | None


def export_onnx(model: nn.Module, path: str | os.PathLike, example: Tensor) -> Exported:
    """Write `model` as ONNX for batches of any size of inputs shaped like `example`; needs the package onnx.

    Raises ExportError, and then no file is left or changed.
    """
    try:
        import onnx  # noqa: F401
    except ImportError:
        raise ExportError("The package onnx is not installed; `pip install 'workbench[onnx]'` brings it.") from None
    return _written(model, Path(path), example, _write_onnx, _run_onnx)


def export_openvino(model: nn.Module, path: str | os.PathLike, example: Tensor) -> Exported:
    """Write `model` as OpenVINO's IR, PATH.xml and PATH.bin, for batches of any size of inputs shaped like `example`.

    Raises ExportError, and then no file is left or changed.
    """
    return _written(model, Path(path).with_suffix(".xml"), example, _write_openvino, _run_openvino)


def _written(model: nn.Module, path: Path, example: Tensor, write, run) -> Exported:
    """Write into a folder beside the target, run what lies there, and only then put it in place."""
    model, example = clone(model).float(), as_floats(example)  # half precision: the file computes, and is fed, in fp32
    try:
        expected = outputs(model, example)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder, quiet(), torch.no_grad():
            draft = Path(folder) / path.name
            write(model, draft, example)
            difference = _checked(model, run(draft, example), expected)
            drafts = sorted(Path(folder).iterdir())
            size = sum(each.stat().st_size for each in drafts)
            files = tuple(each.replace(path.parent / each.name) for each in drafts)
    except ExportError:
        raise
    except RuntimeFailed as error:
        raise ExportError(str(error)) from error
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}; choose another place.") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        kind = type(model).__name__
        raise ExportError(f"{kind} cannot be written as {path.suffix[1:]}: {type(error).__name__}, {reason}") from error
    return Exported(files, size, difference)


def _checked(model: nn.Module, answers: Tensor | None, expected: Tensor) -> float | None:
    if answers is None:
        return None
    difference = float((answers - expected.float()).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not difference <= (TOLERANCE_ROUNDED if is_fake_quantized(model) else TOLERANCE):
        raise ExportError(f"The file's answers are {difference:.2g} of the largest one off the model's; not written.")
    return difference


def _write_onnx(model: nn.Module, path: Path, example: Tensor) -> None:
    from workbench.runtimes.onnx import onnx_model

    path.write_bytes(onnx_model(model, example).SerializeToString())


def _run_onnx(path: Path, example: Tensor) -> Tensor | None:
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return None
    from workbench.runtimes.onnx import feed, session

    return torch.from_numpy(session(str(path)).run(None, feed(example, dtype=example.dtype))[0])


def _write_openvino(model: nn.Module, path: Path, example: Tensor) -> None:
    import openvino

    from workbench.runtimes.openvino import converted, runnable

    openvino.save_model(converted(runnable(model), example, any_batch=True), path, compress_to_fp16=False)


def _run_openvino(path: Path, example: Tensor) -> Tensor:
    from workbench.runtimes.openvino import compiled

    found = compiled(str(path), 1)(example.numpy())
    return torch.from_numpy(next(iter(found.values())).copy())
