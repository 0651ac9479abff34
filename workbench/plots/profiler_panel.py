"""The profiler panel's figure: the layers under the machine's roofs, their milliseconds, and single queries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.compression import ANCHOR, GREY, INK, ROLE, _bars, _box, _calm, _short, latency_range
from workbench.plots.profiles import _name_peaks, _roofline_ranges, _roofs, roofline_arrows, roofline_points

if TYPE_CHECKING:
    from workbench.profiler.roofline import Roofline, RooflinePoint

TITLES = ("roofline of this machine", "milliseconds per layer", "single queries")
ROLES = ("baseline", "now")
MOST_ROOFS = 8  # four levels of memory, and precisions


@dataclass
class Shown:
    """What one model looks like to the profiler: points under the roofs, ms by layer, ms of single queries."""

    points: Sequence[RooflinePoint] = ()
    layer_ms: Mapping[str, float] = field(default_factory=dict)
    query_ms: Sequence[float] = ()


def profiler_figure(
    layers: Sequence[str], baseline: Shown | None = None, now: Shown | None = None, roofline: Roofline | None = None
) -> go.Figure:
    """Draw the roofline with both models' layers, the milliseconds of each of `layers`, and single queries.

    There are always the same traces in the same order, so that a page's figure can be moved to what this one shows.
    """
    both = {"baseline": baseline or Shown(), "now": now or Shown()}
    titled = {"subplot_titles": TITLES, "row_heights": [0.7, 0.3], "vertical_spacing": 0.22}
    figure = make_subplots(2, 2, specs=[[{}, {"rowspan": 2}], [{}, None]], **titled)
    _add_points(figure, both)
    names = _short(layers)
    for role, shown in both.items():
        ms = [shown.layer_ms.get(layer, 0.0) for layer in layers]
        figure.add_trace(_bars(names, ms, role, lambda one: f"{one:.4f} ms"), 1, 2)
    # Without any mark a category axis has no places, and plotly draws its line to nowhere: two marks nobody sees.
    figure.add_trace(go.Scatter(x=[0, 0], y=list(ROLES), **ANCHOR), 2, 1)
    for role, shown in both.items():
        figure.add_trace(_box(shown.query_ms, role, role).update(visible=len(shown.query_ms) > 0), 2, 1)
    _place(figure, names)
    _look(figure, names, both)
    return _add_roofs(figure, roofline, [*both["baseline"].points, *both["now"].points])


def _add_points(figure: go.Figure, both: Mapping[str, Shown]) -> None:
    """Add the arrows from before to after, and the layers of both models."""
    arrow = {"symbol": "arrow", "size": 11, "angleref": "previous", "color": INK}
    look = {"mode": "lines+markers", "marker": arrow, "line": {"color": INK, "width": 1}, "hoverinfo": "skip"}
    arrows = roofline_arrows(both["baseline"].points, both["now"].points)
    figure.add_trace(go.Scatter(**arrows, showlegend=False, **look), 1, 1)
    for role, shown in both.items():
        marker = {"size": 11, **ROLE[role], "line": {"width": 1, "color": "white"}}
        hover = f"%{{text}}<extra>{role}</extra>"
        trace = go.Scatter(**roofline_points(shown.points), name=role, mode="markers", marker=marker)
        figure.add_trace(trace.update(hovertemplate=hover, legendgroup=role, showlegend=True), 1, 1)


def _place(figure: go.Figure, names: Sequence[str]) -> None:
    """Leave as much room before the layers' bars as their names need on a narrow page."""
    gap = min(0.05 + 0.0085 * max(map(len, names), default=0), 0.24)
    for axis, place in (("xaxis", (0, 0.55)), ("xaxis3", (0, 0.55)), ("xaxis2", (0.55 + gap, 1))):
        figure.layout[axis].domain = place
    for title, axis in zip(figure.layout.annotations, ("xaxis", "xaxis2", "xaxis3"), strict=True):
        title.update(x=figure.layout[axis].domain[0], xanchor="left")  # where reading begins


def _look(figure: go.Figure, names: Sequence[str], both: Mapping[str, Shown]) -> None:
    figure.update_xaxes(title="milliseconds", rangemode="tozero", nticks=5, row=1, col=2)
    figure.update_yaxes(type="category", autorange="reversed", ticklabelstandoff=4, row=1, col=2)
    figure.update_xaxes(title="milliseconds", range=latency_range(*(s.query_ms for s in both.values())), row=2, col=1)
    order = {"type": "category", "categoryorder": "array", "categoryarray": list(ROLES), "range": [1.5, -0.5]}
    figure.update_yaxes(**order, row=2, col=1)
    slowest = max(both["now"].layer_ms, key=both["now"].layer_ms.get, default="")
    words = f"{len(both['now'].points)} layers under the roofs" + (f"; most time is in {slowest}." if slowest else ".")
    margin = {"l": 58, "r": 12, "t": 46, "b": 44}
    _calm(figure, words, max(520, 130 + 20 * len(names)), barmode="overlay", boxmode="overlay", margin=margin)
    legend = {"orientation": "h", "yanchor": "bottom", "y": 1.08, "xanchor": "left", "x": 0, "itemsizing": "constant"}
    figure.update_layout(legend=legend, autotypenumbers="strict", uirevision="panel")


def _add_roofs(figure: go.Figure, roofline: Roofline | None, points: Sequence[RooflinePoint]) -> go.Figure:
    """Set the roofline's axes, and draw the roofs over them once they are known."""
    xs, ys = _roofline_ranges(roofline, points)
    powers = {"type": "log", "dtick": 1, "exponentformat": "none"}
    figure.update_xaxes(title="multiply-adds × 2 per byte moved", range=xs, **powers, row=1, col=1)
    figure.update_yaxes(title="billion operations a second", range=ys, **powers, row=1, col=1)
    drawn = _roofs(roofline) if roofline else []
    for roof in [*drawn, *(_no_roof() for _ in range(MOST_ROOFS - len(drawn)))]:
        figure.add_trace(roof.update(showlegend=bool(roof.name)), 1, 1)  # said, since a page keeps what is not said
    if roofline:
        titles = len(figure.layout.annotations)
        _name_peaks(figure, roofline)
        for name in figure.layout.annotations[titles:]:  # at the right end of this plot, not of the whole figure
            name.xref = "x domain"
    return figure


def _no_roof() -> go.Scatter:
    line = {"color": GREY, "width": 1, "dash": "solid"}
    return go.Scatter(x=[], y=[], mode="lines", line=line, name="", showlegend=False, hovertemplate="")
