"""The one figure of a panel: built once, then only its marks move."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path

import ipywidgets
import plotly.graph_objects as go
import traitlets

from workbench import plots
from workbench.panel.measure import OTHER, Point, Timing


class Library(ipywidgets.Widget):
    """Plotly's code for a page, 5 MB, which all figures share."""

    code = traitlets.Unicode().tag(sync=True)


@cache
def _library() -> Library:
    return Library(code=str(go.FigureWidget._esm))


class Figure(go.FigureWidget):
    """A figure that tells a page which opens later what it shows now; plotly's own tells what it showed at first.

    It stands on the page before plotly is there, which a busy machine reads for seconds: see `figure.js`.

    It also takes nothing back from a page. A late page reports how it drew the message before, and would undo what was
    set since; and while traitlets takes a report in, what another thread draws on the same widget is never sent.
    """

    _esm = Path(__file__).with_name("figure.js").read_text(encoding="utf-8")
    library = traitlets.Instance(Library).tag(sync=True, **ipywidgets.widget_serialization)

    axes: tuple[str, ...] = ("xaxis", "yaxis", "xaxis4", "xaxis5", "yaxis5")  # whose ranges move
    marks: tuple[str, ...] = ("x", "y", "text", "visible", "error_y.array", "error_y.arrayminus")

    @traitlets.default("library")
    def _share_library(self) -> Library:
        return _library()

    def get_state(self, key=None, drop_defaults=False):
        if key is None and "_layout_obj" in self.__dict__:
            self._trait_values["_widget_data"] = copy.deepcopy(self._data)
            self._trait_values["_widget_layout"] = copy.deepcopy(self._layout_obj._props)
        return super().get_state(key, drop_defaults)

    def set_state(self, sync_data):
        """Leave what a page reports; sliders and buttons are widgets of their own."""

    def send_again(self) -> None:
        """Send every mark and range once more: what was drawn while a page opened, before it listened, is lost."""
        drawn = {name: [_plain(trace, name) for trace in self.data] for name in self.marks}
        ranges = {f"{axis}.range": list(self.layout[axis].range) for axis in self.axes if self._has_range(axis)}
        self._send_update_msg(drawn, {**ranges, **self._more()}, list(range(len(self.data))))

    def _more(self) -> dict:
        """Return what else of the layout is to be sent again."""
        return {}

    def _has_range(self, axis: str) -> bool:
        return axis in self._layout_obj._props and self.layout[axis].range is not None


def _plain(trace, name: str):
    """Return a property of a trace, an array as a list; None where this kind of trace has no such property."""
    try:
        value = trace[name]
    except (KeyError, ValueError):
        return None
    return value if value is None or isinstance(value, (bool, str)) else list(value)


