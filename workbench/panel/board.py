"""The panel: controls on top, tiles that answer at once, one figure, the sentences, the table, progress and Stop."""

from __future__ import annotations

import copy
import threading
import time
from dataclasses import replace
from typing import Any

import ipywidgets
import plotly.graph_objects as go
from torch import nn

from workbench import plots
from workbench.panel import controls, measure, words
from workbench.panel.measure import Point
from workbench.panel.worker import Steps, Worker, give_way
from workbench.records import read_records, record_names
from workbench.runtimes import available_runtimes, runtime
from workbench.technique import Technique

REST = 0.12  # seconds without a new value after which the slider counts as released
PATIENCE = 5.0  # seconds to wait for the release of a slider that is held still; the browser may never tell of it
FRAME = 0.1  # seconds between two drawings of progress


class Figure(go.FigureWidget):
    """A figure that tells a page which opens later what it shows now; plotly's own tells what it showed at first."""

    def get_state(self, key=None, drop_defaults=False):
        if key is None and "_layout_obj" in self.__dict__:
            self._trait_values["_widget_data"] = copy.deepcopy(self._data)
            self._trait_values["_widget_layout"] = copy.deepcopy(self._layout_obj._props)
        return super().get_state(key, drop_defaults)

    def send_again(self) -> None:
        """Send every mark and range once more: what was drawn while a page opened, before it listened, is lost."""
        properties = ("x", "y", "text", "visible", "error_y.array", "error_y.arrayminus")
        drawn = {name: [_plain(trace, name) for trace in self.data] for name in properties}
        ranges = {f"{axis}.range": list(self.layout[axis].range) for axis in _AXES if self._has_range(axis)}
        self._send_update_msg(drawn, ranges, list(range(len(self.data))))

    def _has_range(self, axis: str) -> bool:
        return axis in self._layout_obj._props and self.layout[axis].range is not None


_AXES = ("xaxis", "yaxis", "xaxis4", "xaxis5", "yaxis5")


def _plain(trace, name: str):
    """Return a property of a trace, an array as a list; None where this kind of trace has no such property."""
    try:
        value = trace[name]
    except (KeyError, ValueError):
        return None
    return value if value is None or isinstance(value, (bool, str)) else list(value)


def is_usual(kind: type[Technique], settings: dict) -> bool:
    """True when only the slider differs from the defaults: such records make one curve, which others must not join."""
    if kind(**settings).is_neutral:
        return True
    fixed = [knob for knob in kind.settings() if not knob.is_number or knob.name in ("finetune", "soft_weight")]
    return all(settings.get(knob.name, knob.default) == knob.default for knob in fixed)


