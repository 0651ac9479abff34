"""torch on an NVIDIA GPU, timed by the GPU's own events: four precisions, and all kernels replayed as one CUDA graph.

The label names what computes. TF32, a product of fp32 numbers that were rounded to 10 bits, is off in "cuda" and has a
runtime of its own; its switches, of matrix products and of convolutions, are set while a model runs and put back.
A graph (`torch.cuda.CUDAGraph`) is one launch for the whole model, so that starting each layer costs nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from workbench.runtimes.base import Runtime, RuntimeFailed, as_floats, cause
from workbench.runtimes.eager import DTYPES, PreparedEager

AMPERE = (8, 0)  # the first compute capability with TF32, bf16 and 2:4 sparse products
WARM_UP_CALLS = 3  # before a capture: libraries choose their kernels and take their scratch space in the first calls
FLUSHED = "the L2 cache is flushed before each call"
LEAST_FLUSH_BYTES = 2**25  # for a driver that does not tell how large its cache is


@contextlib.contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """Let the GPU multiply fp32 numbers in "tf32", or else as they are; cuDNN tries its kernels, keeps the quickest."""
    cudnn, switches = torch.backends.cudnn, _tf32_switches()
    before, tried = [getattr(place, name) for place, name, *_ in switches], cudnn.benchmark
    cudnn.benchmark = True
    for place, name, off, on in switches:
        setattr(place, name, on if precision == "tf32" else off)
    try:
        yield
    finally:
        cudnn.benchmark = tried
        for (place, name, *_), value in zip(switches, before, strict=True):
            setattr(place, name, value)


def _tf32_switches() -> list[tuple]:
    """Return (where, name, off, on) of all that decide on TF32; torch refuses to read the old ones beside the new."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # from torch 2.9 on
        return [(place, "fp32_precision", "ieee", "tf32") for place in (matmul, cudnn.conv, cudnn.rnn)]
    return [(place, "allow_tf32", False, True) for place in (matmul, cudnn)]


def flush_bytes(l2_bytes: int) -> int:
    """Return how many bytes to write so that nothing else is left in an L2 cache of `l2_bytes`: twice as many."""
    return max(2 * l2_bytes, LEAST_FLUSH_BYTES)


@functools.lru_cache(maxsize=1)
def _flush_buffer() -> Tensor:
    """Return the memory that a flush writes, the same for all prepared models."""
    held = torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(flush_bytes(held), dtype=torch.uint8, device="cuda")


def peak_bytes(run: Callable) -> int:
    """Measure the most GPU memory that `run()` holds at a time beyond what was held before, from torch's allocator."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class PreparedCuda(PreparedEager):
    """A torch model on the GPU, channels last; the example already lies there."""

    def __init__(self, runtime: Cuda, model: nn.Module, example: Tensor, threads: int):
        super().__init__(runtime, model, example, threads, torch.channels_last)
        self.model = self.model.to("cuda", runtime.dtype)
        self.example = as_floats(self.example, runtime.dtype).to("cuda")
        self.precision = runtime.precision
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._other: Tensor | None = None  # what fills the L2 cache before a call
        if runtime.flush_l2:
            self._other = _flush_buffer()
            self.tell(FLUSHED)

    def tell(self, words: str) -> None:
        """Add `words` to the note."""
        self.note = "; ".join(filter(None, (self.note, words)))

    def __call__(self, batch: Tensor) -> Tensor:
        with torch.inference_mode(), computing_in(self.precision):
            return self.model(batch.to(self.example)).float().cpu()

    def forward(self) -> None:
        """Queue one run on the example, without waiting for it."""
        self.model(self.example)

    def run(self) -> None:
        self.timed()

    def timed(self) -> float:
        """Run once on the example and return the GPU's own time for it, in milliseconds."""
        return self.time(self.forward)

    def time(self, forward: Callable[[], object]) -> float:
        """Return the GPU's time between two events around `forward()`, in milliseconds.

        A flush of the cache comes before both and is waited for: else it would hide the time that launches take.
        """
        with torch.inference_mode(), computing_in(self.precision):
            if self._other is not None:
                self._other.zero_()
                torch.cuda.synchronize()
            self._start.record()
            forward()
            self._end.record()
        torch.cuda.synchronize()
        return self._start.elapsed_time(self._end)

    def peak_bytes(self) -> int:
        """Measure the most GPU memory that a run holds beyond the model and its example."""
        return peak_bytes(self.run)


class PreparedGraph(PreparedCuda):
    """All kernels of one run on the example, captured once and launched together; other batch shapes run in eager."""

    def __init__(self, runtime: Cuda, model: nn.Module, example: Tensor, threads: int):
        super().__init__(runtime, model, example, threads)
        self.tell("all kernels are replayed as one CUDA graph")
        self._graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), computing_in(self.precision):
            self._input = self.example.clone()  # a graph reads and writes the same memory every time
            self._warm_up()
            self._captured_bytes = peak_bytes(self._capture)

    def _warm_up(self) -> None:
        """Run beside the default stream, as captures do, so that nothing is chosen or taken during the capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                self.model(self._input)
        torch.cuda.current_stream().wait_stream(side)

    def _capture(self) -> None:
        try:
            # "thread_local": what other threads of the process ask of the GPU meanwhile does not break the capture
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._output = self.model(self._input)
        except Exception as error:
            first = error.__context__ or error  # what the model did, and not that the capture then could not end
            raise RuntimeFailed(
                f"This model cannot be captured as a CUDA graph ({cause(first)}). A graph holds only what the GPU does "
                "without waiting for the processor; run it on cuda half, which launches one kernel after another."
            ) from error

    def __call__(self, batch: Tensor) -> Tensor:
        if batch.shape != self._input.shape:
            return super().__call__(batch)
        with torch.inference_mode():
            self._input.copy_(batch)
            self._graph.replay()
            found = self._output.float().cpu()
            self._input.copy_(self.example)  # so that what is timed stays the example
        return found

    def forward(self) -> None:
        self._graph.replay()

    def peak_bytes(self) -> int:
        """Return the most that the capture held: a replay takes nothing from the allocator, the graph keeps it all."""
        return self._captured_bytes


class Cuda(Runtime):
    """torch eager on an NVIDIA GPU in one precision; with `flush_l2` nothing is left in its cache from call to call."""

    device = "cuda"
    prepared = PreparedCuda

    def __init__(self, name: str, dtype: torch.dtype, precision: str = "", needs: tuple[int, int] = (0, 0)):
        self.name, self.dtype, self.needs = name, dtype, needs
        self.precision = precision or DTYPES[dtype]
        self.flush_l2 = False

    def flushing(self) -> Cuda:
        """Return this runtime with the L2 cache flushed before each call."""
        other = copy.copy(self)
        other.flush_l2 = True
        return other

    def available(self):
        if not torch.cuda.is_available():
            return False, "no GPU here"
        why_not = lacking(torch.cuda.get_device_capability(), self.needs, torch.cuda.get_device_name())
        return not why_not, why_not

    def _prepare(self, model, example, threads):
        return self.prepared(self, model, example, threads)


class CudaGraph(Cuda):
    """torch on an NVIDIA GPU with all kernels of a model replayed as one graph."""

    prepared = PreparedGraph


def lacking(capability: tuple[int, int], needed: tuple[int, int], gpu: str) -> str:
    """Say why a GPU of this compute capability is too old, or return ""."""
    if capability >= needed:
        return ""
    has, needs = (".".join(map(str, one)) for one in (capability, needed))
    return f"{gpu} has compute capability {has}, and this takes {needs} or later"
