"""What the notebooks call: figures, text whose numbers come from records, predictions, tasks that check themselves.

A notebook holds no `def`, and no measured number: with `half = quote("low_rank", rank=0.5)` it says
`say(f"… {half.size} …")`, and a reader with the code hidden sees a sentence.
"""

from __future__ import annotations

import base64
import inspect
import io
import json
import os
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ipywidgets
import plotly.graph_objects as go
import torch
from IPython.display import HTML, Markdown

from workbench import plots
from workbench.data import Data
from workbench.panel.board import Panel, is_usual
from workbench.panel.controls import View, _text, word
from workbench.panel.measure import Point, difference, verdict_of
from workbench.panel.pipeline import brief, made
from workbench.panel.words import milliseconds, signed, speed, times
from workbench.paths import shipped
from workbench.profiler import Latency, Ratio, compare, environment, latencies
from workbench.profiler.comparison import read_profiles
from workbench.profiler.units import size
from workbench.records import Record, pareto, read_records
from workbench.runtimes import RUNTIMES, SPARSE_KERNEL, available_runtimes
from workbench.surgery import clone, replace_layer, weighted_layers
from workbench.technique import Technique
from workbench.techniques import TECHNIQUES
from workbench.training import evaluate

PLOTLY = "application/vnd.plotly.v1+json"
NBSP = "\u00a0"  # a number and its unit stay on one line


class Card(View):
    """A piece of page beside the panel, in the look of the lessons."""

    _css = _text("lesson.css")


# --- figures -------------------------------------------------------------------------------------------------------


def shown(figure: go.Figure) -> tuple[dict, ...]:
    """Return a figure as the outputs of an `Output` widget, with its sentence for those who cannot see it.

    Jupyter's own plotly renderer draws it, from one script that the server has and the browser keeps; a
    `FigureWidget` would send 5 MB of script for each figure. In an `Output` it can be drawn again from any thread.
    """
    words = plots.summary(figure)
    spoken = f'<p class="wb-plot-words">{escape(words)}</p>'
    plot = {PLOTLY: {**json.loads(figure.to_json()), "config": plots.CONFIG}, "text/plain": words}
    parts = (plot, {"text/html": spoken, "text/plain": ""})
    return tuple({"output_type": "display_data", "data": part, "metadata": {}} for part in parts)


class Plot(ipywidgets.Output):
    """A place on the page that shows a figure, and another one later; `draw` may be called from any thread."""

    def __init__(self, figure: go.Figure | None = None):
        super().__init__()
        self.add_class("wb-plot")
        if figure is not None:
            self.draw(figure)

    def draw(self, figure: go.Figure) -> None:
        """Show `figure`. Its height stands on the page too: a window that changes its width would else lose it."""
        self.layout.height = f"{figure.layout.height or 360}px"
        self.outputs = shown(figure)


def show(figure: go.Figure) -> Plot:
    """Return a figure to end a cell with."""
    return Plot(figure)


def follow(panel: Panel, draw: Callable[[Point], go.Figure]) -> Plot:
    """Return a figure that is drawn by `draw(point)`, again whenever the panel shows another setting."""
    plot = Plot()
    _on_point(panel, lambda point: plot.draw(draw(point)))
    return plot


def tradeoff(
    panel: Panel, series: Mapping[str, Sequence[Record]], title: str = "", apart: Collection[str] = ()
) -> Plot:
    """Return the trade-off of recorded sweeps, their Pareto front, and the panel's own points as they are measured.

    `series` maps a name for the legend to its records; the points of those in `apart` are no curve.
    """
    recorded = [_labelled(record, name, records) for name, records in series.items() for record in records]
    title, front, mine = title or "Accuracy over the size of the file", pareto(recorded), {}
    draw = lambda yours: _with_legend_below(plots.tradeoff(recorded, yours, front, title, apart))
    plot = Plot(draw([]))

    def add(point: Point) -> None:
        known = {"size_bytes": point.size_bytes, "accuracy": point.accuracy}
        mine[point.title] = SimpleNamespace(technique=point.title, settings={}, **known)
        plot.draw(draw(list(mine.values())))

    _on_point(panel, add, exact=True)
    return plot


