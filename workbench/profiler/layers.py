"""Where the time of a model goes: each layer's own time, measured inside the running model, beside what it computes.

Eager layers are timed around their own `forward`, OpenVINO's by its performance counters, ONNX Runtime's by its
profiler, CUDA's by the GPU's events (as `torch.profiler` and OpenVINO's `benchmark_app -pc` do). The end-to-end time is
taken without any of that, in turns with it; what no layer accounts for is shown as time outside layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn

from workbench.profiler.timing import Latency, measure
from workbench.runtimes import Prepared
from workbench.runtimes import runtime as named_runtime
from workbench.runtimes.layers import Instrumented, Part, instrumented

BUDGET_S = 2.0
FRAME_S = 0.1  # between two looks at the layers so far: asking a runtime for them takes a while
NEGATIVE = 0.02  # of the end-to-end time: layers that add up to more than that were measured in worse conditions


@dataclass(frozen=True)
class LayerTime:
    """One layer of a running model; time, multiply-adds and bytes are those of one call with the whole batch.

    `name` and `kind` are the torch module's where the runtime's layer stems from one, else the runtime's own.
    `share` is the part of the end-to-end time, 0 to 1. `weight_bytes` and `activation_bytes` (inputs and outputs) are
    what the runtime holds: an int8 kernel's weights take one byte each. `kernel` is the runtime's implementation.
    """

    name: str
    kind: str
    ms: float
    share: float
    macs: int
    weight_bytes: int
    activation_bytes: int
    precision: str
    kernel: str


@dataclass(frozen=True)
class LayerTimes:
    """A model's layers in the order they run; `total_ms` is the median of undisturbed end-to-end calls.

    `outside_ms` is the total less the sum of the layers: what runs between them, and starting the whole.
    """

    layers: tuple[LayerTime, ...]
    total_ms: float
    outside_ms: float
    runtime: str
    precision: str
    batch: int
    threads: int
    noisy: bool

    def slowest(self, count: int = 5) -> list[LayerTime]:
        """Return the layers that take most time, slowest first."""
        return sorted(self.layers, key=lambda layer: -layer.ms)[:count]

    def to_dict(self) -> dict:
        """Return the figures as JSON can hold them."""
        return asdict(self) | {"layers": [asdict(layer) for layer in self.layers]}


def layer_times(
    model: nn.Module, example: Tensor, runtime: str = "eager", threads: int = 1, calls: int = 100
) -> LayerTimes:
    """Measure each layer of `model` on `example`, float (B, C, H, W), in turns with undisturbed end-to-end calls.

    Raises RuntimeFailed if the runtime cannot run the model or does not show its layers.
    """
    return layer_times_of([model], example, runtime, threads, calls)[0]


def layer_times_of(
    models: Sequence[nn.Module], example: Tensor, runtime: str = "eager", threads: int = 1, calls: int = 100
) -> list[LayerTimes]:
    """Measure the layers of several models, all in turns, so that a drift of the machine reaches all alike."""
    found = []
    for found in measure_layers(models, example, runtime, threads, calls):  # noqa: B007
        pass
    return found


def measure_layers(
    models: Sequence[nn.Module], example: Tensor, runtime: str = "eager", threads: int = 1, calls: int = 100
) -> Iterator[list[LayerTimes]]:
    """Measure as `layer_times_of` does, and yield the layers of all models so far after each block of calls.

    The lists are empty while models are prepared, and up to the last one where the runtime tells its layers only at
    the end. Between two blocks the caller may draw, or close the generator, which stops the measurement.
    """
    ready, copies, found, seen = [], [], [], time.perf_counter()
    for model in models:
        ready.append(named_runtime(runtime).prepare(model, example, threads))
        yield found
        copies.append(instrumented(ready[-1]))
        yield found
    so_far = lambda: [_times(*one) for one in zip(ready, copies, taken, strict=False)]
    for taken in measure([*ready, *copies], calls, BUDGET_S * len(models)):
        told = all(copy.grows for copy in copies) and all(one.calls for one in taken)
        if told and time.perf_counter() - seen > FRAME_S:
            found, seen = so_far(), time.perf_counter()
        yield found
    yield so_far()


def _times(prepared: Prepared, copy: Instrumented, total: Latency) -> LayerTimes:
    layers = tuple(_layer(*found, total.median_ms) for found in zip(copy.parts, copy.times_ms(), strict=True))
    outside = total.median_ms - sum(layer.ms for layer in layers)
    return LayerTimes(
        layers,
        total.median_ms,
        outside,
        prepared.runtime,
        prepared.precision,
        prepared.batch,
        prepared.threads,
        noisy=total.noisy or outside < -NEGATIVE * total.median_ms,
    )


def _layer(part: Part, ms: float, total_ms: float) -> LayerTime:
    held = (part.macs, part.weight_bytes, part.activation_bytes, part.precision, part.implementation)
    return LayerTime(part.name, part.kind, float(ms), float(ms) / total_ms, *held)
