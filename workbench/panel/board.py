"""The panel: controls on top, tiles that answer at once, one figure, the sentences, the table, progress and Stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ipywidgets
from torch import Tensor, nn

from workbench.panel import controls, measure, words
from workbench.panel.figure import Drawing
from workbench.panel.measure import Point
from workbench.panel.worker import Steps, Worker, give_way
from workbench.records import read_records, record_names
from workbench.runtimes import available_runtimes, runtime
from workbench.technique import Technique

REST = 0.08  # seconds without a new value after which the slider counts as released
PATIENCE = 5.0  # seconds to wait for the release of a slider that is held still; the browser may never tell of it
MOST_MODELS = 32  # points whose networks are kept; of those not used for longer only the figures stay
FRAME = 0.1  # seconds between two drawings of progress in tiles and words
FIGURE_FRAME = 0.4  # of the figure, since the browser's drawing takes a processor from what is measured


Offer = type[Technique] | Technique


def is_usual(kind: type[Technique], settings: dict) -> bool:
    """True when only the slider differs from the defaults: such records make one curve, which others must not join."""
    technique = kind(**settings)  # what older records do not name has its default
    if technique.is_neutral:
        return True
    fixed = [knob for knob in kind.settings() if not knob.is_number or knob.name in ("finetune", "soft_weight")]
    return all(getattr(technique, knob.name) == knob.default for knob in fixed)


class Panel(ipywidgets.VBox):
    """Sliders for a technique on one model: exact bytes while dragging, accuracy and latency when it rests.

    `technique`: a class, an instance whose values are the start, or a sequence of them to choose from. `data`: a `Data`
    with `val` and `test`. `records`: recorded points to draw behind one's own, in place of those that are shipped.
    `runtime`: where latency is measured first.
    """

    def __init__(
        self,
        technique: Offer | Sequence[Offer],
        model: nn.Module,
        data: Any,
        *,
        records: list | None = None,
        runtime: str = "openvino",
        presets: dict[str, dict] | None = None,
    ):
        super().__init__()
        offered = technique if isinstance(technique, Sequence) else (technique,)
        starts = [one() if isinstance(one, type) else one for one in offered]
        self._starts = {type(start): start.values() for start in starts}
        self._records, self._presets = records, presets or {}
        self.kind = type(starts[0])
        self.model, self.data = model, data
        self.state = "resting"
        self.measurements = 0  # how many times a measurement of a setting began
        self.baseline: Point | None = None
        self.point: Point | None = None
        self.pinned: Point | None = None
        self._points: dict[Technique, Point] = {}
        self._recent: list[Technique] = []  # the points in the order of their last use
        self._history, self._at = [starts[0]], 0
        self._applying = False
        self._notice = ""  # what was wrong with the page's address, until a control is moved
        self._training: list | None = None
        self._lock = threading.RLock()  # held for moments only, so that Stop never waits for a drawing
        self._drawing = threading.RLock()
        self._drawn = self._figure_drawn = 0.0
        self._layers = measure.layer_names(model)
        self._example = data.example()
        self.worker = Worker(self._failed)
        self._build(runtime)
        self._submit(0.5)

    # --- what is on the page ---------------------------------------------------------------------------------------

    def _build(self, first_runtime: str) -> None:
        names = self._offered_runtimes()
        first = first_runtime if first_runtime in names else names[0]
        kinds = [(kind.title(), kind) for kind in self._starts]
        self.chooser = controls.choice("technique", kinds, self.kind, "Which technique the controls are for")
        self.runtime = controls.choice("runtime", [(n, n) for n in names], first, "Where latency is measured")
        self.preset = controls.choice("preset", [("choose …", "")], "")
        self.undo_button = controls.button("↶ Undo", "Back to the setting before", self.undo, disabled=True)
        self.redo_button = controls.button("↷ Redo", "Forward again", self.redo, disabled=True)
        self.pin_button = controls.button("★ Pin", "Keep this point to compare others with it", self.pin)
        self.stop_button = controls.button("Stop", "Stop measuring or training; what is known stays", self.stop)
        self.report_button = controls.button("Report", "Measure this setting once on the test images", self.report)
        self.train_button = controls.button("Train it here", "Train with these settings", self.train, accent=True)
        self.address = controls.Address(prefix=self.kind.__name__)
        self.header = controls.View(kind="wb-header")
        self.card = controls.View(kind="wb-about-technique")
        self.tiles = controls.View(kind="wb-tiles-view", name="results")
        self.words = controls.View(kind="wb-words", live=True, name="in words")
        self.alert = controls.View(kind="wb-alert", role="alert")
        self.report_view = controls.View(kind="wb-report", live=True)
        self.table = controls.View(kind="wb-table")
        self.status = controls.View(kind="wb-status", role="status")
        fp32_bytes = sum(4 * p.numel() for p in self.model.parameters())
        self.drawing = self._make_drawing(fp32_bytes)
        self.knob_row = controls.row("wb-knobs")
        self.children = self._layout()
        self._take(self.kind)
        self._watch_controls()
        self._draw()

    def _make_drawing(self, fp32_bytes: int) -> Drawing:
        trains = any(kind.trains or "finetune" in start for kind, start in self._starts.items())
        return Drawing(self._layers, self._recorded(), fp32_bytes, trains)

    @property
    def figure(self):
        """The figure on the page."""
        return self.drawing.widget

    def _take(self, kind: type[Technique]) -> None:
        """Put the controls of one technique on the page, at the values where it starts."""
        self._show_controls(kind, self._starts[kind])

    def _show_controls(self, kind: type[Technique], start: dict) -> None:
        with self._lock:
            self.kind = kind
            self.knobs = {knob.name: knob for knob in kind.settings()}
            self.controls = {name: controls.control(knob, start[name]) for name, knob in self.knobs.items()}
            self.presets = {**controls.presets(kind, start), **self._presets}
        for control in self.controls.values():
            control.observe(self._changed, "value")
        self.knob_row.children = (*self.controls.values(), *self._conditions())
        self.preset.options = [("choose …", ""), *((n, n) for n in self.presets)]
        self.header.html, self.card.html = self._header_html(), words.card(kind)

    def _offered_runtimes(self) -> list[str]:
        return [one.name for one in available_runtimes() if one.device == "cpu"]

    def _conditions(self) -> tuple:
        """Return the controls that say under which conditions latency is measured."""
        return (self.runtime,)

    @property
    def place(self) -> str:
        """Where latency is measured, as the tiles and the points' timings call it."""
        return self.runtime.value

    def _recorded(self) -> list:
        """Return the shipped records of this technique on this model, or those that the caller gave."""
        if self._records is not None:
            return [record for record in self._records if record.technique == self.kind.__name__]
        name = getattr(self.model, "architecture", {}).get("name", "")
        every = [record for file in record_names() for record in read_records(file)]
        mine = {"model": name, "data": self.data.name, "technique": self.kind.__name__, "split": "val"}
        fits = [r for r in every if all(getattr(r, key) == value for key, value in mine.items())]
        return [r for r in fits if is_usual(self.kind, r.settings)]

    def _layout(self) -> tuple:
        acts = (self.preset, self.undo_button, self.redo_button, self.pin_button, self.address)
        choose = (controls.row("wb-choose", self.chooser),) if len(self._starts) > 1 else ()
        foot = (self.status, self.stop_button, self.report_button)
        self.add_class("wb-panel")
        return (
            self.header,
            *choose,
            self.card,
            self.knob_row,
            controls.row("wb-acts", *acts, self.train_button),
            self.alert,
            self.tiles,
            self.figure,
            self.words,
            self.report_view,
            controls.row("wb-foot", *foot),
            self.table,
        )

    def _header_html(self) -> str:
        name = getattr(self.model, "architecture", {}).get("name", type(self.model).__name__)
        about = f"{name} · {len(self.data.classes)} classes · {words.machine()}"
        source = words.source_link(self.kind.source)
        return (
            f"<h3>{self.kind.title()}</h3><span class='wb-source'>{source}</span><span class='wb-about'>{about}</span>"
        )

    # --- settings --------------------------------------------------------------------------------------------------

    def _watch_controls(self) -> None:
        self.chooser.observe(lambda change: self.choose(change["new"]), "value")
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

    @property
    def technique(self) -> Technique:
        """The technique with the settings that the controls show."""
        with self._lock:
            return self.kind(**self.values)

    def choose(self, kind: type[Technique]) -> None:
        """Put another of the offered techniques on the page; the points tried so far stay in the figure."""
        if kind is not self.kind:
            self._take(kind)
            self.chooser.value = kind
            with self._drawing, self.figure.batch_update():
                self.drawing.show_recorded(self._recorded())
            self._notice = ""
            self._submit()

    def _grey_out(self) -> None:
        """Let nobody move what has no effect beside the other settings."""
        with self._lock:
            values = self.values
            for name, knob in self.knobs.items():
                self.controls[name].disabled = not knob.applies(values)

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
        found, texts = {}, dict(change["new"])
        self.choose({kind.__name__: kind for kind in self._starts}.get(texts.pop("technique", ""), self.kind))
        for name, text in texts.items():
            try:
                if name in self.knobs:
                    found[name] = controls.parse(self.knobs[name], text)
            except ValueError as error:
                self._notice = f"The address of this page does not fit: {error}"
        self.set(**{n: v for n, v in found.items() if controls.reachable(self.knobs[n], v)})

    def _commit(self, technique: Technique) -> None:
        """Remember the settings for undo, and write them into the address."""
        with self._lock:
            if technique != self._history[self._at]:
                self._history = [*self._history[: self._at + 1], technique]
                self._at += 1
            self._show_history()
        with self.address.hold_sync():
            self.address.settings, self.address.code = self._said(technique), words.code(technique)

    def _said(self, technique: Technique) -> dict[str, str]:
        """Return what the page's address says of a technique."""
        said = {name: controls.word(value) for name, value in technique.values().items()}
        return {"technique": type(technique).__name__, **said} if len(self._starts) > 1 else said

    def _show_history(self) -> None:
        self.undo_button.disabled = self._at == 0
        self.redo_button.disabled = self._at == len(self._history) - 1

    def undo(self) -> None:
        """Go back to the settings before."""
        with self._lock:
            if self.technique != self._history[self._at]:
                self._commit(self.technique)
        self._go(-1)

    def redo(self) -> None:
        """Go forward again."""
        self._go(+1)

    def _go(self, by: int) -> None:
        with self._lock:
            self._at = min(max(self._at + by, 0), len(self._history) - 1)
            self._show_history()
            technique = self._history[self._at]
        self._restore(technique)

    def _restore(self, technique: Technique) -> None:
        self.choose(type(technique))
        self.set(**technique.values())

    def pin(self) -> None:
        """Keep the shown point to compare others with it; pressed again on the same point, let it go."""
        with self._lock:
            self.pinned = None if self.pinned is self.point else self.point
        self._draw()

    # --- work ------------------------------------------------------------------------------------------------------

    def _submit(self, rest: float = REST) -> None:
        self._grey_out()
        try:
            technique, name = self.technique, self.place
        except ValueError as error:  # settings that do not go together
            self.worker.stop()
            self._say(words.sentence(error))
            return
        self.worker.submit(lambda stale: self._show(technique, name, rest, stale))

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
        technique, name = self.technique, self.place
        self.worker.submit(lambda stale: self._train(technique, name, stale))

    def report(self) -> None:
        """Measure the shown setting on the test images, once."""
        technique, name = self.technique, self.place
        self.worker.submit(lambda stale: self._report(technique, name, stale))

    def wait_idle(self, timeout: float = 60.0) -> bool:
        """Wait until nothing is measured any more; False when that took longer than `timeout` seconds."""
        return self.worker.wait_idle(timeout)

    def close(self) -> None:
        """End the worker's thread and take the panel from the page."""
        if hasattr(self, "worker"):  # a panel that was refused is closed too, when it is collected
            self.worker.close()
        super().close()

    def _show(self, technique: Technique, name: str, rest: float, stale) -> Steps:
        """Weigh at once, and measure when no newer setting has come for `rest` seconds."""
        self._say(self._notice)
        self._find_baseline()
        self.point = self._known(technique)
        self._predict(self.point)
        self._progress("resting", "", stale)
        self._draw()
        yield rest
        given_up = time.monotonic() + PATIENCE
        while self._held and time.monotonic() < given_up:
            yield 0.02
        self._commit(technique)
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
        point = self._points.get(technique)
        if point is None or point.model is None:
            model = self._recall(technique) if technique.must_train else self._compress(technique)
            if model is None:
                untrained = self._without_training(technique)
                return untrained and self._known(untrained)
            if point is None:
                point = self._points[technique] = self._weigh(self._title(technique), technique, model)
            point.model = model
        self._used(technique)
        return point

    def _used(self, technique: Technique) -> None:
        """Note that a point was used, and let go of the networks of those that were not for longest.

        A network that was trained here stays, since that took long, and so does the pinned one.
        """
        self._recent = [*(one for one in self._recent if one != technique), technique]
        for point in (self._points[one] for one in self._recent[:-MOST_MODELS]):
            if not point.trained_here and point is not self.pinned:
                point.model = None

    def _recall(self, technique: Technique) -> nn.Module | None:
        return technique.recall(self.model)

    def _compress(self, technique: Technique, watch=None) -> nn.Module:
        return technique.compress(self.model, self.data, watch)

    def _without_training(self, technique: Technique) -> Technique | None:
        """Return what can be shown before the training that the settings ask for; None if that is nothing."""
        if technique.trains:
            return None
        return replace(technique, finetune=0) if technique.must_train else technique

    def _title(self, technique: Technique) -> str:
        """Name the settings that say something: numbers with an effect, and choices other than the default."""
        values = technique.values()
        knobs = [knob for knob in technique.settings() if knob.applies(values)]
        said = [k for k in knobs if values[k.name] != (k.neutral if k.is_number else k.default)]
        said = said or ([] if technique.is_neutral else knobs[:1])
        settings = ", ".join(f"{k.label} {controls.word(values[k.name])}" for k in said) or "no effect"
        return settings if len(self._starts) == 1 and said else f"{technique.title()}, {settings}"

    def _measure(self, point: Point, name: str, stale) -> Steps:
        """Count accuracy, then time; results appear as they come, and those of a stopped measurement stay."""
        timing = point.timings.get(name)
        if not (point.exact and timing and timing.done):
            self.measurements += 1
            self._progress("measuring", "measuring …", stale)
        try:
            yield from self._count(point, stale)
            yield from self._time(point, name, stale)
        finally:
            if self.state == "stopped":
                self._draw()
        self._progress("done", self._hint() or "measured", stale)
        yield from self._learn(point)

    def _count(self, point: Point, stale) -> Steps:
        for one, label in ((self.baseline, "the baseline's accuracy"), (point, "accuracy")):
            for _ in measure.score(one, self.data.val):
                seen = f"measuring {label} … {len(one.hits):,}/{len(self.data.val):,}"
                self._tick("measuring", seen, stale)
                yield
        self._draw()

    def _time(self, point: Point, name: str, stale) -> Steps:
        for one in self._runtimes(name):
            for timing in measure.time_point(point, self.baseline, one, self._example):
                calls = timing.now.calls if timing and timing.now else 0
                self._tick("measuring", f"measuring latency, {one} … {calls} calls", stale)
                yield
        self._track(point)
        self._draw()

    def _where(self) -> tuple[str, Tensor, int]:
        """Return the runtime, the batch and the number of threads that latency is measured with."""
        return self.runtime.value, self._example, 1

    def _predict(self, point: Point | None) -> None:
        if point is not None:
            measure.predict(point, measure.foresight(self.model, *self._where()), self.place, self._where()[1])

    def _track(self, point: Point) -> None:
        measure.track(point, measure.foresight(self.model, *self._where()), self.place)

    def _learn(self, point: Point) -> Steps:
        known, example = measure.foresight(self.model, *self._where()), self._where()[1]
        yield from measure.learn((self.baseline, point), known, example)

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
        technique = self.technique
        if not technique.must_train or technique in self._points:
            return ""
        if self._without_training(technique) is None:
            return "Not trained here yet: press Train it here."
        return f"Shown before its training: press {self._train_label}."

    @property
    def _train_label(self) -> str:
        return "Train it here" if self.kind.trains else "Fine-tune it here"

    @property
    def _shows_training(self) -> bool:
        """True when there is a place for the learning curve before a training began."""
        return self.kind.trains

    # --- training and report ---------------------------------------------------------------------------------------

    def _train(self, technique: Technique, name: str, stale) -> Steps:
        self._say("")
        self._find_baseline()
        self._commit(technique)
        self._training = steps = []
        self._progress("training", "training …", stale)

        def watch(step):
            if steps and step.step <= steps[-1].step:  # another training began
                steps.clear()
            steps.append(step)
            self._tick("training", f"training … step {step.step:,}/{step.steps:,}, {words.clock(steps)}", stale)
            give_way()
            return not stale()

        yield
        try:
            model = self._compress(technique, watch)
        finally:
            self._training = None
        point = self._weigh(self._title(technique), technique, model)
        point.steps, point.trained_here = steps, True
        if steps and steps[-1].step < steps[-1].steps:
            point.note = f"stopped after {steps[-1].step:,} of {steps[-1].steps:,} steps"
        self._points[technique] = point
        self._used(technique)
        yield
        self.point = point
        self._draw()
        yield from self._measure(point, name, stale)

    def _report(self, technique: Technique, name: str, stale) -> Steps:
        self._say("")
        self._find_baseline()
        point = self._known(technique)
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
        """Draw progress, at most ten times a second, the figure less often; nothing of a job that became old."""
        now = time.monotonic()
        if now - self._drawn > FRAME and not stale():
            self._progress(state, text, stale)
            self._draw(figure=now - self._figure_drawn > FIGURE_FRAME)

    def _draw(self, figure: bool = True) -> None:
        """Bring tiles, sentences, table and, unless told otherwise, the figure up to date."""
        with self._drawing:
            hint = self._hint()
            self.train_button.description = self._train_label
            self.train_button.disabled = not hint or self._training is not None
            self.train_button.layout.display = "none" if self.train_button.disabled else None
            self.tiles.html = self._tiles_html()
            if figure:
                self._draw_figure(self.place)
                self._figure_drawn = time.monotonic()
            self.words.html = self._words_html(hint)
            self.table.html = self._table_html()
            self._drawn = time.monotonic()

    def _tiles_html(self) -> str:
        return words.tiles(self.point, self.baseline, self.pinned, self.place, self._gpu)

    def _words_html(self, hint: str) -> str:
        return words.in_words(self.point, self.baseline, self.place, hint)

    def _table_html(self) -> str:
        return words.table(self.point, self.baseline, self.pinned)

    def _draw_figure(self, name: str) -> None:
        tried = [p for p in self._points.values() if p is not self.point]
        groups = {"baseline": [self.baseline], "tried": tried, "pinned": [self.pinned], "now": [self.point]}
        steps = self._training if self._training is not None else (self.point.steps if self.point else [])
        with self.drawing.widget.batch_update():
            self.drawing.show_points(groups)
            self.drawing.show_layers(self.baseline, self.point)
            self.drawing.show_latency(self.point.timings.get(name) if self.point else None)
            self.drawing.show_training(steps, self._shows_training)