def _with_legend_below(figure: go.Figure) -> go.Figure:
    """Give the trade-off room for a legend of many names, in two rows on a narrow page."""
    below = {"orientation": "h", "yref": "container", "y": 0.01, "yanchor": "bottom", "x": 0}
    return figure.update_layout(legend=below, height=440, margin_b=110).update_xaxes(automargin=False)


def _labelled(record: Record, name: str, records: Sequence[Record]) -> Record:
    """Return the record under the name of its series, with the settings that differ within it."""
    differ = {k: v for k, v in record.settings.items() if len({str(r.settings.get(k)) for r in records}) > 1}
    if "stages" in differ:
        differ["stages"] = " → ".join(map(brief, made(record).stages))
    return replace(record, technique=name, settings=differ)


def _on_point(panel: Panel, call: Callable[[Point], Any], exact: bool = False) -> None:
    """Call `call(point)` for each point that the panel comes to show; with `exact`, once its accuracy is exact."""
    last: list[Point | None] = [None]

    def look(_change=None):
        point = panel.point
        if point is not None and point is not last[0] and (point.exact or not exact):
            last[0] = point
            call(point)

    panel.status.observe(look, "html")
    look()


def gallery(data: Data, count: int = 24, wrong_by: torch.nn.Module | None = None) -> HTML:
    """Return the first validation images with their classes, or those that a model gets `wrong_by` its answers."""
    split = data.val
    index = torch.arange(len(split))
    answers = split.labels
    if wrong_by is not None:
        with torch.no_grad():
            answers = torch.cat([wrong_by(images).argmax(1) for images, _ in split.batches(256)])
        index = index[answers != split.labels]
    figures = [_thumbnail(split, data.classes, int(i), int(answers[i])) for i in index[:count]]
    return HTML(f'<div class="wb-gallery">{"".join(figures)}</div>')


def _thumbnail(split, classes: Sequence[str], i: int, answer: int) -> str:
    from PIL import Image

    picture, file = split.images[i].permute(1, 2, 0).numpy().squeeze(), io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    truth, said = escape(classes[split.labels[i]]), escape(classes[answer])
    words = truth if truth == said else f"{truth}, not {said}"
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    style = "display:inline-block;margin:0 6px 6px 0;width:56px;text-align:center;font-size:13px"
    return f'<figure style="{style}"><img src="{source}" alt="{words}" width="56" height="56"><br>{words}</figure>'


# --- text ----------------------------------------------------------------------------------------------------------


def source(*functions: Callable) -> Markdown:
    """Return the source of the package's own functions, so that what the page shows cannot drift from what runs."""
    code = "\n\n".join(textwrap.dedent(inspect.getsource(function)).rstrip() for function in functions)
    return Markdown(f"```python\n{code}\n```")


def records(name: str, **settings) -> list[Record]:
    """Return the shipped records of a sweep that have these settings."""
    return [r for r in read_records(name) if settings.items() <= _plain(r.settings).items()]


def usual(name: str) -> list[Record]:
    """Return a sweep's records with all settings but numbers at their defaults: one curve."""
    return [one for one in read_records(name) if is_usual(_technique(one), one.settings)]


def _plain(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if not isinstance(value, (list, dict))}


@dataclass(frozen=True)
class Quote:
    """A record as a sentence quotes it; every setting is a name too. `base` is the sweep's untouched model."""

    record: Record
    base: Record

    def __getattr__(self, name: str) -> Any:
        settings = self.__dict__["record"].settings
        if name in settings:
            return settings[name]
        raise AttributeError(f"A quoted record has no {name!r}; it has the settings {', '.join(settings)}.")

    @property
    def size(self) -> str:
        return size(self.record.size_bytes).replace(" ", NBSP)

    @property
    def times_smaller(self) -> float:
        return self.base.size_bytes / self.record.size_bytes

    @property
    def smaller(self) -> str:
        return times(self.times_smaller)

    @property
    def accuracy(self) -> str:
        return f"{self.record.accuracy.percent:.1f}{NBSP}%"

    @property
    def interval(self) -> str:
        low, high = self.record.accuracy.interval
        return f"{100 * low:.1f} to {100 * high:.1f}{NBSP}%"

    @property
    def correct(self) -> str:
        return f"{self.record.correct:,}"

    @property
    def total(self) -> str:
        return f"{self.record.total:,}"

    @property
    def lost(self) -> float:
        """Points of accuracy lost against the untouched model."""
        return self.base.accuracy.percent - self.record.accuracy.percent

    @property
    def points(self) -> str:
        """The change of accuracy in words: "1.3 points less"."""
        if abs(self.lost) < 0.05:
            return "the same accuracy"
        return f"{abs(self.lost):.1f} points {'less' if self.lost > 0 else 'more'}"

    @property
    def parameters(self) -> str:
        return f"{self.record.parameters:,}"

    @property
    def macs(self) -> str:
        return plots.count_text(self.record.macs)

    @property
    def macs_left(self) -> str:
        return f"{100 * self.record.macs / self.base.macs:.0f}{NBSP}%"

    @property
    def fewer_macs(self) -> str:
        return times(self.base.macs / self.record.macs)

    @property
    def removed(self) -> str:
        """A sparsity as a percentage."""
        return f"{100 * self.record.settings['sparsity']:.0f}{NBSP}%"

    @property
    def kept(self) -> str:
        """A rank or a width as a percentage."""
        return f"{100 * self.record.settings.get('rank', self.record.settings.get('width')):.4g} %"


