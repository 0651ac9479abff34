"""The profiler panel's figure: the machine's roofs with the layers under them, time per layer, and single queries.

Each function returns what its traces show now, so that a panel can build the figure once and then only move its marks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.compression import (
    ANCHOR,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    ROLE,
    VERMILLION,
    _bars,
    _box,
    _calm,
    _short,
)

PEAKS = {"fp32": (BLUE, "solid"), "bf16": (GREEN, "dash"), "int8": (VERMILLION, "dashdot")}
LEVELS = ("L1", "L2", "L3", "memory")
TITLES = ("roofline of this machine", "milliseconds per layer", "single calls")
INTENSITY, RATE = (0.1, 1000.0), (1.0, 1000.0)  # what the axes hold at least: operations a byte, 10⁹ operations a second


def rate_text(giga: float) -> str:
    """Return a rate of so many 10⁹ operations a second in words: 2140 -> "2.14 Top/s"."""
    return f"{giga / 1000:.3g} Top/s" if giga >= 1000 else f"{giga:.3g} Gop/s"


def profiler_figure(layers: Sequence[str]) -> go.Figure:
    """Return the figure of a profiler's panel, empty; traces are found by their `uid`.

    "peak-fp32", …: roofs of computing; "level-L1", …: roofs of moving bytes; "layers-baseline", "layers-now", "moves":
    layers under them and what joins before and after; "time-…" per layer; "calls-…" single calls.
    """
    specs = [[{}, {"rowspan": 2}], [{}, None]]
    titled = {"subplot_titles": TITLES, "row_heights": [0.68, 0.32], "vertical_spacing": 0.17}
    figure = make_subplots(2, 2, specs=specs, **titled)
    for trace in _roof_traces():
        figure.add_trace(trace, 1, 1)
    layers = _short(layers)
    for role in ("baseline", "now"):
        bars = _bars(layers, [0] * len(layers), role, lambda ms: f"{ms:.4f} ms")
        figure.add_trace(bars.update(uid=f"time-{role}", legendgroup=role), 1, 2)
    figure.add_trace(go.Scatter(x=[0, 0], y=["baseline", "now"], uid="calls-anchor", **ANCHOR), 2, 1)
    for role in ("baseline", "now"):
        figure.add_trace(_box([], role, role).update(uid=f"calls-{role}", visible=False), 2, 1)
    return _look(figure, layers)


def _roof_traces() -> list[go.Scatter]:
    quiet = {"hoverinfo": "text", "showlegend": False, "mode": "lines+text", "x": [], "y": [], "text": []}
    letters = {"size": 11, "color": GREY}
    levels = [
        go.Scatter(uid=f"level-{n}", line={"color": GREY, "width": 1.2}, textposition="top right", **quiet)
        for n in LEVELS
    ]
    peaks = [
        go.Scatter(uid=f"peak-{n}", line={"color": c, "width": 2, "dash": dash}, textposition="top left", **quiet)
        for n, (c, dash) in PEAKS.items()
    ]
    for trace in [*levels, *peaks]:
        trace.textfont = letters
    return [*levels, *peaks, _moves(), *(_layer_marks(role, size) for role, size in (("baseline", 8), ("now", 12)))]


def _moves() -> go.Scatter:
    arrow = {"symbol": "arrow", "angleref": "previous", "size": [], "color": ORANGE}
    line = {"color": ORANGE, "width": 1}
    quiet = {"hoverinfo": "skip", "showlegend": False, "x": [], "y": []}
    return go.Scatter(uid="moves", mode="lines+markers", marker=arrow, line=line, **quiet)


def _layer_marks(role: str, size: int) -> go.Scatter:
    look = {"size": size, "line": {"width": 1, "color": "white"}, **ROLE[role]}
    shown = {"hovertemplate": f"%{{text}}<extra>{role}</extra>", "showlegend": True, "legendgroup": role}
    return go.Scatter(uid=f"layers-{role}", name=role, mode="markers", marker=look, x=[], y=[], text=[], **shown)


def _look(figure: go.Figure, layers: Sequence[str]) -> go.Figure:
    gap = min(0.03 + 0.0085 * max(map(len, layers), default=0), 0.22)
    for axis, place in (("xaxis", (0, 0.52)), ("xaxis3", (0, 0.52)), ("xaxis2", (0.52 + gap, 1))):
        figure.layout[axis].domain = place
    powers = {"type": "log", "dtick": 1, "exponentformat": "none"}
    figure.update_xaxes(title="operations for each byte", range=log_range(INTENSITY), **powers, row=1, col=1)
    figure.update_yaxes(title="10⁹ operations a second", range=log_range(RATE), **powers, row=1, col=1)
    figure.update_xaxes(title="milliseconds", type="linear", rangemode="tozero", nticks=5, row=1, col=2)
    figure.update_yaxes(type="category", autorange="reversed", ticklabelstandoff=4, row=1, col=2)
    figure.update_xaxes(title="milliseconds", type="linear", range=[0, 1], row=2, col=1)
    order = {"type": "category", "categoryorder": "array", "categoryarray": ["baseline", "now"], "range": [1.5, -0.5]}
    figure.update_yaxes(**order, row=2, col=1)
    for title, axis in zip(figure.layout.annotations, ("xaxis", "xaxis2", "xaxis3"), strict=True):
        title.update(x=figure.layout[axis].domain[0], xanchor="left")  # where reading begins
    words = "Operations a second over operations for each byte, layer by layer; their milliseconds; single calls."
    _calm(figure, words, max(500, 130 + 20 * len(layers)), barmode="overlay", margin={"l": 58, "r": 12, "t": 46, "b": 44})
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.08, "xanchor": "left", "x": 0, "itemsizing": "constant"}
    return figure.update_layout(legend=legend, boxmode="overlay", autotypenumbers="strict", uirevision="panel")


# --- what the traces show ------------------------------------------------------------------------------------------


def roofs(roofline: Any, layers: Sequence = ()) -> dict[str, dict]:
    """Return uid -> x, y, text of the roofs, wide enough for the `layers`; {} before anything was measured."""
    if not roofline.peaks or not roofline.bandwidths:
        return {}
    low, high = span([*INTENSITY, *(p.intensity for p in layers)])
    peak, fastest = max(roofline.peaks.values()), max(roofline.bandwidths.values())
    drawn = {}
    for level, rate in roofline.bandwidths.items():
        x = [low, max(low, peak / rate)]
        drawn[f"level-{level}"] = _line(x, [one * rate for one in x], [f"{level} {rate:.3g} GB/s", ""])
    for precision, rate in roofline.peaks.items():
        x = [min(high, rate / fastest), high]
        drawn[f"peak-{precision}"] = _line(x, [rate, rate], ["", f"{precision} {rate_text(rate)}"])
    return {uid: line for uid, line in drawn.items() if uid.partition("-")[2] in (*LEVELS, *PEAKS)}


def _line(x: list[float], y: list[float], text: list[str]) -> dict:
    return {"x": x, "y": y, "text": text}


def marks(layers: Sequence) -> dict:
    """Return x, y, text of layers under the roofs; each has `name`, `intensity`, `gflops`, `precision`."""
    text = [f"{p.name}: {p.intensity:.3g} operations a byte, {rate_text(p.gflops)}, {p.precision}" for p in layers]
    return {"x": [p.intensity for p in layers], "y": [p.gflops for p in layers], "text": text}


def moves(before: Sequence, after: Sequence) -> dict:
    """Return the lines that join layers of one name, each ending in an arrow: x, y and the arrows' sizes."""
    was = {p.name: p for p in before}
    x, y, size = [], [], []
    for p in after:
        if p.name in was:
            x += [was[p.name].intensity, p.intensity, None]
            y += [was[p.name].gflops, p.gflops, None]
            size += [0, 9, 0]
    return {"x": x, "y": y, "size": size}


def span(values: Sequence[float]) -> tuple[float, float]:
    """Return the whole powers of ten that hold the positive values."""
    positive = [v for v in values if v > 0]
    return 10.0 ** math.floor(math.log10(min(positive))), 10.0 ** math.ceil(math.log10(max(positive)))


def log_range(values: Sequence[float]) -> list[float]:
    """Return the range of a logarithmic axis that holds the values, with a little room at its ends."""
    low, high = span(values)
    return [math.log10(low) - 0.05, math.log10(high) + 0.05]


def layer_ms(times: Mapping[str, float]) -> dict:
    """Return x and text of the bars of milliseconds per layer."""
    return {"x": list(times.values()), "text": [f"{ms:.4f} ms" for ms in times.values()]}
