"""What a panel knows about one setting, and the generators that find it out, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from workbench.artifact import ledger
from workbench.profiler import Latency, LayerCost, layer_costs, measure
from workbench.profiler.layers import LayerTimes, measure_layers
from workbench.profiler.limits import Limits
from workbench.profiler.predict import LatencyModel
from workbench.profiler.report import Difference, accuracy_difference
from workbench.profiler.verdicts import Taken, Verdict, whole_verdict
from workbench.runtimes import Kernel, Prepared, RuntimeFailed, available_runtimes, runtime
from workbench.surgery import remembered, weighted_layers
from workbench.technique import Technique
from workbench.training import Accuracy, predictions

CALLS, BUDGET_S = 100, 1.0
MOST_LEARNT, LEARN_CALLS = 5, 30  # points whose layers are looked into, so that others can be predicted
LEARN_REST = 0.4  # seconds without a new setting before that, so that none waits while a model is made ready
IMAGES = 128  # in a batch: few, so that the first accuracy comes soon; larger ones are no faster
OTHER = "other"  # norms, biases outside of layers, the file's header


@dataclass
class Timing:
    """Latency of one point on one runtime, taken in turns with the baseline there and on the best fp32 runtime.

    `known` and `layers` are what a profiler found out besides: the limits there, and the verdict on each layer.
    """

    runtime: str
    precision: str  # what the kernels really compute in
    note: str = ""
    kernels: tuple[Kernel, ...] = ()
    baseline_kernels: tuple[Kernel, ...] = ()
    now: Latency | None = None
    baseline: Latency | None = None
    best: Latency | None = None
    done: bool = False
    known: Limits | None = None
    layers: Sequence[Verdict] = ()


@dataclass
class Prediction:
    """A latency said before it was measured; `error` is relative, known after, `median_error` that of all so far."""

    ms: float
    error: float | None = None
    median_error: float | None = None


@dataclass
class Point:
    """One setting, and everything measured of it so far; the baseline is a point too.

    `model` is None where a panel let go of it, to be made again when these settings come back.
    """

    title: str
    technique: Technique | None
    model: nn.Module | None
    size_bytes: int
    parameters: int
    macs: int
    layer_bytes: dict[str, int]
    layer_macs: dict[str, int]
    layer_parameters: dict[str, int]
    hits: Tensor | None = None  # bool (N,): which validation images are right, in order
    exact: bool = False  # every validation image was looked at
    timings: dict[str, Timing] = field(default_factory=dict)  # by place: runtime, and batch and threads if not 1
    predicted: dict[str, Prediction] = field(default_factory=dict)  # by place too
    test: Accuracy | None = None
    test_hits: Tensor | None = None
    steps: list = field(default_factory=list)  # of the training that made it
    trained_here: bool = False
    note: str = ""
    costs: tuple[LayerCost, ...] = ()  # of its layers, on one image

    @property
    def accuracy(self) -> Accuracy | None:
        return None if self.hits is None else Accuracy(int(self.hits.sum()), len(self.hits))


# --- exact and cheap -----------------------------------------------------------------------------------------------


def weigh(title: str, technique: Technique | None, model: nn.Module, example: Tensor, layers: list[str]) -> Point:
    """Return the point with its exact bytes, parameters and multiply-adds, summed up per layer of the baseline."""
    book = ledger(model)
    costs = layer_costs(model, example)
    layer_bytes, layer_macs, layer_parameters = ({name: 0 for name in [*layers, OTHER]} for _ in range(3))
    for row in book.rows:
        layer = home(row.name, layers)
        layer_bytes[layer] += row.weight_bytes + row.table_bytes + row.index_bytes
        layer_parameters[layer] += row.parameters
    layer_bytes[OTHER] += book.total_bytes - sum(layer_bytes.values())
    for cost in costs:
        layer_macs[home(cost.name, layers)] += cost.macs
    counts = (book.total_bytes, book.parameters, sum(layer_macs.values()))
    found = (layer_bytes, layer_macs, layer_parameters)
    return Point(title, technique, model, *counts, *found, costs=tuple(costs))


def home(name: str, layers: list[str]) -> str:
    """Return the baseline's layer that a tensor or a factor belongs to: "conv2.0.weight" -> "conv2"."""
    inside = [layer for layer in layers if name == layer or name.startswith(layer + ".")]
    return max(inside, key=len, default=OTHER)