class Panel(ipywidgets.VBox):
    """Sliders for one technique on one model: exact bytes while dragging, accuracy and latency when it rests.

    `technique`: a class, or an instance whose values are the start. `data`: a `Data` with `val` and `test`.
    `records`: recorded points to draw behind one's own. `runtime`: where latency is measured first.
    """

    def __init__(
        self,
        technique: type[Technique] | Technique,
        model: nn.Module,
        data: Any,
        *,
        records: list | None = None,
        runtime: str = "openvino",
        presets: dict[str, dict] | None = None,
    ):
        super().__init__()
        self.kind = technique if isinstance(technique, type) else type(technique)
        self.model, self.data = model, data
        self.knobs = {knob.name: knob for knob in self.kind.settings()}
        start = (self.kind() if isinstance(technique, type) else technique).values()
        self.presets = {**controls.presets(self.kind, start), **(presets or {})}
        self.state = "resting"
        self.measurements = 0  # how many times a measurement of a setting began
        self.baseline: Point | None = None
        self.point: Point | None = None
        self.pinned: Point | None = None
        self._points: dict[tuple, Point] = {}
        self._history, self._at = [start], 0
        self._applying = False
        self._notice = ""  # what was wrong with the page's address, until a control is moved
        self._training: list | None = None
        self._lock = threading.RLock()  # held for moments only, so that Stop never waits for a drawing
        self._drawing = threading.RLock()
        self._drawn = 0.0
        self._layers = measure.layer_names(model)
        self._example = data.example()
        self.worker = Worker(self._failed)
        self._build(start, runtime, records)
        self._submit(0.5)

    # --- what is on the page ---------------------------------------------------------------------------------------

    def _build(self, start: dict, first_runtime: str, records: list | None) -> None:
        self.controls = {name: controls.control(knob, start[name]) for name, knob in self.knobs.items()}
        names = [one.name for one in available_runtimes() if one.device == "cpu"]
        first = first_runtime if first_runtime in names else names[0]
        self.runtime = controls.choice("runtime", [(n, n) for n in names], first, "Where latency is measured")
        self.preset = controls.choice("preset", [("choose …", ""), *((n, n) for n in self.presets)], "")
        self.undo_button = controls.button("↶ Undo", "Back to the setting before", self.undo, disabled=True)
        self.redo_button = controls.button("↷ Redo", "Forward again", self.redo, disabled=True)
        self.pin_button = controls.button("★ Pin", "Keep this point to compare others with it", self.pin)
        self.stop_button = controls.button("Stop", "Stop measuring or training; what is known stays", self.stop)
        self.report_button = controls.button("Report", "Measure this setting once on the test images", self.report)
        self.train_button = controls.button("Train it here", "Train with these settings", self.train, accent=True)
        self.address = controls.Address(prefix=self.kind.__name__)
        self.header = controls.View(kind="wb-header", html=self._header_html())
        self.tiles = controls.View(kind="wb-tiles-view", name="results")
        self.words = controls.View(kind="wb-words", live=True, name="in words")
        self.alert = controls.View(kind="wb-alert", role="alert")
        self.report_view = controls.View(kind="wb-report", live=True)
        self.table = controls.View(kind="wb-table")
        self.status = controls.View(kind="wb-status", role="status")
        self.figure = self._figure(records)
        self.children = self._layout()
        self._watch_controls()
        self._draw()

    def _figure(self, records: list | None) -> go.FigureWidget:
        layers = [*self._layers, measure.OTHER]
        recorded = self._recorded() if records is None else records
        weight = sum(4 * p.numel() for p in self.model.parameters())
        drawn = plots.panel_figure(layers, recorded, weight, self._can_train)
        self._hide_training, self._show_training = plots.without_training(layers) if self._can_train else ({}, {})
        if self._can_train and not self.kind.trains:
            drawn.update_layout(self._hide_training)
        figure = Figure(drawn)  # it gives its traces new uids
        figure._config = {**figure._config, **plots.CONFIG}
        self._traces = {trace.uid: mine for trace, mine in zip(drawn.data, figure.data, strict=True)}
        figure.add_class("wb-figure")
        return figure

    def _recorded(self) -> list:
        """Return the shipped records of this technique on this model."""
        name = getattr(self.model, "architecture", {}).get("name", "")
        every = [record for file in record_names() for record in read_records(file)]
        mine = {"model": name, "data": self.data.name, "technique": self.kind.__name__, "split": "val"}
        fits = [r for r in every if all(getattr(r, key) == value for key, value in mine.items())]
        return [r for r in fits if is_usual(self.kind, r.settings)]

    def _layout(self) -> tuple:
        row = lambda kind, *parts: ipywidgets.Box(parts).add_class("wb-row").add_class(kind)
        acts = (self.preset, self.undo_button, self.redo_button, self.pin_button, self.address)
        knobs = (*self.controls.values(), self.runtime)
        foot = (self.status, self.stop_button, self.report_button)
        train = (self.train_button,) if self._can_train else ()
        self.add_class("wb-panel")
        return (
            self.header,
            row("wb-knobs", *knobs),
            row("wb-acts", *acts, *train),
            self.alert,
            self.tiles,
            self.figure,
            self.words,
            self.report_view,
            row("wb-foot", *foot),
            self.table,
        )

    def _header_html(self) -> str:
        name = getattr(self.model, "architecture", {}).get("name", type(self.model).__name__)
        about = f"{name} · {len(self.data.classes)} classes · {words.machine()}"
        source = words.source_link(self.kind.source)
        return (
            f"<h3>{self.kind.title()}</h3><span class='wb-source'>{source}</span><span class='wb-about'>{about}</span>"
        )

    @property
    def _can_train(self) -> bool:
        return self.kind.trains or "finetune" in self.knobs

    # --- settings --------------------------------------------------------------------------------------------------

    def _watch_controls(self) -> None:
        for control in self.controls.values():
            control.observe(self._changed, "value")
        self.runtime.observe(self._changed, "value")
        self.preset.observe(self._preset_chosen, "value")
        self.address.observe(self._opened_with, "found")
        self.header.observe(self._page_opened, "opened")

    @property
    def values(self) -> dict:
        """The settings that the controls show."""
        return {name: controls.value_of(knob, self.controls[name].value) for name, knob in self.knobs.items()}

    def set(self, **values) -> None:
        """Move several controls at once; the panel reacts once."""
        with self._lock:
            self._applying = True
            try:
                for name, value in values.items():
                    self.controls[name].value = value
            finally:
                self._applying = False
        self._submit()

    def _changed(self, _change=None) -> None:
        if not self._applying:
            self._notice = ""
            self._submit()

    def _preset_chosen(self, change) -> None:
        if change["new"]:
            self.set(**self.presets[change["new"]])
            self.preset.value = ""

    def _page_opened(self, _change) -> None:
        with self._drawing:
            self.figure.send_again()

    def _opened_with(self, change) -> None:
        """Take over the settings that the page's address names; say which of them do not fit."""
        found = {}
        for name, text in change["new"].items():
            try:
                if name in self.knobs:
                    found[name] = controls.parse(self.knobs[name], text)
            except ValueError as error:
                self._notice = f"The address of this page does not fit: {error}"
        self.set(**{n: v for n, v in found.items() if controls.reachable(self.knobs[n], v)})

    def _commit(self, values: dict) -> None:
        """Remember the settings for undo, and write them into the address."""
        with self._lock:
            if values != self._history[self._at]:
                self._history = [*self._history[: self._at + 1], values]
                self._at += 1
            self._show_history()
        code = f"wb.{self.kind.__name__}({', '.join(f'{k}={v!r}' for k, v in values.items())})"
        with self.address.hold_sync():
            self.address.settings = {name: controls.word(value) for name, value in values.items()}
            self.address.code = code

    def _show_history(self) -> None:
        self.undo_button.disabled = self._at == 0
        self.redo_button.disabled = self._at == len(self._history) - 1

    def undo(self) -> None:
        """Go back to the settings before."""
        with self._lock:
            if self.values != self._history[self._at]:
                self._commit(self.values)
        self._go(-1)

    def redo(self) -> None:
        """Go forward again."""
        self._go(+1)

    def _go(self, by: int) -> None:
        with self._lock:
            self._at = min(max(self._at + by, 0), len(self._history) - 1)
            self._show_history()
            values = self._history[self._at]
        self.set(**values)

    def pin(self) -> None:
        """Keep the shown point to compare others with it; pressed again on the same point, let it go."""
        with self._lock:
            self.pinned = None if self.pinned is self.point else self.point
        self._draw()

    # --- work ------------------------------------------------------------------------------------------------------

    def _submit(self, rest: float = REST) -> None:
        values, name = self.values, self.runtime.value
        self.worker.submit(lambda stale: self._show(values, name, rest, stale))

    def stop(self) -> None:
        """Stop what runs. A student in training is kept as it is, and measured."""
        with self._lock:
            if self._training is not None:
                self._submit(0)
                self._progress("stopped", "stopped; the model so far is kept")
            else:
                self.worker.stop()
                self._progress("stopped", "stopped; results so far stay")

    def train(self) -> None:
        """Train with the shown settings, drawing loss and accuracy."""
        values, name = self.values, self.runtime.value
        self.worker.submit(lambda stale: self._train(values, name, stale))

    def report(self) -> None:
        """Measure the shown setting on the test images, once."""
        values, name = self.values, self.runtime.value
        self.worker.submit(lambda stale: self._report(values, name, stale))

    def wait_idle(self, timeout: float = 60.0) -> bool:
        """Wait until nothing is measured any more; False when that took longer than `timeout` seconds."""
        return self.worker.wait_idle(timeout)

    def close(self) -> None:
        """End the worker's thread and take the panel from the page."""
        self.worker.close()
        super().close()

    def _show(self, values: dict, name: str, rest: float, stale) -> Steps:
        """Weigh at once, and measure when no newer setting has come for `rest` seconds."""
        self._say(self._notice)
        self._find_baseline()
        technique = self.kind(**values)
        self.point = self._known(technique)
        self._progress("resting", "", stale)
        self._draw()
        yield rest
        given_up = time.monotonic() + PATIENCE
        while self._held and time.monotonic() < given_up:
            yield 0.02
        self._commit(values)
        if self.point is None:
            self._progress("done", self._hint())
            return
        yield from self._measure(self.point, name, stale)

    @property
    def _held(self) -> bool:
        return any(getattr(control, "held", False) for control in self.controls.values())

    def _find_baseline(self) -> None:
        if self.baseline is None:
            self.baseline = self._weigh("baseline", None, self.model)

    def _weigh(self, title: str, technique: Technique | None, model: nn.Module) -> Point:
        return measure.weigh(title, technique, model, self._example, self._layers)

    def _known(self, technique: Technique) -> Point | None:
        """Return the point of these settings: known, shipped, or compressed now; None if it must be trained first."""
        key = tuple(technique.values().values())
        if key not in self._points:
            recalled = technique.must_train
            model = technique.recall(self.model) if recalled else technique.compress(self.model, self.data)
            if model is None:
                return None if technique.trains else self._known(replace(technique, finetune=0))
            self._points[key] = self._weigh(self._title(technique), technique, model)
        return self._points[key]

    def _title(self, technique: Technique) -> str:
        """Name the settings that say something: numbers with an effect, and choices other than the default."""
        values = technique.values()
        said = [k for k in self.knobs.values() if values[k.name] != (k.neutral if k.is_number else k.default)]
        return (
            ", ".join(f"{k.label} {controls.word(values[k.name])}" for k in said) or f"{self.kind.title()}, no effect"
        )

    def _measure(self, point: Point, name: str, stale) -> Steps:
        """Count accuracy, then time; results appear as they come."""
        timing = point.timings.get(name)
        if not (point.exact and timing and timing.done):
            self.measurements += 1
            self._progress("measuring", "measuring …", stale)
        for one, label in ((self.baseline, "the baseline's accuracy"), (point, "accuracy")):
            for _ in measure.score(one, self.data.val):
                seen = f"measuring {label} … {len(one.hits):,}/{len(self.data.val):,}"
                self._tick("measuring", seen, stale)
                yield
        self._draw()
        for one in self._runtimes(name):
            for timing in measure.time_point(point, self.baseline, one, self._example):
                calls = timing.now.calls if timing and timing.now else 0
                self._tick("measuring", f"measuring latency, {one} … {calls} calls", stale)
                yield
        self._draw()
        self._progress("done", self._hint() or "measured", stale)

    def _runtimes(self, name: str) -> list[str]:
        return [name, *([self._gpu[0]] if self._gpu[0] else [])]

    @property
    def _gpu(self) -> tuple[str, str]:
        here, why_not = runtime("cuda").available()
        return ("cuda", "") if here else ("", why_not)

    def _hint(self) -> str:
        """Say what the Train button is for, when the shown settings ask for training that has not happened here."""
        if self._training is not None:
            return "Training with these settings; Stop keeps the model so far."
        technique = self.kind(**self.values)
        if not technique.must_train:
            return ""
        if tuple(technique.values().values()) in self._points:
            return ""
        if technique.trains:
            return "Not trained here yet: press Train it here."
        return "Shown before fine-tuning: press Fine-tune it here."

    # --- training and report ---------------------------------------------------------------------------------------

    def _train(self, values: dict, name: str, stale) -> Steps:
        self._say("")
        self._find_baseline()
        technique = self.kind(**values)
        self._commit(values)
        self._training = steps = []
        self._progress("training", "training …", stale)

        def watch(step):
            steps.append(step)
            self._tick("training", f"training … step {step.step:,}/{step.steps:,}, {words.clock(steps)}", stale)
            give_way()
            return not stale()

        yield
        try:
            model = technique.compress(self.model, self.data, watch)
        finally:
            self._training = None
        point = self._weigh(self._title(technique), technique, model)
        point.steps = steps
        if steps and steps[-1].step < steps[-1].steps:
            point.note = f"stopped after {steps[-1].step:,} of {steps[-1].steps:,} steps"
        self._points[tuple(technique.values().values())] = point
        yield
        self.point = point
        self._draw()
        yield from self._measure(point, name, stale)

    def _report(self, values: dict, name: str, stale) -> Steps:
        self._say("")
        self._find_baseline()
        point = self._known(self.kind(**values))
        if point is None:
            self._progress("done", self._hint())
            return
        self._progress("measuring", "measuring on the test images …", stale)
        for one in (self.baseline, point):
            for seen in measure.examine(one, self.data.test):
                self._tick("measuring", f"measuring on the test images … {seen:,}/{len(self.data.test):,}", stale)
                yield
        self.report_view.html = words.report(point, self.baseline)
        self._draw()
        self._progress("done", "reported", stale)
        yield from self._measure(point, name, stale)

    # --- drawing ---------------------------------------------------------------------------------------------------

    def _failed(self, error: Exception) -> None:
        """Show an error of the worker as one sentence; the panel lives on."""
        self._say(f"{words.sentence(error)}")
        self._progress("failed", "failed")

    def _say(self, alert: str) -> None:
        self.alert.html = words.alert(alert)

    def _progress(self, state: str, text: str, stale=lambda: False) -> None:
        with self._lock:
            if not stale():
                self.state = state
                self.stop_button.disabled = state not in ("measuring", "training")
                self.status.html = words.status(state, text, self.measurements)

    def _tick(self, state: str, text: str, stale) -> None:
        """Draw progress, at most ten times a second; nothing of a job that became old."""
        if time.monotonic() - self._drawn > FRAME and not stale():
            self._progress(state, text, stale)
            self._draw()

    def _draw(self) -> None:
        """Bring tiles, figure, sentences and table up to date."""
        with self._drawing:
            hint = self._hint()
            self.train_button.description = "Train it here" if self.kind.trains else "Fine-tune it here"
            self.train_button.disabled = not hint or self._training is not None
            self.train_button.layout.display = "none" if self.train_button.disabled else None
            name, now, base, pinned = self.runtime.value, self.point, self.baseline, self.pinned
            self.tiles.html = words.tiles(now, base, pinned, name, self._gpu)
            self._draw_figure(name)
            self.words.html = words.in_words(now, base, name, hint)
            self.table.html = words.table(now, base, pinned)
            self._drawn = time.monotonic()

    def _draw_figure(self, name: str) -> None:
        with self.figure.batch_update():
            self._draw_tradeoff()
            self._draw_layers()
            self._draw_latency(name)
            if self._can_train:
                self._draw_training()

    def _draw_tradeoff(self) -> None:
        tried = [p for p in self._points.values() if p.hits is not None and p is not self.point]
        groups = {"baseline": [self.baseline], "tried": tried, "pinned": [self.pinned], "now": [self.point]}
        seen = []
        for role, items in groups.items():
            shown = [p for p in items if p is not None and p.hits is not None]
            filled = plots.points([(p.title, p.size_bytes, p.accuracy) for p in shown], role)
            errors = filled.pop("error_y")
            self._traces[f"tradeoff-{role}"].update(**filled)
            self._traces[f"tradeoff-{role}"].error_y.update(errors)
            seen += shown
        self._widen(seen)

    def _widen(self, seen: list[Point]) -> None:
        """Make room for points outside of the trade-off's axes; never take room away, so that nothing jumps."""
        if not seen:
            return
        axes = self.figure.layout
        low = axes.yaxis.range[0]
        wanted = plots.accuracy_range([p.accuracy.percent for p in seen], low + 0.5)
        if wanted[0] < low:
            axes.yaxis.range = wanted
        left, right = axes.xaxis.range
        fits = plots.bytes_range(min(p.size_bytes for p in seen), max(p.size_bytes for p in seen))
        if fits[0] < left or fits[1] > right:
            axes.xaxis.range = [min(left, fits[0]), max(right, fits[1])]

    def _draw_layers(self) -> None:
        for role, point in (("baseline", self.baseline), ("now", self.point)):
            for kind, text in (("bytes", plots.size_text), ("macs", plots.count_text)):
                empty = dict.fromkeys([*self._layers, measure.OTHER], 0)
                numbers = list((getattr(point, f"layer_{kind}") if point else empty).values())
                self._traces[f"{kind}-{role}"].update(x=numbers, text=[text(v) for v in numbers])

    def _draw_latency(self, name: str) -> None:
        timing = self.point.timings.get(name) if self.point else None
        pairs = {"baseline": timing and timing.baseline, "now": timing and timing.now}
        samples = {role: list(latency.samples_ms[-200:]) if latency else [] for role, latency in pairs.items()}
        for role, ms in samples.items():
            self._traces[f"latency-{role}"].update(x=ms, y=[role] * len(ms), visible=bool(ms))
        if any(samples.values()):
            self.figure.layout.xaxis4.range = plots.latency_range(*samples.values())

    def _draw_training(self) -> None:
        steps = self._training if self._training is not None else (self.point.steps if self.point else [])
        for trace in plots.learning_traces(steps):
            kind = "loss" if trace.name == "loss" else "accuracy"
            self._traces[f"training-{kind}"].update(x=trace.x, y=trace.y)
        if steps:
            self.figure.update_layout(self._show_training)
            self.figure.layout.xaxis5.range = [0, steps[-1].steps]
            self.figure.layout.yaxis5.range = [0, 1.1 * max(step.loss for step in steps)]