def quote(name: str, technique: Technique | None = None, **settings) -> Quote:
    """Return the record of a sweep with these settings, ready to be quoted; settings left out are at their defaults.

    Or that of exactly this `technique`, such as a pipeline. Raises KeyError where none has them.
    """
    found = records(name, **settings)
    if technique is not None:
        found = [one for one in found if made(one) == technique]
    if not found:
        raise KeyError(
            f"No record of {name!r} has {technique or settings}; `make records` measures those of "
            "scripts/make_records.py."
        )
    if technique is not None:
        return Quote(found[0], baseline(name))
    usual = _technique(found[0])().values()
    return Quote(max(found, key=lambda one: sum(usual[k] == v for k, v in one.settings.items())), baseline(name))


def quoted(name: str, by: str) -> dict[Any, Quote]:
    """Return a sweep's usual records, ready to be quoted, by the value of the setting that is swept."""
    base = baseline(name)
    return {one.settings[by]: Quote(one, base) for one in usual(name)}


def baseline(name: str) -> Record:
    """Return the untouched model's record, of this sweep or of the one that it goes with."""
    every = [*read_records(name), *read_records(name.removesuffix("_finetuned"))]
    return next(one for one in every if made(one).is_neutral)


def _technique(record: Record) -> type[Technique]:
    return next(one for one in TECHNIQUES if one.__name__ == record.technique)


def gpu_records(path: Path | None = None) -> Markdown:
    """Return the shipped profiles of a GPU as a table under its name and the day, or the words that there are none.

    A cell holds milliseconds of one image, and images a second in a batch. The dense network is shown, and for the 2:4
    kernels its sparse twin.
    """
    found = read_profiles(path or shipped("data", "records", "gpu.jsonl"))
    if not found:
        return say("No record of a GPU is shipped yet; `scripts/make_gpu_records.py` makes one where a GPU is.")
    places = sorted({f"{one['environment']['gpu']}, {one['saved'][:10]}" for one in found})
    shown = table({"network": one["name"], **_gpu_cells(one["runtimes"])} for one in found)
    batch = found[0]["runtimes"][0]["throughput_batch"]
    heading = f"Measured once, not on this machine: **{'; '.join(places)}**. One image, and in batches of {batch}."
    return Markdown(f"{heading}\n\n{shown.data}")


def _gpu_cells(rows: list[dict]) -> dict[str, str]:
    """Return what was measured of a network by runtime: of the sparse twin where its kernels are sparse."""
    timed = {row["runtime"]: row for row in rows}
    return {one.name: _gpu_cell(timed.get(one.name)) for one in RUNTIMES if one.device == "cuda"}


def _gpu_cell(row: dict | None) -> str:
    if row is None:
        return "—"
    skips = any(kernel[2] == SPARSE_KERNEL for kernel in row["kernels"])
    names = ("median_ms", "images_per_second")
    ms, rate = (row[name if skips else f"baseline_{name}"] for name in names)
    return f"{ms:.3f} ms, {rate:,.0f}/s"


def say(text: str) -> Markdown:
    """Return a text that a cell filled with numbers: say(f"{half.size}, {half.smaller} smaller")."""
    return Markdown(textwrap.dedent(text).strip())


