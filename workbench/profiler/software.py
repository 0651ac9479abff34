"""Software first: the same fp32 model made faster without compressing it, so that compression meets its best rival.

Each way is a `Runtime` of its own, timed in turns with plain torch eager, or on a GPU with plain torch there. BatchNorm
is folded into the convolution before it as in Jacob et al. (2018), arXiv:1712.05877, section 3.2, by torch.fx.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from workbench.profiler.environment import allowed_cores, environment
from workbench.profiler.timing import Latency, Ratio, compare, measure
from workbench.runtimes import OnnxRuntime, OpenVINO, Runtime, RuntimeFailed, bake, runtime
from workbench.runtimes.eager import Eager, PreparedEager

BF16 = {"AMX BF16", "AVX-512 BF16"}  # what the environment calls the instructions that multiply it


@dataclass(frozen=True)
class SoftwareRow:
    """One way to run the same weights. `ratio`: times faster than plain eager, timed in turns with it; eager has none.

    `difference` is the largest one between its outputs and plain eager's on the example, relative to the largest
    output. A way that cannot be gone here has no latency, ratio or difference, and `note` says why.
    """

    name: str
    what: str
    latency: Latency | None = None
    ratio: Ratio | None = None
    difference: float | None = None
    note: str = ""

    @property
    def ran(self) -> bool:
        return self.latency is not None

    def to_dict(self) -> dict:
        """Return the figures as JSON can hold them."""
        return {
            "name": self.name,
            "what": self.what,
            "latency": self.latency.to_dict() if self.latency else None,
            "ratio": self.ratio.to_dict() if self.ratio else None,
            "difference": self.difference,
            "note": self.note,
        }

    def __str__(self) -> str:
        if not self.ran:
            return f"{self.name}: did not run here, {self.note}"
        return f"{self.name}: {self.latency}{f', {self._versus()} plain eager' if self.ratio else ''}"

    def _versus(self) -> str:
        return f"{self.ratio} {'than' if self.ratio.distinguishable else 'from'}"


class BFloat16(Eager):
    """torch eager in bf16, channels last: eight bits of fraction, for processors that multiply it."""

    def _prepare(self, model, example, threads):
        return PreparedEager(self, bake(model).to(torch.bfloat16), example, threads, self.layout)


class Fused(Eager):
    """torch eager with each BatchNorm folded into the convolution before it."""

    def _prepare(self, model, example, threads):
        from torch.fx.experimental.optimization import fuse

        norms = _norms(model)
        model = fuse(bake(model))
        prepared = PreparedEager(self, model, example, threads, self.layout)
        prepared.note = f"{norms - _norms(model)} of {norms} BatchNorm layers folded"
        return prepared


class Frozen(Eager):
    """A TorchScript trace whose weights are constants, so that torch fuses what follows a layer into it."""

    def _prepare(self, model, example, threads):
        prepared = PreparedEager(self, model, example, threads, self.layout)
        traced = torch.jit.trace(prepared.model, prepared.example, check_trace=False)
        prepared.model = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
        return prepared


class Compiled(Eager):
    """`torch.compile`, which writes and compiles C++ for this model and shape."""

    def available(self):
        here = any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))
        return (True, "") if here else (False, "torch.compile needs a C++ compiler, and none is installed")

    def _prepare(self, model, example, threads):
        prepared = PreparedEager(self, model, example, threads, self.layout)
        prepared.model = torch.compile(prepared.model)
        return prepared


class OpenVINOBFloat16(OpenVINO):
    """OpenVINO allowed to compute in bf16, where the processor multiplies it."""

    def available(self):
        if not BF16 & set(environment().features):
            return False, "this processor has no instructions for bf16"
        return super().available()


PLAIN, LAST = torch.contiguous_format, torch.channels_last
WAYS: tuple[tuple[Runtime, str], ...] = (
    (runtime("eager"), "torch as it is, one layer after another"),
    (runtime("eager channels-last"), "the channels of a pixel side by side in memory"),
    (BFloat16("eager bf16", LAST), "numbers of 16 bits, channels last"),
    (Fused("BatchNorm fused", PLAIN), "each BatchNorm folded into the convolution before it"),
    (Frozen("frozen TorchScript", PLAIN), "a trace with constant weights, layers fused by torch"),
    (OpenVINO(), "Intel's inference engine in fp32"),
    (OpenVINOBFloat16("openvino bf16", "bf16"), "the same, allowed to compute in bf16"),
    (OnnxRuntime(), "Microsoft's inference engine in fp32"),
)
GPU_WAYS: tuple[tuple[Runtime, str], ...] = (
    (runtime("cuda"), "torch as it is on the GPU, one kernel after another"),
    (runtime("cuda tf32"), "products of fp32 numbers rounded to 10 bits"),
    (runtime("cuda half"), "numbers of 16 bits, a fraction of 10"),
    (runtime("cuda bfloat16"), "numbers of 16 bits, a fraction of 7"),
    (runtime("cuda graph"), "fp16, all kernels launched at once"),
)
SLOW_WAY = (Compiled("torch.compile", PLAIN), "C++ written and compiled for this model")


def software_first(
    model: nn.Module,
    example: Tensor,
    threads: int = 1,
    calls: int = 100,
    budget_s: float | None = None,
    slow: bool = False,
    device: str = "cpu",
) -> Iterator[list[SoftwareRow]]:
    """Try each way to run `model` on `example`, float (B, C, H, W), and yield the table so far as it fills.

    The last rows run plain eager and OpenVINO on all cores that this process may use, where those are more than
    `threads`. `slow` tries `torch.compile` too, which may take minutes to prepare. With the `device` "cuda" the ways
    are those of a GPU, and the first is fp32 there. `calls` and `budget_s` are those of `measure`. Raises RuntimeFailed
    where the first way itself cannot run the model.
    """
    rows, prepared = [], []
    for way, what, count in _ways(threads, slow, device):
        name = way.name if count == threads else f"{way.name}, {count} threads"
        try:
            prepared.append(way.prepare(model, example, count))
            rows.append(SoftwareRow(name, what, difference=prepared[-1].difference, note=prepared[-1].note))
        except RuntimeFailed as error:
            if not prepared:
                raise
            rows.append(SoftwareRow(name, what, note=str(error)))
        yield list(rows)
    for taken in measure(prepared, calls, budget_s):
        if len({len(one.rounds) for one in taken}) == 1:  # at the end of a round, when all can be paired
            yield _filled(rows, taken)


def best(rows: Sequence[SoftwareRow]) -> SoftwareRow:
    """Return the quickest row on as many threads as plain eager, the first; raises ValueError before any was timed."""
    timed = [row for row in rows if row.ran and row.latency.calls]
    if not timed:
        raise ValueError("No way has been timed yet; run software_first to its end.")
    same = [row for row in timed if row.latency.threads == timed[0].latency.threads]
    return min(same, key=lambda row: row.latency.median_ms)


def _ways(threads: int, slow: bool, device: str) -> Iterator[tuple[Runtime, str, int]]:
    """Yield (runtime, what it is, number of threads)."""
    if device == "cuda":
        yield from ((way, what, threads) for way, what in GPU_WAYS)
        return
    yield from ((way, what, threads) for way, what in (*WAYS, *((SLOW_WAY,) if slow else ())))
    cores = allowed_cores()
    if cores > threads:
        yield runtime("eager"), f"plain eager on all {cores} cores", cores
        yield runtime("openvino"), f"Intel's inference engine on all {cores} cores", cores


def _filled(rows: list[SoftwareRow], taken: list[Latency]) -> list[SoftwareRow]:
    """Return the rows with the latencies of those that were prepared, which are the ones with a difference."""
    found = iter(taken)
    return [_timed(row, next(found), taken[0]) if row.difference is not None else row for row in rows]


def _timed(row: SoftwareRow, latency: Latency, plain: Latency) -> SoftwareRow:
    return replace(row, latency=latency, ratio=None if latency is plain else compare(latency, plain))


def _norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