def layer_names(model: nn.Module) -> list[str]:
    return [name for name, _ in weighted_layers(model)]


# --- accuracy ------------------------------------------------------------------------------------------------------


def score(point: Point, split) -> Iterator[None]:
    """Count right answers batch by batch; `point.hits` grows, the same images first for every point."""
    if point.exact:
        return
    hits = []
    for predicted, labels in predictions(point.model, split, IMAGES):
        hits.append(predicted == labels)
        point.hits = torch.cat(hits)
        yield
    point.exact = True


def difference(now: Tensor | None, baseline: Tensor | None) -> Difference | None:
    """Compare two rows of hits image by image, as far as both have been counted."""
    if now is None or baseline is None:
        return None
    n = min(len(now), len(baseline))
    return accuracy_difference(now[:n], baseline[:n])


def changed(now: Tensor, baseline: Tensor) -> tuple[int, int, int]:
    """Return how many images became wrong, how many became right, and how many were compared."""
    n = min(len(now), len(baseline))
    now, baseline = now[:n], baseline[:n]
    return int((baseline & ~now).sum()), int((now & ~baseline).sum()), n


# --- latency -------------------------------------------------------------------------------------------------------


def place_of(name: str, batch: int = 1, threads: int = 1) -> str:
    """Name a runtime and what differs from one image on one thread: "openvino, batch 16, 2 threads"."""
    said = [name, *([f"batch {batch}"] if batch > 1 else []), *([f"{threads} threads"] if threads > 1 else [])]
    return ", ".join(said)


def time_point(point: Point, baseline: Point, name: str, example: Tensor, threads: int = 1) -> Iterator[Timing | None]:
    """Time the point in turns with the baseline on the same runtime, and on the best fp32 one where that is another.

    Yields the growing `Timing`, which is `point.timings[place]` too. Raises RuntimeFailed where a model cannot run.
    """
    place = place_of(name, len(example), threads)
    if point.timings.get(place) and point.timings[place].done:
        return
    reference = prepared_baseline(baseline.model, example, name, threads)
    yield None
    mine = runtime(name).prepare(point.model, example, threads)
    yield None
    best = reference
    if reference.device == "cpu":
        for best in best_fp32(baseline.model, example, threads):  # noqa: B007
            yield None
    timing = point.timings[place] = Timing(name, mine.precision, mine.note, mine.kernels, reference.kernels)
    runners = [reference, mine] if best is reference else [reference, mine, best]
    for taken in measure(runners, CALLS, BUDGET_S):
        timing.baseline, timing.now, timing.best = taken[0], taken[1], taken[-1 if len(taken) == 3 else 0]
        yield timing
    timing.done = True
    yield timing


def prepared_baseline(model: nn.Module, example: Tensor, name: str, threads: int = 1) -> Prepared:
    """Return the baseline made ready for a runtime, once for all panels that show this model."""
    key = ("panel", name, threads, tuple(example.shape))
    return remembered(model, key, lambda: runtime(name).for_baseline().prepare(model, example, threads))


