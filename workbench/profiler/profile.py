"""Measure a compressed model beside its baseline: bytes, accuracy, multiply-adds, latency, throughput, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.artifact import ledger
from workbench.data import Data, Split
from workbench.profiler.costs import LayerCost, layer_costs, peak_activation_bytes
from workbench.profiler.environment import environment
from workbench.profiler.report import Measures, Profile, Run
from workbench.profiler.room import bytes_for_one, require_room, room_for
from workbench.profiler.scenarios import repeated
from workbench.profiler.timing import Latency, measure
from workbench.runtimes import RUNTIMES, ModelFile, Prepared, Runtime, RuntimeFailed, runtime
from workbench.runtimes.cuda import Cuda
from workbench.runtimes.files import FileLayer
from workbench.surgery import clone
from workbench.training import predictions
from workbench.weights import sparsity

Progress = Callable[[str, float], Any]
BATCH_CALLS = 10  # of a large batch: each is long, and ten rounds carry an interval
BATCH_BUDGET_S = 5.0
ANSWERED = 64  # images in a batch of a file while right answers are counted


@dataclass
class _Contest:
    """The models that one runtime runs: the compressed one and, where there is one, its baseline."""

    runtime: Runtime
    single: list[Prepared]
    batch: list[Prepared]


def profile(
    model: nn.Module | ModelFile,
    data: Data | Tensor | None = None,
    baseline: nn.Module | ModelFile | None = None,
    runtimes: Sequence[str | Runtime] | None = None,
    batch: int = 1,
    threads: int = 1,
    split: str = "val",
    calls: int = 100,
    throughput_batch: int = 64,
    watch: Progress | None = None,
    flush_l2: bool = False,
) -> Profile:
    """Measure `model`, and `baseline` in turns with it, on every runtime of this machine or on those named.

    `data` is a Data, or one example batch, float (B, C, H, W); accuracy is counted on `split` of a Data, for a file by
    the first runtime that runs it. Where a model does not take `throughput_batch` images, throughput is that of
    `batch`. `flush_l2` overwrites a GPU's L2 cache before each call there, as if something else had run in between.
    Ctrl-C ends the timing; the profile is then `stopped` and rests on the rounds taken, and without one it is raised.
    Raises ValueError for wrong arguments and RuntimeFailed if the model fails, or no runtime can run it, or the batch
    has no room; `watch(message, fraction)`.
    """
    watch = watch or (lambda message, fraction: None)
    chosen = [one.flushing() if flush_l2 and isinstance(one, Cuda) else one for one in _chosen(runtimes)]
    models, image = [model] if baseline is None else [model, baseline], _example(data, 1)
    needed = max(bytes_for_one(one, image) for one in models)
    require_room(needed, batch)
    example, large = _example(data, batch), _example(data, max(room_for(needed, throughput_batch), batch))
    hits = [_hits(one, data, split, chosen, watch, i / len(models)) for i, one in enumerate(models)]
    watch("counting bytes and multiply-adds", 0.3)
    measures = [_measures(one, example, right) for one, right in zip(models, hits, strict=True)]
    contests, failed = _prepare_all(models, chosen, example, large, threads, watch)
    if not contests:
        raise RuntimeFailed(" ".join(["No runtime can run this model.", *failed.values()]))
    single, stopped = _time([one.single for one in contests], calls, "timing single calls", 0.5, watch)
    many = single
    if not stopped:
        large = [one.batch for one in contests]
        many, stopped = _time(large, BATCH_CALLS, "timing large batches", 0.75, watch, BATCH_BUDGET_S, single)
    runs = [_run(*found) for found in zip(contests, single, many, strict=True)]
    watch("done", 1.0)
    return Profile(
        model=measures[0],
        baseline=measures[1] if baseline is not None else None,
        runs=tuple(runs),
        failed=failed,
        split=split if isinstance(data, Data) else "",
        environment=environment(),
        stopped=stopped,
    )


def _chosen(runtimes: Sequence[str | Runtime] | None) -> list[Runtime]:
    if runtimes is None:
        return list(RUNTIMES)
    return [one if isinstance(one, Runtime) else runtime(one) for one in runtimes]


def _example(data: Data | Tensor | None, batch: int) -> Tensor:
    if batch < 1:
        raise ValueError(f"A batch of {batch} images cannot be measured; take at least 1.")
    if data is None:
        raise ValueError(
            "profile needs a Data or one example batch of images, float (B, C, H, W), to run the model on."
        )
    images = data if isinstance(data, Tensor) else data.example(min(batch, max(1, len(data.val))))
    if not len(images):
        raise ValueError("There is not one image to run the model on: the data set is empty.")
    return repeated(images, batch)


def _answers(model: nn.Module | ModelFile, split: Split, chosen: Sequence[Runtime]) -> Iterator[tuple[Tensor, Tensor]]:
    """Do as `predictions` does; a file runs on the first of the chosen runtimes that can, in batches of one size."""
    if not isinstance(model, ModelFile):
        yield from predictions(model, split)
        return
    prepared = _first_that_runs(
        model, split.batch(torch.arange(model.fixed_batch or ANSWERED) % max(1, len(split)))[0], chosen
    )
    for images, labels in split.batches(prepared.batch):
        full = repeated(images, prepared.batch)
        yield prepared(full)[: len(labels)].argmax(1), labels


def _first_that_runs(file: ModelFile, example: Tensor, chosen: Sequence[Runtime]) -> Prepared:
    reasons = []
    for one in chosen:
        try:
            return one.prepare(file, example)
        except RuntimeFailed as error:
            reasons.append(str(error))
    raise RuntimeFailed(" ".join(["No runtime can run this model.", *reasons]))


def _hits(model, data, split: str, chosen: Sequence[Runtime], watch: Progress, done: float) -> Tensor | None:
    """Return which images of the split are classified right, bool (N,), or None for a mere example."""
    if not isinstance(data, Data):
        return None
    if split not in ("train", "val", "test"):
        raise ValueError(f"There is no split {split!r}; choose train, val or test.")
    images, right, seen = getattr(data, split), [], 0
    for predicted, labels in _answers(model, images, chosen):
        right.append(predicted == labels)
        seen += len(labels)
        watch(f"counting right answers, {seen:,} of {len(images):,}", 0.3 * (done + 0.5 * seen / len(images)))
    if not right:
        raise ValueError(f"The {split} split has no images; accuracy cannot be counted on it.")
    return torch.cat(right)


def _measures(model: nn.Module | ModelFile, example: Tensor, hits: Tensor | None) -> Measures:
    if isinstance(model, ModelFile):
        return _file_measures(model, example, hits)
    layers, account = layer_costs(model, example), ledger(model)
    with torch.inference_mode():
        finite = bool(torch.isfinite(clone(model)(example)).all())
    return Measures(
        size_bytes=account.total_bytes,
        fp32_bytes=account.fp32_bytes,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=sum(layer.macs for layer in layers),
        sparsity=sparsity(model),
        peak_activation_bytes=peak_activation_bytes(model, example),
        layers=tuple(layers),
        hits=hits,
        finite=finite,
    )


def _file_measures(file: ModelFile, example: Tensor, hits: Tensor | None) -> Measures:
    layers, parameters = file.layers(example), file.parameters()
    weights = sum(layer.parameters for layer in layers)
    return Measures(
        size_bytes=file.size_bytes,
        fp32_bytes=4 * parameters,
        parameters=parameters,
        macs=sum(layer.macs for layer in layers),
        sparsity=1 - sum(layer.nonzero for layer in layers) / max(weights, 1),
        peak_activation_bytes=None,  # torch's allocator has no part in it
        layers=tuple(_file_cost(layer) for layer in layers),
        hits=hits,
        finite=bool(torch.isfinite(runtime("openvino").prepare(file, example)(example).float()).all()),
    )


def _file_cost(layer: FileLayer) -> LayerCost:
    counts = (layer.parameters, layer.parameters, layer.nonzero, layer.macs)  # biases are no part of a file's layers
    return LayerCost(layer.name, layer.kind, *counts, layer.output_shape)


def _prepare_all(models, chosen, example, large, threads, watch) -> tuple[list[_Contest], dict[str, str]]:
    contests, failed = [], {}
    for i, one in enumerate(chosen):
        watch(f"preparing {one.name}", 0.35 + 0.15 * i / len(chosen))
        here, why_not = one.available()
        if not here:
            failed[one.name] = f"{one.name}: {why_not}."
            continue
        try:
            single = _ready(one, models, example, threads)
            contests.append(_Contest(one, single, _many(one, models, large, threads) or single))
        except RuntimeFailed as error:
            failed[one.name] = str(error)
    return contests, failed


def _ready(one: Runtime, models, example: Tensor, threads: int) -> list[Prepared]:
    """Return the model prepared by its runtime and, where there is one, the baseline by the runtime for baselines."""
    return [way.prepare(model, example, threads) for way, model in zip((one, one.for_baseline()), models, strict=False)]


def _many(one: Runtime, models, large: Tensor, threads: int) -> list[Prepared]:
    """Return the models prepared for a large batch, or nothing where one of them takes its own batch only."""
    try:
        return _ready(one, models, large, threads)
    except RuntimeFailed:
        return []


def _time(
    groups, calls: int, message: str, done: float, watch: Progress, budget_s=None, instead=None
) -> tuple[list[list[Latency]], bool]:
    """Time all groups of prepared models in one run, in turns; return the latencies grouped so, and if it was stopped.

    Ctrl-C before all have been timed once leaves `instead`, or is raised where there is nothing else.
    """
    flat, results, stopped = [one for group in groups for one in group], [], False
    try:
        for results in measure(flat, calls, budget_s):
            watch(message, done + 0.25 * min(1.0, results[-1].calls / calls))
    except KeyboardInterrupt:
        stopped = True
        if not min((one.calls for one in results), default=0):
            if instead is None:
                raise
            return instead, stopped
    found = iter(results)
    return [[next(found) for _ in group] for group in groups], stopped


def _run(contest: _Contest, single: list[Latency], many: list[Latency]) -> Run:
    own = contest.single[0]
    return Run(
        runtime=own.runtime,
        device=own.device,
        note=own.note,
        kernels=own.kernels,
        difference=own.difference,
        latency=single[0],
        throughput=many[0],
        baseline=single[1] if len(single) > 1 else None,
        baseline_throughput=many[1] if len(many) > 1 else None,
        peak_cuda_bytes=own.peak_bytes() if own.device == "cuda" else None,
    )