def solution(text: str, title: str = "Solutions") -> Markdown:
    """Return a text folded behind its title."""
    return Markdown(f"<details><summary>{escape(title)}</summary>\n\n{say(text).data}\n\n</details>")


def table(rows: Iterable[Mapping[str, Any]]) -> Markdown:
    """Return rows, each a mapping from column to text, as a table."""
    rows = [dict(row) for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(map(str, row.values())) for row in rows)]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


# --- measured when the page opens ----------------------------------------------------------------------------------


class Race:
    """Latencies of several models on several runtimes, taken in turns; the first model is what others are against."""

    def __init__(self, taken: dict[str, dict[str, Latency]]):
        self.taken = taken  # runtime -> model -> latency

    def ms(self, runtime: str, model: str) -> float:
        return self.taken[runtime][model].median_ms

    def ratio(self, runtime: str, model: str) -> Ratio:
        """Return how many times faster than the first model a model is on this runtime."""
        first = next(iter(self.taken[runtime].values()))
        return compare(self.taken[runtime][model], first)

    def words(self, runtime: str, model: str) -> str:
        """Return the ratio inside a sentence: "1.73× faster (1.60–1.81)", or that it cannot be told."""
        ratio = self.ratio(runtime, model)
        return str(ratio) if ratio.distinguishable else "not distinguishable in time"

    def rows(self) -> Iterable[dict[str, str]]:
        """Yield one row a runtime: milliseconds, what the kernels compute in, and the ratio to the first model."""
        for runtime, models in self.taken.items():
            row = {"runtime": runtime}
            for i, (name, latency) in enumerate(models.items()):
                ratio = f"<br>{self.ratio(runtime, name)}" if i else ""
                row[name] = f"{milliseconds(latency.median_ms)} ms, {latency.precision}{ratio}"
            yield row

    def _repr_markdown_(self) -> str:
        here = environment()
        return f"{table(self.rows()).data}\n\nMedian of single calls, one image, one thread, taken in turns on {here}."


def race(models: Mapping[str, torch.nn.Module], data: Data, runtimes: Sequence[str] = (), calls: int = 60) -> Race:
    """Time the models on this machine's CPU runtimes, or on those named, one image at a time."""
    chosen = [one for one in available_runtimes() if one.name in runtimes or (not runtimes and one.device == "cpu")]
    ready = {one.name: {n: one.prepare(model, data.example()) for n, model in models.items()} for one in chosen}
    taken = latencies([one for group in ready.values() for one in group.values()], calls, budget_s=4)
    found = iter(taken)
    return Race({runtime: {name: next(found) for name in group} for runtime, group in ready.items()})


@dataclass(frozen=True)
class Alone:
    """What it does to compress one layer and leave the others as they are; accuracy in percent, change in points."""

    layer: str
    weights: int
    accuracy: float
    change: float

    def __str__(self) -> str:
        return f"{self.accuracy:.1f}{NBSP}% ({signed(self.change) if abs(self.change) >= 0.05 else 'as before'})"


def sensitivity(technique: Technique, model: torch.nn.Module, data: Data, images: int = 470) -> list[Alone]:
    """Compress one layer at a time and count accuracy on `images` validation images.

    For techniques that replace a layer where it stands; what was measured anew for the whole network stays as it was.
    """
    split, small, found = data.val.take(images), technique.compress(model, data), []
    before = evaluate(model, split).percent
    for name, layer in weighted_layers(model):
        mixed = clone(model)
        replace_layer(mixed, name, clone(small.get_submodule(name)))
        after = evaluate(mixed, split).percent
        found.append(Alone(name, layer.weight.numel(), after, after - before))
    return found


# --- predict, then measure -----------------------------------------------------------------------------------------


