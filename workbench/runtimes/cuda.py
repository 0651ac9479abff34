"""torch on an NVIDIA GPU, timed by the GPU's own events."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from workbench.runtimes.base import Runtime
from workbench.runtimes.eager import DTYPES, PreparedEager


@contextlib.contextmanager
def _plain_cudnn() -> Iterator[None]:
    # TF32 is off: it would round the inputs of "fp32" convolutions to 10 bits, and the label would not name what ran.
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=False):
        yield


class PreparedCuda(PreparedEager):
    """A torch model on the GPU, channels last; the example already lies there."""

    def __init__(self, runtime: Cuda, model: nn.Module, example: Tensor, threads: int):
        super().__init__(runtime, model, example, threads, torch.channels_last)
        dtype = torch.float16 if runtime.half else torch.float32
        self.model, self.example = self.model.to("cuda", dtype), self.example.to("cuda", dtype)
        self.precision = DTYPES[dtype]
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, batch: Tensor) -> Tensor:
        with torch.inference_mode(), _plain_cudnn():
            return self.model(batch.to(self.example)).float().cpu()

    def run(self) -> None:
        self.timed()

    def timed(self) -> float:
        """Run once on the example and return the GPU's own time for it, in milliseconds."""
        with torch.inference_mode(), _plain_cudnn():
            self._start.record()
            self.model(self.example)
            self._end.record()
        torch.cuda.synchronize()
        return self._start.elapsed_time(self._end)


class Cuda(Runtime):
    """torch eager on an NVIDIA GPU in single or half precision."""

    device = "cuda"

    def __init__(self, name: str, half: bool):
        self.name, self.half = name, half

    def available(self):
        return (True, "") if torch.cuda.is_available() else (False, "no GPU here")

    def _prepare(self, model, example, threads):
        return PreparedCuda(self, model, example, threads)
