"""The same model made to run: torch eager in two memory layouts, OpenVINO, ONNX Runtime, and six ways of an NVIDIA GPU.

A runtime prepares a copy of a model for one input shape. What comes back runs, and says which precision its kernels
really compute in: a model that was quantized to 8 bits is not thereby an 8-bit computation.
"""

import torch

from workbench.runtimes.base import MEASURING, Kernel, Prepared, Runtime, RuntimeFailed, steady_outputs, threads
from workbench.runtimes.cuda import AMPERE, Cuda, CudaGraph
from workbench.runtimes.eager import Eager, bake, is_fake_quantized
from workbench.runtimes.files import ModelFile, is_model_file, read_model_file
from workbench.runtimes.onnx import OnnxRuntime
from workbench.runtimes.openvino import OpenVINO
from workbench.runtimes.sparse import SPARSE_KERNEL, CudaSparse

_HALF = Cuda("cuda half", torch.float16)
RUNTIMES: tuple[Runtime, ...] = (
    Eager("eager", torch.contiguous_format),
    Eager("eager channels-last", torch.channels_last),
    OpenVINO(),
    OnnxRuntime(),
    Cuda("cuda", torch.float32),
    Cuda("cuda tf32", torch.float32, "tf32", needs=AMPERE),
    _HALF,
    Cuda("cuda bfloat16", torch.bfloat16, needs=AMPERE),
    CudaGraph("cuda graph", torch.float16),
    CudaSparse("cuda 2:4", _HALF),
)


def runtime(name: str) -> Runtime:
    """Return the runtime called `name`; raises ValueError that lists the names there are."""
    for one in RUNTIMES:
        if one.name == name:
            return one
    raise ValueError(f"There is no runtime {name!r}; choose one of {', '.join(one.name for one in RUNTIMES)}.")


def available_runtimes() -> list[Runtime]:
    """Return the runtimes that work on this machine, in the order of RUNTIMES."""
    return [one for one in RUNTIMES if one.available()[0]]


__all__ = [
    "MEASURING",
    "RUNTIMES",
    "SPARSE_KERNEL",
    "Kernel",
    "ModelFile",
    "Prepared",
    "Runtime",
    "RuntimeFailed",
    "available_runtimes",
    "bake",
    "is_fake_quantized",
    "is_model_file",
    "read_model_file",
    "runtime",
    "steady_outputs",
    "threads",
]
