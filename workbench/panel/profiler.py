"""The profiler's panel: sliders beside scenario, batch, threads and runtime, and where the time of a model goes.

Under the tiles the layers move below the machine's measured roofs, and each gets its verdict. Everything is measured
here; what is only predicted says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from workbench.panel import controls, measure, words
from workbench.panel.board import Panel
from workbench.panel.figure import ProfilerDrawing
from workbench.panel.measure import OTHER, Point
from workbench.panel.worker import Steps
from workbench.plots import Shown
from workbench.profiler import SCENARIOS, ScenarioResult, multi_stream, offline, server, single_stream
from workbench.profiler.environment import allowed_cores
from workbench.profiler.layers import LayerTimes, measure_layers
from workbench.profiler.limits import Limits, limits
from workbench.profiler.roofline import Roofline, RooflinePoint, growing_roofline, points
from workbench.profiler.scenarios import BOUND, FEWEST_FOR_P99, LEAST_BOUND_MS, LOAD
from workbench.profiler.sweeps import BATCHES
from workbench.profiler.verdicts import Verdict, layer_verdicts
from workbench.runtimes import Prepared, RuntimeFailed, available_runtimes, runtime

BATCHED = ("multi stream", "offline")  # in the other scenarios a query is one image
OUTSIDE = "outside layers"
SECONDS = 1.5  # of each scenario, for each model
LAYER_CALLS = 60


class Here(NamedTuple):
    """The conditions of a measurement."""

    runtime: str
    scenario: str
    batch: int
    threads: int

    @property
    def place(self) -> str:
        return measure.place_of(self.runtime, self.batch, self.threads)

    @property
    def device(self) -> str:
        return runtime(self.runtime).device

    @property
    def roofs(self) -> int:
        """What the roofs hang on: the number of threads, or 0 for those of the GPU."""
        return self.threads if self.device == "cpu" else 0


@dataclass
class Look:
    """What is known of one model at one place beyond its latency; `why_not` says why it shows no layers."""

    results: dict[str, ScenarioResult] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)  # scenarios that were not stopped
    times: LayerTimes | None = None
    points: list[RooflinePoint] = field(default_factory=list)
    verdicts: list[Verdict] | None = None  # one for each layer of `times`
    known: Limits | None = None  # what they were judged by
    why_not: str = ""

    def told(self, most: int = 4) -> list[Verdict]:
        """Return the verdicts on the layers that take most time, the slowest first."""
        if self.verdicts is None:
            return []
        by_time = sorted(zip(self.times.layers, self.verdicts, strict=True), key=lambda pair: -pair[0].ms)
        return [said for _, said in by_time[:most]]


class ProfilerPanel(Panel):
    """A technique's sliders, and where the time of the compressed model goes, under conditions that one chooses.

    `scenario`, `batch` and `threads` are where it begins; the other arguments are those of `Panel`. Raises ValueError
    for a scenario that does not exist and for more threads than this process may use.
    """

    def __init__(
        self,
        technique,
        model: nn.Module,
        data: Any,
        *,
        scenario: str = SCENARIOS[0],
        batch: int = 16,
        threads: int = 1,
        **options,
    ):
        cores = allowed_cores()
        if scenario not in SCENARIOS:
            raise ValueError(f"There is no scenario {scenario!r}; choose one of {', '.join(SCENARIOS)}.")
        if not 1 <= threads <= cores:
            raise ValueError(f"threads is {threads}; this process may use 1 to {cores}.")
        self._begin = {"scenario": scenario, "batch": batch, "threads": threads}
        self._looks: dict[tuple, Look] = {}
        self._roofs: dict[int, Roofline] = {}  # by `Here.roofs`, as far as they are measured
        self._whole_roofs: set[int] = set()
        super().__init__(technique, model, data, records=[], **options)

    # --- what is on the page ---------------------------------------------------------------------------------------

    def _build(self, first_runtime: str) -> None:
        choices = {"scenario": SCENARIOS, "batch": sorted({*BATCHES, self._begin["batch"]})}
        choices["threads"] = range(1, allowed_cores() + 1)
        helps = {"scenario": "MLPerf-like: how queries come", "batch": "Images in a query, multi stream and offline"}
        self.scenario, self.batch, self.threads = (
            controls.choice(name, [(str(v), v) for v in values], self._begin[name], helps.get(name, ""))
            for name, values in choices.items()
        )
        self.verdict_view = controls.View(kind="wb-verdicts", live=True, name="verdicts")
        self.scenario.observe(self._scenario_chosen, "value")
        self._scenario_chosen()
        super()._build(first_runtime)
        for control in (self.scenario, self.batch, self.threads):
            control.observe(self._changed, "value")

    def _scenario_chosen(self, _change=None) -> None:
        self.batch.disabled = self.scenario.value not in BATCHED

    def _offered_runtimes(self) -> list[str]:
        return [one.name for one in available_runtimes()]

    def _conditions(self) -> tuple:
        return (self.runtime, self.scenario, self.batch, self.threads)

    def _make_drawing(self, fp32_bytes: int) -> ProfilerDrawing:
        return ProfilerDrawing([*self._layers, OTHER, OUTSIDE])

    def _layout(self) -> tuple:
        parts = list(super()._layout())
        parts.insert(parts.index(self.words) + 1, self.verdict_view)
        return tuple(parts)

    def _header_html(self) -> str:
        title = self.kind.title()
        return super()._header_html().replace(f"<h3>{title}", f"<h3>Profiler: {title.lower()}", 1)

    # --- conditions ------------------------------------------------------------------------------------------------

    @property
    def here(self) -> Here:
        """The conditions that the controls show."""
        batch = self.batch.value if self.scenario.value in BATCHED else 1
        return Here(self.runtime.value, self.scenario.value, batch, self.threads.value)

    @property
    def place(self) -> str:
        return self.here.place

    def look(self, point: Point | None, place: str = "") -> Look:
        """Return what is known of a point at a place, by default the shown one."""
        key = (point and point.technique, place or self.place)
        return self._looks.setdefault(key, Look()) if point else Look()

    def _example_of(self, here: Here) -> Tensor:
        return self.data.example(here.batch)

    def _where(self) -> tuple[str, Tensor, int]:
        here = self.here
        return here.runtime, self._example_of(here), here.threads

    # --- work ------------------------------------------------------------------------------------------------------

    def _measure(self, point: Point, name: str, stale) -> Steps:
        """Time the model, run the scenario, look into its layers and judge them; count accuracy last."""
        here, timing = self.here, point.timings.get(name)
        known = timing and timing.done and here.scenario in self.look(point, here.place).finished and point.exact
        if not known:
            self.measurements += 1
            self._progress("measuring", "measuring …", stale)
        try:
            for step in (self._time_here, self._run, self._look_inside, self._judge):
                yield from step(point, here, stale)
            yield from self._count(point, stale)
        finally:
            if self.state == "stopped":
                self._draw()
        self._progress("done", self._hint() or "measured", stale)

    def _time_here(self, point: Point, here: Here, stale) -> Steps:
        example = self._example_of(here)
        for timing in measure.time_point(point, self.baseline, here.runtime, example, here.threads):
            calls = timing.now.calls if timing and timing.now else 0
            self._tick("measuring", f"measuring latency, {here.place} … {calls} calls", stale)
            yield
        self._track(point)
        self._draw()

    def _run(self, point: Point, here: Here, stale) -> Steps:
        """Run the chosen scenario, the baseline first; a server's load follows from what the baseline can carry."""
        runs = [(self.baseline, here.scenario, "the baseline"), (point, here.scenario, "this model")]
        if here.scenario == "server":
            runs.insert(0, (self.baseline, "single stream", "the baseline"))
        for one, scenario, name in runs:
            look = self.look(one, here.place)
            if scenario in look.finished:
                continue
            for result in self._scenario(one, scenario, here):
                look.results[scenario] = result
                self._tick("measuring", f"{scenario}, {name} … {result.queries:,} queries", stale)
                yield
            look.finished.add(scenario)
        self._draw()

    def _scenario(self, one: Point, scenario: str, here: Here) -> Iterator[ScenarioResult]:
        prepared = self._prepared(one, here)
        if scenario == "server":
            alone = self.look(self.baseline, here.place).results["single stream"]
            rate = LOAD * alone.images_per_second
            seconds = max(SECONDS, min(1.1 * FEWEST_FOR_P99 / rate, 4 * SECONDS))
            return server(prepared, rate, max(LEAST_BOUND_MS, BOUND * alone.p50_ms), seconds)
        run = {"single stream": single_stream, "multi stream": multi_stream, "offline": offline}
        return run[scenario](prepared, SECONDS)

    def _prepared(self, one: Point, here: Here) -> Prepared:
        example = self._example_of(here)
        if one is self.baseline:
            return measure.prepared_baseline(one.model, example, here.runtime, here.threads)
        return runtime(here.runtime).prepare(one.model, example, here.threads)

    def _look_inside(self, point: Point, here: Here, stale) -> Steps:
        """Measure the roofs of this machine, once, and the layers of both models."""
        if here.roofs not in self._whole_roofs:
            self._progress("measuring", "measuring the roofs of this machine …", stale)
            for roofs in growing_roofline(here.threads, here.device):
                self._roofs[here.roofs] = roofs
                self._tick("measuring", "measuring the roofs of this machine …", stale)
                yield
            self._whole_roofs.add(here.roofs)
        for one in (self.baseline, point):
            look = self.look(one, here.place)
            if look.times is None and not look.why_not:
                self._progress("measuring", "timing each layer …", stale)
                yield
                yield from self._time_layers(one, look, here, stale)
        self._draw()

    def _time_layers(self, one: Point, look: Look, here: Here, stale) -> Steps:
        """Measure the layers of a model; its points move as they come, and what was stopped is begun anew."""
        example, found = self._example_of(here), []
        try:
            for found in measure_layers([one.model], example, here.runtime, here.threads, LAYER_CALLS):
                if found:
                    look.points = points(found[0])
                self._tick("measuring", "timing each layer …", stale)
                yield
        except RuntimeFailed as error:
            look.why_not = str(error)
            return
        look.times = found[0]
        measure.foresight(self.model, here.runtime, example, here.threads).learn(one, example, look.times)

    def _judge(self, point: Point, here: Here, stale) -> Steps:
        look = self.look(point, here.place)
        if look.verdicts is None and look.times is not None:
            self._progress("measuring", "finding out why …", stale)
            yield
            look.known = limits(here.runtime, here.threads)
            yield
            look.verdicts = layer_verdicts(point.model, self._example_of(here), look.times, look.known)
        if look.verdicts is not None:
            timing = point.timings[here.place]
            timing.known, timing.layers = look.known, look.verdicts
            self._draw()

    # --- drawing ---------------------------------------------------------------------------------------------------

    def _tiles_html(self) -> str:
        here, now, pinned = self.here, self.point, self.pinned
        where = "GPU" if here.device == "cuda" else "CPU"
        made = [
            words.size_tile(now, self.baseline, pinned),
            words.accuracy_tile(now, self.baseline, pinned),
            words.latency_tile("latency", f"latency, {where}, batch {here.batch}", here.place, now, pinned),
            words.scenario_tile(here.scenario, *(self._result(one) for one in (now, self.baseline, pinned))),
        ]
        return words.row_of(made)

    def _result(self, one: Point | None) -> ScenarioResult | None:
        return self.look(one).results.get(self.here.scenario)

    def _words_html(self, hint: str) -> str:
        look = self.look(self.point)
        self.verdict_view.html = words.verdict_list(look.told(), look.why_not)
        return super()._words_html(hint)

    def _table_html(self) -> str:
        before, now = self.look(self.baseline), self.look(self.point)
        return words.layer_times_table(now.times, before.times, now.verdicts or []) + super()._table_html()

    def _draw_figure(self, name: str) -> None:
        self.drawing.show(self._shown(self.baseline), self._shown(self.point), self._roofs.get(self.here.roofs))

    def _shown(self, one: Point | None) -> Shown:
        look, result = self.look(one), self._result(one)
        return Shown(look.points, self._layer_ms(look.times), result.latencies_ms[-200:] if result else ())

    def _layer_ms(self, times: LayerTimes | None) -> dict[str, float]:
        """Return the milliseconds of each of the baseline's layers, of what is in no such layer, and outside."""
        if times is None:
            return {}
        found = dict.fromkeys([*self._layers, OTHER], 0.0)
        for layer in times.layers:
            found[measure.home(layer.name, self._layers)] += layer.ms
        return {**found, OUTSIDE: times.outside_ms}
