"""Figures of compression: trade-offs, layers, weights, trainings, and the panel's figure."""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# plotly.io imports nbformat, and that jsonschema, which then builds grammars for addresses in other alphabets: more
# than a second for a check that nobody asks for. jsonschema goes without where the package is missing.
_hidden = "rfc3987_syntax" not in sys.modules
if _hidden:
    sys.modules["rfc3987_syntax"] = None
import plotly.graph_objects as go  # noqa: E402
import plotly.io  # noqa: E402, F401
from plotly.subplots import make_subplots  # noqa: E402

if _hidden:
    del sys.modules["rfc3987_syntax"]

BLUE, SKY, ORANGE, GREEN, VERMILLION, PURPLE = "#0072B2", "#56B4E9", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
GREY, GRID, INK = "#8a8a8a", "rgba(128,128,128,0.18)", "#3b3b3b"
ROLE = {  # one meaning, one color, one symbol, in every figure
    "baseline": {"color": GREY, "symbol": "square"},
    "now": {"color": BLUE, "symbol": "diamond"},
    "tried": {"color": SKY, "symbol": "circle"},
    "pinned": {"color": ORANGE, "symbol": "star"},
    "recorded": {"color": GREY, "symbol": "circle-open"},
}
SERIES = ((BLUE, "circle"), (ORANGE, "square"), (GREEN, "diamond"), (VERMILLION, "triangle-up"), (PURPLE, "x"))
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"
CONFIG = {
    "responsive": True,
    "displaylogo": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
}


# --- words ---------------------------------------------------------------------------------------------------------


def summary(figure: go.Figure) -> str:
    """Return the figure in one sentence of words."""
    return (figure.layout.meta or {}).get("summary", "")


def size_text(size_bytes: float) -> str:
    """Return bytes in the unit that a reader wants: 412345 -> "412 kB"."""
    for limit, unit in ((1e6, "MB"), (1e3, "kB")):
        if size_bytes >= limit:
            return (
                f"{size_bytes / limit:.3g} {unit}" if size_bytes < 100 * limit else f"{size_bytes / limit:,.0f} {unit}"
            )
    return f"{size_bytes:.0f} B"


