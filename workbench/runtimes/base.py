"""What a runtime is, and what it hands back: a prepared model that runs on a fixed example and names its precision."""

from __future__ import annotations

import contextlib
import math
import threading
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from workbench.surgery import clone

if TYPE_CHECKING:
    from workbench.runtimes.files import ModelFile

MEASURING = threading.RLock()  # one measurement at a time: two would slow each other down, and the figures with them


class RuntimeFailed(RuntimeError):
    """A runtime cannot run this model, or is not on this machine; the others may well."""


class Kernel(NamedTuple):
    """One compiled layer: its name in the torch model, the precision it computes in, the runtime's implementation."""

    layer: str
    precision: str
    implementation: str


def precisions(found: list[str]) -> str:
    """Say in one word what the kernels of a model compute in."""
    kinds = sorted(set(found), key=lambda kind: (kind != "int8", kind))
    if not kinds:
        return "fp32"
    return kinds[0] if len(kinds) == 1 else f"mixed {'/'.join(kinds)}"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute on `count` threads inside the block; the setting is the process's, so it is put back after."""
    with MEASURING:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            yield
        finally:
            torch.set_num_threads(before)


using_threads = threads  # for those whose own argument is called threads


class Prepared:
    """A model ready to run on a fixed example.

    Call it with a batch, float (B, C, H, W), to get its outputs. `run()` computes once on the example with nothing
    else around it; `timed()` does that and returns milliseconds. `precision` and `kernels` name what really runs.
    """

    precision = "fp32"
    kernels: tuple[Kernel, ...] = ()
    note = ""
    difference: float | None = 0.0  # largest from torch eager on the example, by the largest output; None for a file

    def __init__(self, runtime: Runtime, example: Tensor, threads: int):
        self.runtime, self.device = runtime.name, runtime.device
        self.example, self.threads, self.batch = example, threads, len(example)

    def __call__(self, batch: Tensor) -> Tensor:
        raise NotImplementedError

    def run(self) -> None:
        raise NotImplementedError

    def timed(self) -> float:
        """Run once on the example and return how long it took, in milliseconds."""
        start = time.perf_counter_ns()
        self.run()
        return (time.perf_counter_ns() - start) / 1e6

    def compare(self, expected: Tensor) -> None:
        """Note how far the outputs on the example are from those of torch eager."""
        largest = expected.abs().max().clamp_min(1e-12)
        self.difference = float((self(self.example) - expected).abs().max() / largest)

    def describe(self) -> str:
        """Say in one sentence what runs."""
        count = f"{self.threads} thread{'s' if self.threads != 1 else ''}, " if self.device == "cpu" else ""
        note = f"; {self.note}" if self.note else ""
        return f"{self.runtime}, {count}batch {self.batch}, computes in {self.precision}{note}."


class Runtime:
    """A way to run a model; `prepare` makes it ready, `available` says whether it can work on this machine."""

    name: str
    device = "cpu"

    def available(self) -> tuple[bool, str]:
        """Return (True, "") or (False, why not)."""
        return True, ""

    def for_baseline(self) -> Runtime:
        """Return the runtime on which a baseline is measured: this one, unless it takes only compressed models."""
        return self

    def prepare(self, model: nn.Module | ModelFile, example: Tensor, threads: int = 1) -> Prepared:
        """Return a copy of `model` made ready for inputs shaped like `example`; raises RuntimeFailed saying why not.

        A model in a file of another program runs on the runtimes that read such files.
        """
        here, why_not = self.available()
        if not here:
            raise RuntimeFailed(f"The runtime {self.name} cannot be used: {why_not}.")
        if threads < 1 or len(example) < 1:
            raise RuntimeFailed(f"Measuring takes at least one thread and one image, not {threads} and {len(example)}.")
        try:
            with using_threads(threads), quiet(), torch.inference_mode():
                if not isinstance(model, nn.Module):
                    return self._prepare_file(model, example, threads)
                model = clone(model)  # in eval mode: a model in training would update its statistics and drop values
                expected = steady_outputs(model, example)
                prepared = self._prepare(model, example, threads)
                prepared.compare(expected)
                return prepared
        except RuntimeFailed:
            raise
        except Exception as error:
            raise RuntimeFailed(f"The runtime {self.name} cannot run this model: {cause(error)}") from error

    def _prepare(self, model: nn.Module, example: Tensor, threads: int) -> Prepared:
        raise NotImplementedError

    def _prepare_file(self, file: ModelFile, example: Tensor, threads: int) -> Prepared:
        raise RuntimeFailed(f"The runtime {self.name} runs torch models, and {file.path.name} is {file.format}.")

    def __repr__(self) -> str:
        return f"<runtime {self.name}>"


def outputs(model: nn.Module, example: Tensor) -> Tensor:
    """Return the model's outputs on `example` in torch eager; raises RuntimeFailed if they are not one tensor."""
    try:
        with torch.inference_mode():
            result = model(example)
    except Exception as error:
        raise RuntimeFailed(f"The model fails on an input of shape {tuple(example.shape)}: {cause(error)}") from error
    if not isinstance(result, Tensor):
        kind = type(result).__name__
        raise RuntimeFailed(f"The model returns a {kind}; wrap it so that it returns one tensor of scores per class.")
    return result


def steady_outputs(model: nn.Module, example: Tensor) -> Tensor:
    """Run the model twice in eager, so that a mistake in the model is not taken for one of the runtime.

    Raises RuntimeFailed if the model raises, returns no tensor, or gives outputs of changing shape.
    """
    first, second = outputs(model, example), outputs(model, example)
    if first.shape != second.shape:
        shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
        raise RuntimeFailed(f"For one input the model gives outputs of changing shape, {shapes}; it cannot be timed.")
    return first


def product_macs(left: tuple[int, ...], right: tuple[int, ...], outputs: tuple[int, ...]) -> int:
    """Return the multiply-adds of a matrix product of these shapes, whichever factor it transposes on the way."""
    summed = math.prod(left) * math.prod(right) // max(1, math.prod(outputs) * math.prod(right[:-2]))  # squared
    return math.prod(outputs) * math.isqrt(summed)


def as_floats(batch: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a batch in a type of floats, or as it is where it holds whole numbers, such as the indices of words."""
    return batch.to(dtype) if batch.is_floating_point() else batch


def cause(error: Exception) -> str:
    """Return the kind of an error and the first of what it says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}, {' '.join(lines[:2])[:300] or 'no reason was given'}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's and OpenVINO's announcements about torch.jit, which OpenVINO still reads, from the reader."""
    with warnings.catch_warnings():
        for kind in (FutureWarning, DeprecationWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", kind)
        yield