class Prediction(ipywidgets.VBox):
    """A question, its possible answers, and a button that makes the choice final."""

    def __init__(self, question: str, options: Mapping[str, float]):
        self.options, self.answer, self._listeners = dict(options), None, []
        self.question = Card(kind="", html=f'<p><b class="wb-badge">Predict</b>{escape(question)}</p>')
        self.choice = ipywidgets.RadioButtons(options=list(options), value=None, layout={"width": "auto"})
        self.button = ipywidgets.Button(description="Commit to it", disabled=True, layout={"width": "max-content"})
        self.note = Card(kind="", role="status")
        self.choice.observe(self._chosen, "value")
        self.button.on_click(lambda _: self.commit())
        super().__init__([self.question, self.choice, self.button, self.note])
        self.add_class("wb-lesson")

    def _chosen(self, _change=None) -> None:
        self.button.disabled = self.choice.value is None or self.answer is not None

    def commit(self) -> None:
        """Keep the chosen answer and tell those who compare it."""
        if self.choice.value is None or self.answer is not None:
            return
        self.answer = self.choice.value
        self.choice.disabled = self.button.disabled = True
        self.note.html = "<p>Noted. You will meet it again below, beside the measurement.</p>"
        for listener in self._listeners:
            listener()

    def when_committed(self, listener: Callable[[], Any]) -> None:
        """Call `listener()` once there is an answer."""
        self._listeners.append(listener)

    def nearest(self, value: float) -> str:
        """Return the option that is nearest to a measured value."""
        return min(self.options, key=lambda option: abs(self.options[option] - value))


_predictions: dict[str, Prediction] = {}


def predict(question: str, options: Mapping[str, float], key: str) -> Prediction:
    """Ask for an answer before the measurement; `options` maps an answer in words to its value."""
    _predictions[key] = Prediction(question, options)
    return _predictions[key]


def check_prediction(key: str, value: float, text: str) -> Card:
    """Return a box that sets the prediction beside the measured `value` and a sentence, once there is a prediction."""
    asked = _predictions[key]
    right = asked.nearest(value)
    card, badge = Card(kind="wb-lesson", live=True), '<b class="wb-badge">Your prediction</b>'

    def draw():
        if asked.answer is None:
            card.html = f"<p>{badge}None yet. Commit to one above, and it is compared here with the measurement.</p>"
            return
        verdict = "as measured" if asked.answer == right else f"measured: {escape(right)}"
        done = ' class="wb-done"' if asked.answer == right else ""
        you = f"<p{done}>{badge}<b>{escape(asked.answer)}</b> – {verdict}.</p>"
        card.html = f"{you}<p>{escape(text)}</p>"

    asked.when_committed(draw)
    draw()
    return card


# --- tasks ---------------------------------------------------------------------------------------------------------

Condition = Callable[[Point, Point], "tuple[bool | None, str]"]  # (point, baseline) -> met, what is so


class Task(Card):
    """A task for the panel's sliders, which says of each setting that is tried what is met and what is not yet.

    The setting that the panel opens with does not count before another one was tried.
    """

    def __init__(self, panel: Panel, text: str, conditions: Sequence[Condition]):
        super().__init__(kind="wb-lesson", live=True)
        self.text, self.conditions, self.panel = text, conditions, panel
        self.solved_by: Point | None = None
        self._opening: Point | None = None
        self._moved = False
        panel.status.observe(self._look, "html")
        self._look()

    def _look(self, _change=None) -> None:
        if self.solved_by is not None:
            return
        point, baseline = self.panel.point, self.panel.baseline
        if point is not None:
            self._opening = self._opening or point
            self._moved = self._moved or point is not self._opening
        found = [one(point, baseline) for one in self.conditions] if point is not None else []
        if found and all(met for met, _ in found) and self._moved:
            self.solved_by = point
        self.html = self._written(found)

    def _written(self, found: list[tuple[bool | None, str]]) -> str:
        mark = {True: '<span class="wb-met">✓</span>', False: "✗", None: "…"}
        lines = "".join(f"<li>{mark[met]} {escape(words)}</li>" for met, words in found)
        if self.solved_by is None:
            head = f'<p><b class="wb-badge">Task</b>{escape(self.text)}</p>'
            return f"{head}<ul>{lines}</ul>" if lines else head
        head = f'<p><b class="wb-badge">Done</b>{escape(self.text)}</p>'
        solved = f"<p>Solved by <b>{escape(self.solved_by.title)}</b>:</p><ul>{lines}</ul>"
        return f'<div class="wb-done">{head}{solved}</div>'