def count_text(count: float) -> str:
    """Return a count with its scale in words: 13300000 -> "13.3 M"."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return f"{count:.0f}"


# --- theme ---------------------------------------------------------------------------------------------------------


def _array(values: Any) -> np.ndarray:
    """Return numbers as a numpy array, from a tensor, an array or a list."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def _calm(figure: go.Figure, words: str, height: int = 340, **layout) -> go.Figure:
    """Give the figure the common look and its sentence."""
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": GRID,
        "ticks": "",
        "automargin": True,
        "title_standoff": 6,
    }
    figure.update_xaxes(**axis).update_yaxes(**axis)
    figure.update_annotations(font_size=13)
    base = {
        "template": "none",
        "height": height,
        "autosize": True,
        "font": {"family": FONT, "size": 12, "color": INK},
        "margin": {"l": 56, "r": 16, "t": 40, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hoverlabel": {"font_family": FONT, "bgcolor": "#ffffff", "font_color": "#1b1b1b", "bordercolor": GREY},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "xanchor": "right", "x": 1},
        "meta": {"summary": words},
        "bargap": 0.3,
    }
    return figure.update_layout({**base, **layout})


def _title(text: str) -> dict:
    """Return a figure title at the left, in the size of a heading beside text."""
    return {"title": {"text": text, "x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 14}}}


def bytes_range(low: float, high: float) -> list[float]:
    """Return the range of a logarithmic axis that holds `low` to `high` with a little room."""
    return [math.log10(max(low, 1)) - 0.06, math.log10(max(high, 1)) + 0.08]


def _bytes_axis(low: float, high: float) -> dict:
    """Return a logarithmic axis for bytes whose ticks read "50 kB", from about `low` to about `high`."""
    steps = (1, 3) if high > 8 * low else (1, 2, 5)
    ticks = [m * 10**e for e in range(1, 12) for m in steps]
    return {
        "type": "log",
        "range": bytes_range(low, high),
        "tickvals": ticks,
        "ticktext": [size_text(t) for t in ticks],
        "tickangle": 0,
    }


# --- trade-off -----------------------------------------------------------------------------------------------------


def _percent(accuracy: Any) -> tuple[float, float, float]:
    """Return (percent, low, high) of an `Accuracy`, a (correct, total) pair, or a plain fraction."""
    if accuracy is None:
        return (math.nan,) * 3
    if hasattr(accuracy, "interval"):
        return (100 * accuracy.value, 100 * accuracy.interval[0], 100 * accuracy.interval[1])
    value = accuracy[0] / accuracy[1] if isinstance(accuracy, Sequence) else float(accuracy)
    return (100 * value,) * 3


def points(items: Iterable[tuple[str, float, Any]], role: str, size: int = 9) -> dict:
    """Return x, y, error bars and hover texts of trade-off points from (words, size in bytes, accuracy)."""
    rows = [(text, size_bytes, *_percent(accuracy)) for text, size_bytes, accuracy in items]
    return {
        "x": [r[1] for r in rows],
        "y": [r[2] for r in rows],
        "error_y": {"array": [r[4] - r[2] for r in rows], "arrayminus": [r[2] - r[3] for r in rows]},
        "text": [f"{r[0]}<br>{size_text(r[1])}, {r[2]:.1f} %" for r in rows],
    }


def _points_trace(
    items: Iterable, role: str, *, name: str | None = None, size: int = 9, line: bool = False
) -> go.Scatter:
    look = ROLE[role]
    filled = points(items, role)
    errors = {"visible": not line, "thickness": 1.2, "width": 0, "color": look["color"], **filled.pop("error_y")}
    return go.Scatter(
        **filled,
        error_y=errors,
        name=name or role,
        mode="lines+markers" if line else "markers",
        marker={"size": size, "symbol": look["symbol"], "color": look["color"], "line": {"width": 1, "color": "white"}},
        line={"color": look["color"], "width": 1.2, "dash": "dot"},
        hovertemplate="%{text}<extra>" + (name or role) + "</extra>",
    )


def _of_record(record: Any) -> tuple[str, float, Any]:
    settings = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in (record.settings or {}).items())
    return f"{record.technique} {settings}".strip(), record.size_bytes, record.accuracy


def tradeoff(
    records: Sequence,
    yours: Sequence = (),
    front: Sequence = (),
    title: str = "Accuracy over file size",
    apart: Collection[str] = (),
) -> go.Figure:
    """Draw accuracy over bytes: one dotted curve a technique, the Pareto `front`, and `yours` as diamonds.

    Each record has `technique`, `settings`, `size_bytes` and `accuracy`. Techniques in `apart` are points without a
    curve, where no setting leads from one to the next.
    """
    figure = go.Figure()
    names = list(dict.fromkeys(r.technique for r in records))
    for i, name in enumerate(names):
        mine = sorted((r for r in records if r.technique == name), key=lambda r: r.size_bytes)
        trace = _points_trace(map(_of_record, mine), "recorded", name=name, line=True, size=8)
        color, symbol = SERIES[i % len(SERIES)]
        if name in apart:
            trace.mode = "markers"
        figure.add_trace(trace.update(marker_color=color, marker_symbol=symbol, line_color=color))
    if front:
        steps = sorted(map(_of_record, front), key=lambda r: r[1])
        trace = _points_trace(steps, "baseline", name="Pareto front", line=True, size=1)
        figure.add_trace(trace.update(mode="lines", line={"dash": "solid", "width": 2, "shape": "hv"}))
    if yours:
        figure.add_trace(_points_trace(map(_of_record, yours), "now", name="yours", size=12))
    sizes = [r.size_bytes for r in [*records, *yours]] or [1e3, 1e6]
    figure.update_xaxes(title="size of the file", **_bytes_axis(min(sizes), max(sizes)))
    figure.update_yaxes(title="accuracy, %")
    words = (
        f"{len(records)} recorded points of {', '.join(names) or 'no technique'}: accuracy over the size of the file."
    )
    return _calm(figure, words, 400, **_title(title), legend={"orientation": "h", "y": -0.2, "x": 0})


# --- layers --------------------------------------------------------------------------------------------------------


def _bars(names: Sequence[str], values: Sequence[float], role: str, text=size_text) -> go.Bar:
    """Return horizontal bars; the baseline is wide and pale, the compressed one narrow and strong, one on the other."""
    wide = role == "baseline"
    return go.Bar(
        x=list(values),
        y=list(names),
        orientation="h",
        name=role,
        width=0.78 if wide else 0.4,
        marker={"color": "rgba(138,138,138,0.38)" if wide else ROLE[role]["color"], "line": {"width": 0}},
        text=[text(v) for v in values],
        textposition="none",
        hovertemplate="%{y}: %{text}<extra>" + role + "</extra>",
        showlegend=False,
    )


def layer_bars(layers: Mapping[str, tuple[float, float]], unit: str = "bytes", title: str = "") -> go.Figure:
    """Draw before and after per layer as bars in one another; `layers` maps a name to (before, after)."""
    text = size_text if unit == "bytes" else lambda v: f"{count_text(v)} {unit}"
    names = list(layers)
    before, after = [v[0] for v in layers.values()], [v[1] for v in layers.values()]
    figure = go.Figure([_bars(names, before, "baseline", text), _bars(names, after, "now", text)])
    figure.update_traces(showlegend=True).update_yaxes(autorange="reversed").update_xaxes(title=unit)
    left = sum(after) / max(sum(before), 1)
    words = f"{unit} of {len(names)} layers before and after: {left:.0%} are left in all."
    return _calm(figure, words, 120 + 24 * len(names), barmode="overlay", **_title(title or f"{unit} per layer"))


# --- latency -------------------------------------------------------------------------------------------------------


def _box(samples: Sequence[float], name: str, role: str) -> go.Box:
    color = ROLE[role]["color"]
    return go.Box(
        x=list(samples),
        y=[name] * len(samples),
        name=role,
        orientation="h",
        boxpoints="all",
        jitter=0.7,
        pointpos=0,
        marker={"size": 3.5, "opacity": 0.35, "color": color, "symbol": ROLE[role]["symbol"]},
        line={"width": 1.6, "color": color},
        fillcolor="rgba(0,0,0,0)",
        width=0.55,
        showlegend=False,
        hovertemplate="%{x:.3f} ms<extra>" + role + "</extra>",
    )


def latency_range(*samples: Sequence[float]) -> list[float]:
    """Return an axis range from 0 that holds nine calls in ten of each; the slowest few lie beyond its end."""
    tops = [float(np.quantile(s, 0.9)) for s in samples if len(s)]
    return [0, 1.25 * max(tops, default=1.0)]


def latency_distribution(
    samples: Mapping[str, Sequence[float]],
    title: str = "Latency of single calls",
    roles: Sequence[str] = ("baseline", "now", "tried", "pinned"),
) -> go.Figure:
    """Draw every measured call in milliseconds, with median and quartiles; `samples` maps a name to its calls.

    The names take the colors and symbols of `roles` in turn.
    """
    traces = [_box(list(ms), name, roles[i % len(roles)]) for i, (name, ms) in enumerate(samples.items())]
    figure = go.Figure(traces).update_xaxes(title="milliseconds", range=latency_range(*samples.values()))
    figure.update_yaxes(autorange="reversed")
    words = "; ".join(f"{n}: median {np.median(ms):.3g} ms of {len(ms)} calls" for n, ms in samples.items() if len(ms))
    return _calm(figure, words + ".", 120 + 60 * len(samples), **_title(title))


def latency_vs_batch(latency_ms: Mapping[str, Mapping[int, float]], title: str = "Latency and throughput") -> go.Figure:
    """Draw latency (left) and images per second (right) over the batch; name -> {batch size: ms per batch}."""
    figure = make_subplots(
        1, 2, subplot_titles=("milliseconds per batch", "images per second"), horizontal_spacing=0.12
    )
    for i, (name, by_batch) in enumerate(latency_ms.items()):
        color, symbol = SERIES[i % len(SERIES)]
        batches, ms = list(by_batch), list(by_batch.values())
        look = {"mode": "lines+markers", "name": name, "legendgroup": name, "line_color": color}
        look["marker"] = {"symbol": symbol, "size": 8, "color": color}
        rate = [1000 * b / t for b, t in by_batch.items()]
        figure.add_trace(go.Scatter(x=batches, y=ms, hovertemplate="batch %{x}: %{y:.3g} ms", **look), 1, 1)
        look["showlegend"] = False
        figure.add_trace(go.Scatter(x=batches, y=rate, hovertemplate="batch %{x}: %{y:,.0f} images/s", **look), 1, 2)
    ticks = sorted({b for by_batch in latency_ms.values() for b in by_batch})
    figure.update_xaxes(title="batch size", type="log", tickvals=ticks, ticktext=[str(t) for t in ticks])
    figure.update_yaxes(**_log_ticks(figure, "y"), col=1).update_yaxes(rangemode="tozero", col=2)
    words = "; ".join(f"{n}: {_best_rate(by)}" for n, by in latency_ms.items())
    return _calm(
        figure,
        words + ".",
        360,
        **_title(title),
        margin={"l": 56, "r": 16, "t": 70, "b": 90},
        legend={"orientation": "h", "y": -0.28, "x": 0},
    )


def _log_ticks(figure: go.Figure, axis: str) -> dict:
    """Return a logarithmic axis for what the left plot's traces show, its ticks 1, 2, 5, 10 … written out."""
    left = [trace for trace in figure.data if trace.xaxis in (None, "x")]
    shown = [value for trace in left for value in trace[axis] if value is not None and value > 0]
    low, high = min(shown, default=1.0), max(shown, default=1.0)
    steps = (1, 2, 5) if high < 100 * low else (1,)
    ticks = [step * 10.0**power for power in range(-5, 7) for step in steps]
    span = [math.log10(low) - 0.12, math.log10(high) + 0.12]
    return {"type": "log", "range": span, "tickvals": ticks, "ticktext": [f"{tick:,.6g}" for tick in ticks]}


def _best_rate(by_batch: Mapping[int, float]) -> str:
    best = max(by_batch, key=lambda b: b / by_batch[b])
    return f"up to {1000 * best / by_batch[best]:,.0f} images per second, at batch {best}"


# --- training ------------------------------------------------------------------------------------------------------


def _curves(steps: Sequence) -> dict[str, dict]:
    seen = [s for s in steps if s.accuracy is not None]
    return {
        "loss": {"x": [s.step for s in steps], "y": [s.loss for s in steps]},
        "accuracy": {"x": [s.step for s in seen], "y": [_percent(s.accuracy)[0] for s in seen]},
    }


def learning_traces(steps: Sequence) -> tuple[go.Scatter, go.Scatter]:
    """Return the loss over steps (a line) and the validation accuracy in percent (diamonds)."""
    data = _curves(steps)
    look = {"marker": {"symbol": "diamond", "size": 8, "color": BLUE}, "line": {"color": BLUE, "width": 1.5}}
    return (
        go.Scatter(**data["loss"], name="loss", mode="lines", line={"color": VERMILLION, "width": 1.3, "dash": "dot"}),
        go.Scatter(**data["accuracy"], name="accuracy, validation", mode="lines+markers", **look),
    )


def learning_curve(steps: Sequence, title: str = "Training") -> go.Figure:
    """Draw loss (left axis, dotted) and validation accuracy (right axis, diamonds) over training steps."""
    figure = make_subplots(specs=[[{"secondary_y": True}]])
    loss, accuracy = learning_traces(steps)
    figure.add_trace(loss, secondary_y=False).add_trace(accuracy, secondary_y=True)
    figure.update_xaxes(title="training step").update_yaxes(title="loss", rangemode="tozero", secondary_y=False)
    figure.update_yaxes(title="accuracy, %", showgrid=False, secondary_y=True)
    last = accuracy.y[-1] if len(accuracy.y) else math.nan
    words = f"{len(steps)} training steps; validation accuracy ends at {last:.1f} %."
    return _calm(figure, words, 320, **_title(title))


# --- the panel -----------------------------------------------------------------------------------------------------


ANCHOR = {"mode": "markers", "marker": {"opacity": 0}, "hoverinfo": "skip", "showlegend": False}
PANEL_TITLES = (
    "accuracy over file size",
    "bytes per layer",
    "multiply-adds",
    "latency of single calls",
    "training, drawn while it runs",
)


def panel_figure(
    layers: Sequence[str], recorded: Sequence = (), base_bytes: float = 1e6, trains: bool = False
) -> go.Figure:
    """Return the figure of a panel, empty: trade-off, latency, bytes and multiply-adds per
    layer, and, if it `trains`, a learning curve.

    Built once and then mutated: traces are found by their `uid` ("tradeoff-now", "bytes-baseline", "latency-now", …).
    """
    rows = 3 if trains else 2
    specs = [[{}, {"rowspan": 2}, {"rowspan": 2}], [{}, None, None], [{"colspan": 3, "secondary_y": True}, None, None]]
    figure = make_subplots(
        rows,
        3,
        specs=specs[:rows],
        row_heights=[0.62, 0.38, 0.4][:rows],
        vertical_spacing=0.17 if not trains else 0.13,
        subplot_titles=PANEL_TITLES[: rows + 2],
    )
    layers = _short(layers)
    _place_columns(figure, max(map(len, layers), default=0), trains)
    _add_tradeoff(figure, recorded, base_bytes)
    for col, kind in ((2, "bytes"), (3, "macs")):
        for role in ("baseline", "now"):
            bars = _bars(layers, [0] * len(layers), role, size_text if kind == "bytes" else count_text)
            figure.add_trace(bars.update(uid=f"{kind}-{role}"), 1, col)
    # Without any mark a category axis has no places, and plotly draws its line to nowhere: two marks nobody sees.
    figure.add_trace(go.Scatter(x=[0, 0], y=["baseline", "now"], uid="latency-anchor", **ANCHOR), 2, 1)
    for role in ("baseline", "now"):
        figure.add_trace(_box([], role, role).update(uid=f"latency-{role}", visible=False), 2, 1)
    if trains:
        for trace, second in zip(learning_traces([]), (False, True), strict=True):
            name = "loss" if not second else "accuracy"
            figure.add_trace(trace.update(uid=f"training-{name}", showlegend=False), 3, 1, secondary_y=second)
    return _panel_look(figure, layers, trains)


def _short(names: Sequence[str], longest: int = 18) -> list[str]:
    """Return the ends of long names, where they differ; the names as they are if their ends are alike."""
    short = [name if len(name) <= longest else "…" + name[1 - longest :] for name in names]
    return short if len(set(short)) == len(set(names)) else list(names)


def _place_columns(figure: go.Figure, letters: int, trains: bool) -> None:
    """Leave as much room before the layer bars as their names of so many letters need on a narrow page."""
    end, gap = 0.45, min(0.045 + 0.0085 * letters, 0.22)
    width = (1 - end - gap - 0.03) / 2
    places = {1: (0, end), 2: (end + gap, end + gap + width), 3: (1 - width, 1), 4: (0, end), 5: (0, 1)}
    for number, place in places.items():
        if number < 5 or trains:
            figure.layout[f"xaxis{number if number > 1 else ''}"].domain = place


def _add_tradeoff(figure: go.Figure, recorded: Sequence, base_bytes: float) -> None:
    curve = sorted(map(_of_record, recorded), key=lambda r: r[1])
    traces = {
        "recorded": _points_trace(curve, "recorded", name="recorded sweep", line=True, size=6),
        "baseline": _points_trace([], "baseline", size=10),
        "tried": _points_trace([], "tried", size=8),
        "pinned": _points_trace([], "pinned", size=14),
        "now": _points_trace([], "now", size=13),
    }
    for role, trace in traces.items():
        figure.add_trace(trace.update(uid=f"tradeoff-{role}"), 1, 1)
    sizes = [r[1] for r in curve] or [base_bytes / 20]
    figure.update_xaxes(_bytes_axis(min([*sizes, base_bytes / 12]), base_bytes), row=1, col=1)
    lows = [_percent(r[2])[0] for r in curve]
    figure.update_yaxes(title="accuracy, %", type="linear", range=accuracy_range(lows), row=1, col=1)


def accuracy_range(percents: Sequence[float], low: float = 80.0) -> list[float]:
    """Return an axis range to 101 % whose lower end is a multiple of ten below every value."""
    lowest = min([p for p in percents if not math.isnan(p)] + [low + 2])
    return [max(10 * math.floor((lowest - 2) / 10), 0) - 0.5, 100.5]


def _panel_look(figure: go.Figure, layers: Sequence[str], trains: bool) -> go.Figure:
    figure.update_yaxes(autorange="reversed", row=1, col=2, ticklabelstandoff=4)
    figure.update_yaxes(autorange="reversed", matches="y2", showticklabels=False, row=1, col=3)
    figure.update_xaxes(type="linear", rangemode="tozero", tickformat="~s", nticks=3, row=1, col=2)
    figure.update_xaxes(type="linear", rangemode="tozero", tickformat="~s", nticks=3, row=1, col=3)
    figure.update_xaxes(title="milliseconds", type="linear", range=[0, 1], row=2, col=1)
    figure.update_yaxes(type="category", categoryarray=["baseline", "now"], row=2, col=1)
    figure.update_yaxes(categoryorder="array", range=[1.5, -0.5], row=2, col=1)
    if trains:
        figure.update_xaxes(title="training step", type="linear", range=[0, 100], row=3, col=1)
        figure.update_yaxes(title="loss", type="linear", range=[0, 4], row=3, col=1, secondary_y=False)
        percent = {"title": "accuracy, %", "type": "linear", "range": [0, 100], "tickvals": [0, 25, 50, 75, 100]}
        figure.update_yaxes(**percent, showgrid=False, row=3, col=1, secondary_y=True)
        # A plot of no marks makes plotly draw its axes to nowhere, as above.
        figure.add_trace(go.Scatter(x=[0], y=[0], uid="training-anchor", **ANCHOR), 3, 1, secondary_y=False)
        figure.add_trace(go.Scatter(x=[0], y=[0], uid="training-anchor2", **ANCHOR), 3, 1, secondary_y=True)
    figure.update_yaxes(type="category", row=1, col=2).update_yaxes(type="category", row=1, col=3)
    for title in figure.layout.annotations:  # at the left edge of its plot, where reading begins
        title.update(x=_left(figure, title.text), xanchor="left")
    height = max(440, 130 + 20 * len(layers)) + (190 if trains else 0)
    words = "Accuracy over bytes, bytes and multiply-adds per layer, and the latency of single calls."
    _calm(figure, words, height, barmode="overlay", margin={"l": 58, "r": 12, "t": 46, "b": 44})
    return figure.update_layout(
        legend={
            "orientation": "h",
            "yanchor": "bottom",
            "y": 1.08,
            "xanchor": "left",
            "x": 0,
            "itemsizing": "constant",
        },
        boxmode="overlay",
        autotypenumbers="strict",  # a layer called "3" is a name, not a number
        uirevision="panel",
    )


def without_training(layers: Sequence[str]) -> tuple[dict, dict]:
    """Return the layout changes that hide the learning curve of a panel's figure, and those that show it again."""
    changes = []
    for shown in (False, True):
        layout = panel_figure(layers, trains=shown).layout
        change = {f"{axis}.domain": layout[axis].domain for axis in ("yaxis", "yaxis2", "yaxis3", "yaxis4")}
        change |= {f"annotations[{i}].y": layout.annotations[i].y for i in range(4)}
        change |= {f"{axis}.visible": shown for axis in ("xaxis5", "yaxis5", "yaxis6")}
        changes.append({**change, "annotations[4].visible": shown, "height": layout.height})
    return changes[0], changes[1]


def _left(figure: go.Figure, title: str) -> float:
    axes = ("xaxis", "xaxis2", "xaxis3", "xaxis4", "xaxis5")
    return figure.layout[axes[PANEL_TITLES.index(title)]].domain[0]


# --- close looks, for the notebooks --------------------------------------------------------------------------------


def matrix(pictures: Mapping[str, Any], title: str = "", digits: int = 1) -> go.Figure:
    """Draw small matrices side by side on one color scale, each cell with its value; name -> 2-d values."""
    arrays = {name: _array(values).astype(float) for name, values in pictures.items()}
    top = max((np.nanmax(np.abs(a)) for a in arrays.values() if a.size), default=1.0) or 1.0
    figure = make_subplots(1, len(arrays), subplot_titles=list(arrays), horizontal_spacing=0.06)
    for col, values in enumerate(arrays.values(), 1):
        shown = 0 if np.array_equal(values, np.round(values)) else digits
        text = [[_signed(v, shown) for v in row] for row in values]
        heat = go.Heatmap(
            z=values[::-1],
            text=text[::-1],
            texttemplate="%{text}",
            coloraxis="coloraxis",
            xgap=2,
            ygap=2,
            hoverinfo="z",
        )
        figure.add_trace(heat, 1, col)
        figure.update_yaxes(scaleanchor=f"x{col if col > 1 else ''}", row=1, col=col)
    figure.update_xaxes(visible=False, constrain="domain").update_yaxes(visible=False, constrain="domain")
    words = "; ".join(f"{n}: {a.shape[0]} by {a.shape[1]}, {np.mean(a == 0):.0%} zeros" for n, a in arrays.items())
    scale = {"colorscale": [[0, ORANGE], [0.5, "#ffffff"], [1, BLUE]], "cmin": -top, "cmax": top, "showscale": False}
    margin = {"l": 8, "r": 8, "t": 64 if title else 36, "b": 8}
    return _calm(figure, words + ".", 300, **_title(title), coloraxis=scale, margin=margin)


def _signed(value: float, digits: int) -> str:
    """Return the value with a true minus sign, and none before a zero."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def singular_values(weights: Mapping[str, Any], kept: float | None = None, title: str = "Singular values") -> go.Figure:
    """Draw each layer's singular values, relative to its largest, over the fraction of full rank.

    `weights` maps a name to a weight of any shape (dimension 0 against the rest) or to its 1-d singular values.
    """
    figure = go.Figure()
    for i, (name, weight) in enumerate(weights.items()):
        color, symbol = SERIES[i % len(SERIES)]
        values = _spectrum(_array(weight))
        part = (np.arange(len(values)) + 1) / len(values)
        look = {"line": {"color": color, "width": 1.4}, "marker": {"symbol": symbol, "size": 4, "color": color}}
        figure.add_trace(go.Scatter(x=part, y=values, name=name, mode="lines+markers", **look))
    if kept is not None:
        figure.add_vline(x=kept, line={"color": GREY, "dash": "dash"}, annotation_text=f"kept: {100 * kept:.0f} %")
    figure.update_xaxes(title="fraction of full rank", range=[0, 1.01]).update_yaxes(
        title="relative to the largest", range=[0, 1.03]
    )
    half = {n: float(np.mean(_spectrum(_array(w)) > 0.5)) for n, w in weights.items()}
    words = "Part of the singular values above half of the largest: " + ", ".join(
        f"{n} {p:.0%}" for n, p in half.items()
    )
    return _calm(
        figure, words + ".", 360, **_title(title), legend={"x": 1, "xanchor": "right", "y": 1, "yanchor": "top"}
    )


def _spectrum(weight: np.ndarray) -> np.ndarray:
    values = weight if weight.ndim == 1 else np.linalg.svd(weight.reshape(weight.shape[0], -1), compute_uv=False)
    return values / max(values[0], 1e-12) if len(values) else values


def weight_histogram(
    before: Any, after: Any = None, levels: Any = None, title: str = "Weights", bins: int = 101
) -> go.Figure:
    """Draw how often each weight value occurs, before and after; `levels` are drawn as ticks under the bars."""
    before = _array(before).ravel()
    top = float(np.abs(before).max()) if before.size else 1.0
    edges = np.linspace(-top, top, bins + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    figure = go.Figure()
    if after is not None:
        after = _array(after).ravel()
        count = np.histogram(after, edges)[0]
        figure.add_trace(go.Bar(x=middle, y=count, name="after", marker={"color": BLUE, "line": {"width": 0}}))
    count = np.histogram(before, edges)[0]
    line = {"color": GREY, "width": 1.6, "shape": "hvh"}
    figure.add_trace(go.Scatter(x=middle, y=count, name="before", mode="lines", line=line))
    if levels is not None:
        ticks = {"symbol": "line-ns", "size": 10, "line": {"width": 1.4, "color": VERMILLION}}
        places = np.unique(_array(levels).ravel())
        figure.add_trace(go.Scatter(x=places, y=np.zeros(len(places)), name="levels", mode="markers", marker=ticks))
    figure.update_xaxes(title="weight").update_yaxes(title="how many")
    words = f"{before.size:,} weights before" + (
        "" if after is None else f", {len(np.unique(after)):,} distinct values after"
    )
    return _calm(figure, words + ".", 320, **_title(title), bargap=0.05)


def mask_picture(mask: Any, title: str = "Kept weights") -> go.Figure:
    """Draw which weights are kept (dark) and removed (pale); a mask of any shape, rows are output channels."""
    kept = _array(mask).astype(bool)
    kept = kept.reshape(kept.shape[0], -1) if kept.ndim > 1 else kept.reshape(1, -1)
    scale = [[0, "rgba(138,138,138,0.18)"], [1, BLUE]]
    heat = go.Heatmap(
        z=kept[::-1].astype(np.uint8), zmin=0, zmax=1, colorscale=scale, showscale=False, hoverinfo="skip"
    )
    figure = go.Figure(heat).update_xaxes(title="inputs of one output channel", showgrid=False, showticklabels=False)
    figure.update_yaxes(title="output channels", showgrid=False, showticklabels=False)
    words = f"{kept.mean():.1%} of {kept.size:,} weights are kept, {1 - kept.mean():.1%} removed."
    return _calm(figure, words, 320, **_title(f"{title}: {100 * kept.mean():.0f} % kept"))


def sparsity_by_layer(removed: Mapping[str, float], title: str = "Removed per layer") -> go.Figure:
    """Draw the fraction of weights removed in each layer; name -> fraction."""
    names, values = list(removed), [100 * v for v in removed.values()]
    bars = go.Bar(
        x=values, y=names, orientation="h", marker_color=BLUE, hovertemplate="%{y}: %{x:.1f} %<extra></extra>"
    )
    figure = go.Figure(bars.update(text=[f"{v:.0f} %" for v in values], textposition="auto"))
    figure.update_xaxes(title="weights removed, %", range=[0, 100]).update_yaxes(autorange="reversed")
    words = ", ".join(f"{n} {v:.0f} %" for n, v in zip(names, values, strict=True))
    return _calm(figure, f"Weights removed: {words}.", 120 + 24 * len(names), **_title(title))


def soft_targets(
    logits: Any, classes: Sequence[str], temperatures: Sequence[float] = (1, 4), top: int = 10
) -> go.Figure:
    """Draw one image's class probabilities at several temperatures; `logits` has one value a class."""
    logits = _array(logits).astype(float).ravel()
    order = np.argsort(-logits)[:top]
    names = [str(classes[i]) for i in order]
    figure = make_subplots(
        1, len(temperatures), subplot_titles=[f"temperature {t:g}" for t in temperatures], shared_yaxes=True
    )
    for col, temperature in enumerate(temperatures, 1):
        share = np.exp((logits - logits.max()) / temperature)
        share = 100 * (share / share.sum())[order]
        bars = go.Bar(
            x=names, y=share, marker_color=BLUE, showlegend=False, hovertemplate="%{x}: %{y:.1f} %<extra></extra>"
        )
        figure.add_trace(bars, 1, col)
    figure.update_xaxes(type="category", showgrid=False).update_yaxes(title="probability, %", range=[0, 100], col=1)
    words = f"The largest class is {names[0]}; higher temperatures give the others more weight."
    return _calm(figure, words, 320, **_title("Soft targets"), margin={"l": 56, "r": 16, "t": 64, "b": 44})