class Drawing:
    """What a panel draws: trade-off, latency, bars per layer and, where it `trains`, a learning curve.

    `widget` is the figure on the page. Change it inside `widget.batch_update()`, so that one message goes out.
    """

    def __init__(self, layers: list[str], recorded: list, fp32_bytes: int, trains: bool):
        self._layers, self._trains, self._has_room = layers, trains, trains
        drawn = plots.panel_figure([*layers, OTHER], recorded, fp32_bytes, trains)
        self._hidden, self._shown = plots.without_training([*layers, OTHER]) if trains else ({}, {})
        self.widget = Figure(drawn)  # it gives its traces new uids
        self.widget._config = {**self.widget._config, **plots.CONFIG}
        self._traces = {trace.uid: mine for trace, mine in zip(drawn.data, self.widget.data, strict=True)}
        self.widget.add_class("wb-figure")

    def show_recorded(self, records: list) -> None:
        """Draw another recorded curve."""
        curve = sorted(((r.technique, r.size_bytes, r.accuracy) for r in records), key=lambda item: item[1])
        self._place("recorded", curve)
        self._widen([(size, accuracy.percent) for _, size, accuracy in curve])

    def show_points(self, groups: dict[str, list[Point | None]]) -> None:
        """Draw the points of the trade-off by their role: "baseline", "tried", "pinned", "now"."""
        seen = []
        for role, items in groups.items():
            shown = [p for p in items if p is not None and p.hits is not None]
            self._place(role, [(p.title, p.size_bytes, p.accuracy) for p in shown])
            seen += [(p.size_bytes, p.accuracy.percent) for p in shown]
        self._widen(seen)

    def _place(self, role: str, items: list[tuple]) -> None:
        filled = plots.points(items, role)
        errors = filled.pop("error_y")
        self._traces[f"tradeoff-{role}"].update(**filled)
        self._traces[f"tradeoff-{role}"].error_y.update(errors)

    def _widen(self, seen: list[tuple[int, float]]) -> None:
        """Make room for points outside of the trade-off's axes; never take room away, so that nothing jumps."""
        if not seen:
            return
        axes = self.widget.layout
        low = axes.yaxis.range[0]
        wanted = plots.accuracy_range([percent for _, percent in seen], low + 0.5)
        if wanted[0] < low:
            axes.yaxis.range = wanted
        left, right = axes.xaxis.range
        fits = plots.bytes_range(min(size for size, _ in seen), max(size for size, _ in seen))
        if fits[0] < left or fits[1] > right:
            axes.xaxis.range = [min(left, fits[0]), max(right, fits[1])]

    def show_layers(self, baseline: Point | None, now: Point | None) -> None:
        """Draw bytes and multiply-adds of each layer."""
        for role, point in (("baseline", baseline), ("now", now)):
            for kind, text in (("bytes", plots.size_text), ("macs", plots.count_text)):
                empty = dict.fromkeys([*self._layers, OTHER], 0)
                numbers = list((getattr(point, f"layer_{kind}") if point else empty).values())
                self._traces[f"{kind}-{role}"].update(x=numbers, text=[text(v) for v in numbers])

    def show_latency(self, timing: Timing | None) -> None:
        """Draw the last single calls."""
        pairs = {"baseline": timing and timing.baseline, "now": timing and timing.now}
        samples = {role: list(latency.samples_ms[-200:]) if latency else [] for role, latency in pairs.items()}
        for role, ms in samples.items():
            self._traces[f"latency-{role}"].update(x=ms, y=[role] * len(ms), visible=bool(ms))
        if any(samples.values()):
            self.widget.layout.xaxis4.range = plots.latency_range(*samples.values())

    def show_training(self, steps: list, always: bool) -> None:
        """Draw loss and accuracy of a training; without steps the plot is there only if it is `always`."""
        if not self._trains:
            return
        for trace in plots.learning_traces(steps):
            kind = "loss" if trace.name == "loss" else "accuracy"
            self._traces[f"training-{kind}"].update(x=trace.x, y=trace.y)
        self._make_room(bool(steps) or always)
        if steps:
            self.widget.layout.xaxis5.range = [0, steps[-1].steps]
            self.widget.layout.yaxis5.range = [0, 1.1 * max(step.loss for step in steps)]

    def _make_room(self, wanted: bool) -> None:
        if wanted != self._has_room:
            self.widget.update_layout(self._shown if wanted else self._hidden)
            self._has_room = wanted


class _ProfilerFigure(Figure):
    axes = ("xaxis", "yaxis", "xaxis3")
    marks = ("x", "y", "text", "visible", "name", "showlegend", "hovertemplate", "line.dash", "line.color")

    def _more(self) -> dict:
        return {"annotations": [note.to_plotly_json() for note in self.layout.annotations]}


class ProfilerDrawing:
    """What the profiler's panel draws; `layers` are the rows of its bars."""

    def __init__(self, layers: list[str]):
        self._layers = layers
        self.widget = _ProfilerFigure(plots.profiler_figure(layers))
        self.widget._config = {**self.widget._config, **plots.CONFIG}
        self.widget.add_class("wb-figure")

    def show_recorded(self, records: list) -> None:
        """A profiler draws no recorded curve."""

    def show(self, baseline: plots.Shown, now: plots.Shown, roofline) -> None:
        """Move every mark to where the measurements are now, in one message."""
        figure = plots.profiler_figure(self._layers, baseline, now, roofline)
        with self.widget.batch_update():
            for mine, new in zip(self.widget.data, figure.data, strict=True):
                drawn = new.to_plotly_json()
                mine.update({name: value for name, value in drawn.items() if name != "type"}, overwrite=True)
            for axis in self.widget.axes:
                self.widget.layout[axis].range = figure.layout[axis].range
            self.widget.layout.annotations = figure.layout.annotations