def task(
    panel: Panel,
    text: str,
    *,
    smaller: float | None = None,
    within: float | None = None,
    loses: float | None = None,
    faster: float | None = None,
    no_faster: bool = False,
    undoes: bool | None = None,
    verdict: str = "",
    **settings,
) -> Task:
    """Ask for a setting of the panel, and check every one that is tried.

    `smaller`: the file at least so many times smaller. `within`: at most so many points of accuracy lost; `loses`: at
    least so many. `faster`: at least so many times, on the shown runtime; `no_faster`: not distinguishably faster
    there. `undoes`: a stage undoes another (True), or none does (False); for panels of pipelines. `verdict`: the
    kind of the verdict on the whole. `settings`: settings that it must have.
    """
    conditions: list[Condition] = [_set(panel, name, value) for name, value in settings.items()]
    conditions += [_smaller(smaller)] if smaller else []
    conditions += [_within(within)] if within is not None else []
    conditions += [_loses(loses)] if loses is not None else []
    conditions += [_faster(panel, faster)] if faster else []
    conditions += [_no_faster(panel)] if no_faster else []
    conditions += [_undoes(panel, undoes)] if undoes is not None else []
    conditions += [_judged(panel, verdict)] if verdict else []
    return Task(panel, text, conditions)


def _set(panel: Panel, name: str, value) -> Condition:
    knob = panel.knobs[name]

    def look(point, _baseline):
        shown = point.technique.values().get(name)  # another technique of the same panel may lack it
        return shown == value, f"{knob.label} {word(shown)}, wanted {word(value)}"

    return look


def _smaller(wanted: float) -> Condition:
    def look(point, baseline):
        reached = baseline.size_bytes / point.size_bytes
        return reached >= wanted, f"file {times(reached)} smaller, wanted {wanted:g}×"

    return look


def _within(allowed: float) -> Condition:
    return lambda point, baseline: _loss(point, baseline, lambda lost: lost <= allowed, f"at most {allowed:g} lower")


def _loses(wanted: float) -> Condition:
    return lambda point, baseline: _loss(point, baseline, lambda lost: lost >= wanted, f"at least {wanted:g} lower")


def _loss(point: Point, baseline: Point, fits: Callable[[float], bool], wanted: str) -> tuple[bool | None, str]:
    """Compare exact accuracies on the same images, in points of percent."""
    if not (point.exact and baseline.exact):
        return None, "accuracy is being counted"
    lost = -difference(point.hits, baseline.hits).points
    return fits(lost), f"accuracy {abs(lost):.2f} points {'lower' if lost > 0 else 'higher'}, wanted {wanted}"


def _ratio(panel: Panel, point: Point):
    timing = point.timings.get(panel.place)
    return speed(timing) if timing and timing.done else None


def _faster(panel: Panel, wanted: float) -> Condition:
    def look(point, _baseline):
        ratio, where = _ratio(panel, point), panel.place
        if ratio is None:
            return None, f"latency on {where} is being measured"
        told = f"{times(ratio.value)} the speed" if ratio.distinguishable else "not distinguishable in time"
        return ratio.distinguishable and ratio.value >= wanted, f"{told} on {where}, wanted {wanted:g}×"

    return look


def _no_faster(panel: Panel) -> Condition:
    def look(point, _baseline):
        ratio, where = _ratio(panel, point), panel.place
        if ratio is None:
            return None, f"latency on {where} is being measured"
        gained = ratio.distinguishable and ratio.value > 1
        return not gained, f"{'faster' if gained else 'not faster'} on {where}"

    return look


def _undoes(panel: Panel, wanted: bool) -> Condition:
    def look(point, _baseline):
        told = panel.undone(point)
        return bool(told) == wanted, told[0].rstrip(".") if told else "no stage undoes another"

    return look


def _judged(panel: Panel, wanted: str) -> Condition:
    def look(point, baseline):
        found = verdict_of(point, baseline, panel.place)
        if found is None:
            return None, f"latency on {panel.place} is being measured"
        return found.kind == wanted, f"verdict {found.kind}, wanted {wanted}"

    return look


# --- for the notebook's own checks ---------------------------------------------------------------------------------


def measured(panel: Panel, seconds: float = 50) -> bool:
    """Wait until the panel has measured what it shows, and return whether it could.

    On a dashboard a reader waits for the page, and its panel measures once it is drawn: there it answers at once.
    """
    if "voila" in os.environ.get("SERVER_SOFTWARE", "").lower():
        return True
    return panel.wait_idle(seconds) and panel.state == "done" and panel.point is not None and panel.point.exact