def best_fp32(model: nn.Module, example: Tensor, threads: int = 1) -> Iterator[Prepared | None]:
    """Find the CPU runtime that runs the baseline fastest, once for each model; the last one yielded is it."""
    found: dict[str, str] = remembered(model, ("panel", "best", threads, tuple(example.shape)), dict)
    if "name" not in found:
        runners = []
        for one in available_runtimes():
            if one.device == "cpu" and (prepared := _try(model, example, one.name, threads)):
                runners.append(prepared)
            yield None
        taken = []
        for taken in measure(runners, 20, 0.3):  # noqa: B007
            yield None
        found["name"] = min(taken, key=lambda latency: latency.median_ms).runtime
    yield prepared_baseline(model, example, found["name"], threads)


def _try(model: nn.Module, example: Tensor, name: str, threads: int) -> Prepared | None:
    try:
        return prepared_baseline(model, example, name, threads)
    except RuntimeFailed:
        return None


def verdict_of(point: Point, baseline: Point, place: str) -> Verdict | None:
    """Say why a point is faster or not, from the latencies that were taken; None while they are not."""
    timing = point.timings.get(place)
    if timing is None or not timing.done:
        return None
    now = Taken.of(point.model, timing.now, point.costs, timing.kernels)
    before = Taken.of(baseline.model, timing.baseline, baseline.costs, timing.baseline_kernels)
    return whole_verdict(now, before, timing.known, timing.layers)


# --- predicted, then measured --------------------------------------------------------------------------------------


@dataclass
class Foresight:
    """Predicts latencies at one place from the layers of the first few points that were measured there."""

    fitted: LatencyModel
    learnt: list[Point] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return len(self.learnt) >= MOST_LEARNT

    def learn(self, point: Point, example: Tensor, times: LayerTimes) -> None:
        """Fit to one more point, once; layers of the first few say enough of the others."""
        if not self.full and not any(one is point for one in self.learnt):
            self.fitted.learn(point.model, example, times)
            self.learnt.append(point)


def foresight(model: nn.Module, name: str, example: Tensor, threads: int = 1) -> Foresight:
    """Return what predicts latencies of this baseline's relatives on a runtime, one for all panels that show it."""
    key = ("panel", "foresight", name, threads, tuple(example.shape))
    return remembered(model, key, lambda: Foresight(LatencyModel(name, threads, len(example))))


def predict(point: Point, known: Foresight, place: str, example: Tensor) -> None:
    """Say how long the point will take, unless that was measured, or nothing was learnt yet."""
    if known.learnt and place not in point.timings and place not in point.predicted:
        point.predicted[place] = Prediction(known.fitted.predict_ms(point.model, example))


def track(point: Point, known: Foresight, place: str) -> None:
    """Set the prediction of a point beside its measurement, once."""
    timing, guess = point.timings.get(place), point.predicted.get(place)
    if guess and guess.error is None and timing and timing.done:
        guess.error = known.fitted.track(guess.ms, timing.now.median_ms)
        guess.median_error = known.fitted.median_error


def learn(points: Iterable[Point], known: Foresight, example: Tensor) -> Iterator[float | None]:
    """Look into the layers of points that were measured, while there is something to learn from them.

    Yields the seconds to wait for a newer setting first, and None after each block of calls; when it is closed there,
    nothing is learnt of that point.
    """
    for point in points:
        if known.full or any(one is point for one in known.learnt):
            continue
        yield LEARN_REST
        where, found = (known.fitted.runtime, known.fitted.threads), []
        try:
            for found in measure_layers([point.model], example, *where, LEARN_CALLS):  # noqa: B007
                yield None
        except RuntimeFailed:  # a runtime that shows no layers: nothing is predicted there
            return
        known.learn(point, example, found[0])


# --- the test images -----------------------------------------------------------------------------------------------


def examine(point: Point, split) -> Iterator[int]:
    """Count right answers on the test images, once a point; yields how many were looked at."""
    if point.test is not None:
        return
    hits = []
    for predicted, labels in predictions(point.model, split):
        hits.append(predicted == labels)
        yield sum(map(len, hits))
    point.test_hits = torch.cat(hits)
    point.test = Accuracy(int(point.test_hits.sum()), len(point.test_hits))
