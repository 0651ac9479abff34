"""Figures of the profiler: where time and bytes go, what this machine could reach, and where compression pays.

All are drawn from measurements (`workbench.profiler`): treemap and waterfall of layers, roofline (Williams, Waterman,
Patterson, 2009, doi:10.1145/1498765.1498785), win/lose maps, scenarios like MLPerf's (Reddi et al., 2020,
arXiv:1911.02549), sweeps of batch and threads, fp32 made quicker by software alone, memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from workbench.plots.compression import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    ROLE,
    SERIES,
    SKY,
    VERMILLION,
    _calm,
    _log_ticks,
    _title,
    count_text,
    go,
    make_subplots,
    size_text,
)
from workbench.profiler import units
from workbench.profiler.timing import FLOOR

if TYPE_CHECKING:
    from workbench.profiler.layers import LayerTimes
    from workbench.profiler.maps import WinLoseMap
    from workbench.profiler.memory import Memory
    from workbench.profiler.roofline import Roofline, RooflinePoint
    from workbench.profiler.scenarios import ScenarioResult, SweepPoint
    from workbench.profiler.software import SoftwareRow

KINDS = (("Conv", BLUE), ("Linear", ORANGE), ("Norm", GREEN), ("Pool", SKY), ("LU", PURPLE))  # by part of its name
MEASURES = {  # what a layer's tile may stand for: its title, and its words
    "ms": ("time per layer", lambda ms: f"{ms:.3g} ms"),
    "macs": ("multiply-adds per layer", count_text),
    "weight_bytes": ("bytes of weights per layer", size_text),
    "activation_bytes": ("bytes in and out of each layer", size_text),
}
OUTSIDE = "outside layers"
INSIDE = " › "  # between a module and what it holds
LEAST_MOVE = 0.06  # powers of ten: 15 % on both axes of a roofline
MOST_STEPS = 14  # of a waterfall; the smaller ones are summed
LEVELS = ("L1", "L2", "L3", "memory")
DASHES = ("solid", "dash", "dashdot", "dot")
FASTER, SLOWER, SAME, UNKNOWN = "▲", "▼", "≈", "·"
BELOW = {"orientation": "h", "yanchor": "top", "y": -0.16, "xanchor": "left", "x": 0}


def plotly_script() -> str:
    """Return plotly.js, for a page that is to draw figures without a network."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


# --- layers --------------------------------------------------------------------------------------------------------


def layer_treemap(times: LayerTimes, by: str = "ms", title: str = "") -> go.Figure:
    """Draw each layer as a tile within its module, as large as its `by`: ms, macs, weight_bytes, activation_bytes.

    For milliseconds the remainder outside layers has a tile too, so that the whole is the end-to-end time.
    """
    heading, text = MEASURES[by]
    tiles = [(layer.name, float(getattr(layer, by)), _kind_color(layer.kind), layer.kind) for layer in times.layers]
    if by == "ms" and times.outside_ms > 0:
        tiles.append((OUTSIDE, times.outside_ms, "#d9d9d9", "between the layers"))
    whole = sum(value for _, value, _, _ in tiles)
    nodes = _tree(tiles)
    values = [node[0] for node in nodes.values()]
    treemap = go.Treemap(
        ids=[INSIDE.join(path) for path in nodes],
        labels=[path[-1] for path in nodes],
        parents=[INSIDE.join(path[:-1]) for path in nodes],
        values=values,
        branchvalues="total",
        text=[f"{text(value)}, {100 * value / max(whole, 1e-12):.0f} %" for value in values],
        customdata=[node[2] for node in nodes.values()],
        marker={"colors": [node[1] for node in nodes.values()], "line": {"width": 1.5, "color": "white"}},
        texttemplate="<b>%{label}</b><br>%{customdata}<br>%{text}",
        hovertemplate="%{id}<br>%{customdata}<br>%{text}<extra></extra>",
        tiling={"pad": 2, "packing": "squarify"},
        pathbar={"visible": True, "thickness": 18},
    )
    first = max(tiles[: len(times.layers)], key=lambda tile: tile[1], default=("no layer", 0.0, "", ""))
    words = f"{heading.capitalize()}: {len(times.layers)} layers, {text(whole)} in all; the largest is {first[0]} with "
    margin = {"l": 8, "r": 8, "t": 40, "b": 8}
    figure = _calm(go.Figure(treemap), f"{words}{text(first[1])}.", 400, **_title(title or heading), margin=margin)
    return figure.update_layout(uniformtext={"minsize": 10, "mode": "hide"})


def _kind_color(kind: str) -> str:
    return next((color for part, color in KINDS if part in kind), GREY)


def _tree(tiles: Iterable[tuple[str, float, str, str]]) -> dict[tuple[str, ...], tuple[float, str, str]]:
    """Return (value, color, kind) of each tile and of each module around it, whose value is the sum of what it holds.

    A layer inside a layer (an activation registered in a convolution) counts for itself.
    """
    nodes: dict[tuple[str, ...], tuple[float, str, str]] = {}
    for name, value, color, kind in tiles:
        path = _path(name)
        for depth in range(1, len(path)):
            held, shade, words = nodes.get(path[:depth], (0.0, "#f2f2f2", "module"))
            nodes[path[:depth]] = (held + value, shade, words)
        held = nodes[path][0] if path in nodes else 0.0
        nodes[path] = (held + value, color, kind)
    return nodes


def _path(name: str) -> tuple[str, ...]:
    """Return the modules around a layer and its own name: features.0.conv in torch, /features/0/Conv in ONNX."""
    return tuple(part for part in name.split("/" if "/" in name else ".") if part) or (name,)


def layer_waterfall(before: LayerTimes, after: LayerTimes, title: str = "") -> go.Figure:
    """Draw how the baseline's time becomes the compressed one's, layer by layer, the largest changes first.

    A layer that was split (`conv1` into `conv1.0` and `conv1.1`) is compared as a whole.
    """
    changes = _changes(before, after)
    shown, rest = changes[:MOST_STEPS], changes[MOST_STEPS:]
    steps = [*shown, *([(f"{len(rest)} other layers", sum(change for _, change in rest))] if rest else [])]
    steps.append((OUTSIDE, after.outside_ms - before.outside_ms))
    names = ["baseline", *(_ending(name) for name, _ in steps), "now"]
    values = [before.total_ms, *(change for _, change in steps), after.total_ms]
    texts = [f"{values[0]:.3g} ms", *(_change_text(change) for _, change in steps), f"{values[-1]:.3g} ms"]
    waterfall = go.Waterfall(
        x=values,
        y=names,
        orientation="h",
        measure=["absolute", *["relative"] * len(steps), "total"],
        text=texts,
        textposition="outside",
        cliponaxis=False,
        increasing={"marker": {"color": VERMILLION}},
        decreasing={"marker": {"color": GREEN}},
        totals={"marker": {"color": BLUE}},
        connector={"line": {"color": GREY, "width": 1, "dash": "dot"}},
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    waterfall.update(customdata=names)
    figure = go.Figure(waterfall).update_yaxes(autorange="reversed", type="category", showgrid=False)
    top = _highest([before.total_ms, *(change for _, change in steps)])
    figure.update_xaxes(title="milliseconds, end to end", range=[0, 1.2 * top])
    best = min(changes, key=lambda change: change[1], default=("no layer", 0.0))
    noisy = " The machine was not quiet while they were taken." if before.noisy or after.noisy else ""
    words = (
        f"From {before.total_ms:.3g} ms to {after.total_ms:.3g} ms; the largest saving is in {best[0]}, "
        f"{_change_text(best[1])}.{noisy}"
    )
    heading = title or "from baseline to compressed, layer by layer" + (" (noisy)" if noisy else "")
    return _calm(figure, words, 120 + 26 * len(names), **_title(heading), showlegend=False)


def _changes(before: LayerTimes, after: LayerTimes) -> list[tuple[str, float]]:
    """Return (layer, milliseconds more or less than before) for each layer of the baseline and each new one."""
    old = {layer.name: layer.ms for layer in before.layers}
    new = dict.fromkeys(old, 0.0)
    for layer in after.layers:
        name = next((one for one in _ancestors(layer.name) if one in old), layer.name)
        new[name] = new.get(name, 0.0) + layer.ms
    changes = [(name, ms - old.get(name, 0.0)) for name, ms in new.items()]
    return sorted(changes, key=lambda change: -abs(change[1]))


def _ancestors(name: str) -> list[str]:
    """Return the name and the modules around it, the nearest first: a.b.c, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]


def _highest(steps: Sequence[float]) -> float:
    return float(max(np.cumsum(steps), default=1.0)) or 1.0


def _change_text(change: float) -> str:
    sign = "±" if change == 0 else "▲ +" if change > 0 else "▼ −"
    return f"{sign}{abs(change):.2g} ms"


def _ending(name: str, longest: int = 26) -> str:
    """Return the end of a long name, where the names of one model differ."""
    return name if len(name) <= longest else "…" + name[1 - longest :]


# --- roofline ------------------------------------------------------------------------------------------------------


def roofline_plot(
    roofline: Roofline | None,
    points: Sequence[RooflinePoint] = (),
    before: Sequence[RooflinePoint] = (),
    title: str = "Roofline of this machine",
) -> go.Figure:
    """Draw the measured roofs, and layers under them: `points` now, `before` as squares, each joined by an arrow.

    Without a roofline the axes are empty, to be filled. Traces have a `uid`: "roofline-before", "roofline-arrows",
    "roofline-now"; `roofline_points` and `roofline_arrows` give what they are updated with.
    """
    figure = go.Figure(_roofs(roofline) if roofline else [])
    arrow = {"symbol": "arrow", "size": 11, "standoff": 7, "angleref": "previous", "color": INK}
    arrows = roofline_arrows(before, points)
    line = {"color": INK, "width": 1}
    figure.add_trace(
        go.Scatter(**arrows, uid="roofline-arrows", mode="lines+markers", marker=arrow, line=line, showlegend=False)
    )
    figure.update_traces(selector={"uid": "roofline-arrows"}, hoverinfo="skip")
    for role, uid, given in (("baseline", "before", before), ("now", "now", points)):
        look = {"size": 11, **ROLE[role], "line": {"width": 1, "color": "white"}}
        trace = go.Scatter(**roofline_points(given), uid=f"roofline-{uid}", name=role, mode="markers", marker=look)
        figure.add_trace(trace.update(hovertemplate="%{text}<extra></extra>", showlegend=bool(given)))
    if roofline:
        _name_peaks(figure, roofline)
    xs, ys = _roofline_ranges(roofline, [*points, *before])
    figure.update_xaxes(title="multiply-adds × 2 per byte moved", type="log", range=xs, dtick=1, exponentformat="none")
    figure.update_yaxes(title="billion operations a second", type="log", range=ys, dtick=1, exponentformat="none")
    words = _roofline_words(roofline, points)
    return _calm(
        figure, words, 460, **_title(title), legend={**BELOW, "y": -0.14}, margin={"l": 56, "r": 20, "t": 40, "b": 96}
    )


def roofline_points(points: Sequence[RooflinePoint]) -> dict[str, list]:
    """Return x (operations a byte), y (billion operations a second) and hover texts of layers on a roofline."""
    return {
        "x": [point.intensity for point in points],
        "y": [point.gflops for point in points],
        "text": [f"{p.name}, {p.precision}<br>{p.gflops:.3g} G/s at {p.intensity:.3g} a byte" for p in points],
    }


def roofline_arrows(before: Sequence[RooflinePoint], after: Sequence[RooflinePoint]) -> dict[str, list]:
    """Return x and y of lines from each layer before to the same layer, or to each of its parts, after.

    A layer that hardly moved has none: an arrow shorter than its own head points nowhere.
    """
    old, xs, ys = {point.name: point for point in before}, [], []
    for point in after:
        start = next((old[name] for name in _ancestors(point.name) if name in old), None)
        if start is not None and _moved(start, point):
            xs += [start.intensity, point.intensity, None]
            ys += [start.gflops, point.gflops, None]
    return {"x": xs, "y": ys}


def _moved(before: RooflinePoint, after: RooflinePoint) -> bool:
    if not all((before.intensity, before.gflops, after.intensity, after.gflops)):
        return False
    along, up = math.log10(after.intensity / before.intensity), math.log10(after.gflops / before.gflops)
    return math.hypot(along, up) > LEAST_MOVE


def _roofs(roofline: Roofline) -> list[go.Scatter]:
    """Return one slope for each level of memory up to the highest peak, and one flat roof for each precision."""
    top, traces = max(roofline.peaks.values()), []
    levels = sorted(roofline.bandwidths, key=lambda level: -roofline.bandwidths[level])
    for i, level in enumerate(levels):
        rate = roofline.bandwidths[level]
        x = np.geomspace(1e-3, top / rate, 30)
        look = {"color": GREY, "width": 1.8, "dash": DASHES[i % len(DASHES)]}
        hover = f"{level}: {rate:,.0f} GB/s<extra></extra>"
        traces.append(
            go.Scatter(x=x, y=x * rate, mode="lines", line=look, name=f"{level} {rate:,.0f} GB/s", hovertemplate=hover)
        )
    quickest = max(roofline.bandwidths.values(), default=1.0)
    for precision, peak in roofline.peaks.items():
        x = np.geomspace(peak / quickest, 1e5, 30)
        look = {"color": INK, "width": 2}
        hover = f"{precision}: {peak:,.0f} billion operations a second<extra></extra>"
        traces.append(go.Scatter(x=x, y=[peak] * 30, mode="lines", line=look, showlegend=False, hovertemplate=hover))
    return traces


def _name_peaks(figure: go.Figure, roofline: Roofline) -> None:
    """Write each precision and its peak at the right end of its roof: above it, below it where that place is taken."""
    before, close = math.inf, 0
    for precision, peak in sorted(roofline.peaks.items(), key=lambda item: -item[1]):
        close = close + 1 if math.log10(before / peak) < 0.4 else 0
        place = {"x": 1.0 - 0.34 * (close // 2), "xref": "paper", "xanchor": "right", "y": math.log10(peak)}
        place["yanchor"] = "top" if close % 2 else "bottom"
        figure.add_annotation(text=f"{precision} {peak:,.0f} G/s", showarrow=False, **place)
        before = peak


def _roofline_ranges(roofline: Roofline | None, points: Sequence[RooflinePoint]) -> tuple[list, list]:
    """Return ranges of both logarithmic axes that hold the ridges and every point."""
    xs, ys = [0.1, 100.0], [1.0, 100.0]
    if roofline:
        tops, slow = list(roofline.peaks.values()), min(roofline.bandwidths.values(), default=1.0)
        xs, ys = [0.1, 4 * max(tops) / slow], [slow / 10, 2 * max(tops)]
    xs += [point.intensity for point in points if point.intensity > 0]
    ys += [point.gflops for point in points if point.gflops > 0]
    return tuple([math.log10(min(values)) - 0.15, math.log10(max(values)) + 0.15] for values in (xs, ys))


def _roofline_words(roofline: Roofline | None, points: Sequence[RooflinePoint]) -> str:
    if roofline is None:
        return "A roofline that is still being measured."
    peaks = ", ".join(f"{precision} {peak:,.0f} G/s" for precision, peak in roofline.peaks.items())
    rates = ", ".join(f"{level} {rate:,.0f} GB/s" for level, rate in roofline.bandwidths.items())
    return f"Measured peaks: {peaks}; measured bandwidths: {rates}; {len(points)} layers drawn."


# --- win or lose ---------------------------------------------------------------------------------------------------


def win_lose_plot(found: WinLoseMap) -> go.Figure:
    """Draw how many times faster each cell was: ▲ faster, ▼ slower, ≈ inside the noise, · not measured."""
    ratio, low, high = (np.asarray(values, dtype=float) for values in (found.ratio, found.low, found.high))
    signs = win_lose_signs(ratio, low, high)
    shade = np.where((signs == SAME) | (signs == UNKNOWN), 0.0, np.log2(np.nan_to_num(ratio, nan=1.0)))
    text = [
        [_cell_text(sign, value) for sign, value in zip(*row, strict=True)] for row in zip(signs, ratio, strict=True)
    ]
    words = {FASTER: "faster", SLOWER: "slower", SAME: "not distinguishable", UNKNOWN: "not measured"}
    heat = go.Heatmap(
        z=shade,
        x=[str(x) for x in found.x],
        y=[str(y) for y in found.y],
        text=text,
        customdata=[[words[sign] for sign in row] for row in signs],
        texttemplate="%{text}",
        textfont={"size": 12, "color": "#1b1b1b"},
        colorscale=[[0, VERMILLION], [0.5, "#ffffff"], [1, SKY]],
        zmin=-2.5,
        zmax=2.5,
        showscale=False,
        xgap=2,
        ygap=2,
        uid="win-lose",
        hovertemplate=f"{found.x_name} %{{x}}, {found.y_name} %{{y}}<br>%{{text}} %{{customdata}}<extra></extra>",
    )
    figure = go.Figure(heat).update_xaxes(title=found.x_name, type="category", showgrid=False)
    figure.update_yaxes(title=found.y_name, type="category", showgrid=False)
    key = f"{FASTER} faster, {SLOWER} slower, {SAME} not distinguishable, {UNKNOWN} not measured"
    small = "".join(f"<br><span style='font-size:12px'>{line}</span>" for line in (found.what, key))
    layout = {**_title(found.title + small), "margin": {"l": 56, "r": 16, "t": 84, "b": 48}}
    return _calm(figure, _map_words(found, signs), 172 + 34 * len(found.y), **layout)


def win_lose_signs(ratio: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return one of ▲ ▼ ≈ · for each cell, by the rule of `Ratio.distinguishable`: the whole interval is off 1."""
    known = np.isfinite(ratio)
    with np.errstate(invalid="ignore"):
        signs = np.where(low > 1 + FLOOR, FASTER, np.where(high < 1 / (1 + FLOOR), SLOWER, SAME))
    return np.where(known, signs, UNKNOWN)


def _cell_text(sign: str, ratio: float) -> str:
    return sign if sign in (SAME, UNKNOWN) else f"{sign} {units.times(ratio)}"


def _map_words(found: WinLoseMap, signs: np.ndarray) -> str:
    counts = {sign: int((signs == sign).sum()) for sign in (FASTER, SLOWER, SAME, UNKNOWN)}
    left = f", {counts[UNKNOWN]} not measured" if counts[UNKNOWN] else ""
    return (
        f"{found.title}: of {signs.size} cells {counts[FASTER]} are faster, {counts[SLOWER]} slower, "
        f"{counts[SAME]} not distinguishable{left}."
    )


# --- scenarios and sweeps ------------------------------------------------------------------------------------------


PERCENTILES = (("p50_ms", "median", "circle"), ("p90_ms", "p90", "diamond"), ("p99_ms", "p99", "triangle-up"))


def scenario_latencies(results: Mapping[str, ScenarioResult], title: str = "MLPerf-like scenarios") -> go.Figure:
    """Draw median, p90 and p99 of each scenario, the bound that its p99 should keep, and images a second."""
    names = list(results)
    figure = make_subplots(
        1, 2, shared_yaxes=True, column_widths=[0.62, 0.38], horizontal_spacing=0.06,
        subplot_titles=("milliseconds from arrival to answer", "images a second"),
    )  # fmt: skip
    for name, result in results.items():
        ends = [ms for key, _, _ in PERCENTILES if (ms := getattr(result, key)) is not None]
        span = {"mode": "lines", "line": {"color": GREY, "width": 2}, "showlegend": False, "hoverinfo": "skip"}
        figure.add_trace(go.Scatter(x=[min(ends), max(ends)], y=[name, name], **span), 1, 1)
    for (key, label, symbol), color in zip(PERCENTILES, (BLUE, ORANGE, VERMILLION), strict=True):
        known = [name for name in names if getattr(results[name], key) is not None]
        marks = {"mode": "markers", "name": label, "marker": {"symbol": symbol, "size": 11, "color": color}}
        hover = "%{y}: %{x:.3g} ms<extra>" + label + "</extra>"
        xs = [getattr(results[name], key) for name in known]
        figure.add_trace(go.Scatter(x=xs, y=known, hovertemplate=hover, **marks), 1, 1)
    bound = [name for name in names if results[name].bound_ms is not None]
    marks = {"symbol": "line-ns", "size": 22, "line": {"width": 3, "color": INK}}
    xs = [results[name].bound_ms for name in bound]
    hover = "%{y}: bound of %{x:.3g} ms<extra></extra>"
    figure.add_trace(go.Scatter(x=xs, y=bound, mode="markers", name="bound", marker=marks, hovertemplate=hover), 1, 1)
    rates = [results[name].images_per_second for name in names]
    bars = go.Bar(x=rates, y=names, orientation="h", marker_color=BLUE, showlegend=False, width=0.5)
    bars.update(text=[f"{rate:,.0f}" for rate in rates], textposition="outside", cliponaxis=False)
    figure.add_trace(bars.update(hovertemplate="%{y}: %{x:,.0f} images/s<extra></extra>"), 1, 2)
    figure.update_xaxes(**_log_ticks(figure, "x"), row=1, col=1).update_xaxes(
        range=[0, 1.35 * max(rates, default=1)], row=1, col=2
    )
    figure.update_yaxes(type="category", categoryarray=names, range=[len(names) - 0.5, -0.5])
    words = " ".join(_scenario_words(name, result) for name, result in results.items())
    words += " The machine was not quiet while they were taken." if any(r.noisy for r in results.values()) else ""
    layout = {"legend": {**BELOW, "y": -0.3}, "margin": {"l": 56, "r": 24, "t": 70, "b": 84}}
    return _calm(figure, words or "No scenario was run.", 200 + 44 * len(names), **_title(title), **layout)


def _scenario_words(name: str, result: ScenarioResult) -> str:
    p99 = "p99 not known from so few queries" if result.p99_ms is None else f"p99 {result.p99_ms:.3g} ms"
    bound = (
        "" if result.kept is None else f", its bound of {result.bound_ms:.3g} ms {'kept' if result.kept else 'broken'}"
    )
    return f"{name}: median {result.p50_ms:.3g} ms, {p99}{bound}, {result.images_per_second:,.0f} images a second."


def batch_sweep(
    points: Sequence[SweepPoint], knee: SweepPoint | None = None, title: str = "Batch and threads"
) -> go.Figure:
    """Draw latency (left) and images a second (right) over the batch, one line for each number of threads.

    `knee` is marked with a star: larger batches than that gain little more.
    """
    figure = make_subplots(1, 2, subplot_titles=("milliseconds per batch", "images a second"), horizontal_spacing=0.12)
    counts = sorted({point.threads for point in points})
    for i, count in enumerate(counts):
        color, symbol = SERIES[i % len(SERIES)]
        mine = sorted((point for point in points if point.threads == count), key=lambda point: point.batch)
        name = _threads_text(count)
        look = {"mode": "lines+markers", "name": name, "legendgroup": name, "line": {"color": color}}
        look["marker"], look["x"] = {"symbol": symbol, "size": 8, "color": color}, [point.batch for point in mine]
        for col, y in enumerate(([p.latency.median_ms for p in mine], [p.latency.images_per_second for p in mine]), 1):
            hover = "batch %{x}: %{y:,.3~g}" + (" ms" if col == 1 else " images/s")
            figure.add_trace(go.Scatter(y=y, hovertemplate=hover, showlegend=col == 1, **look), 1, col)
    if knee is not None:
        star = {"mode": "markers", "marker": {"symbol": "star", "size": 16, "color": PURPLE}, "x": [knee.batch]}
        star |= {"name": f"knee: batch {knee.batch}, {_threads_text(knee.threads)}", "legendgroup": "knee"}
        for col, y in enumerate((knee.latency.median_ms, knee.latency.images_per_second), 1):
            figure.add_trace(go.Scatter(y=[y], showlegend=col == 1, hoverinfo="name", **star), 1, col)
    ticks = sorted({point.batch for point in points})
    figure.update_xaxes(title="batch size", type="log", tickvals=ticks, ticktext=[str(t) for t in ticks])
    figure.update_yaxes(**_log_ticks(figure, "y"), col=1).update_yaxes(rangemode="tozero", col=2)
    layout = {"legend": {**BELOW, "y": -0.22}, "margin": {"l": 56, "r": 16, "t": 70, "b": 90}}
    return _calm(figure, _sweep_words(points, knee), 380, **_title(title), **layout)


def _threads_text(count: int) -> str:
    return f"{count} thread{'s' if count != 1 else ''}"


def _sweep_words(points: Sequence[SweepPoint], knee: SweepPoint | None) -> str:
    if not points:
        return "A sweep that has not begun."
    best = max(points, key=lambda point: point.latency.images_per_second)
    place = f"batch {best.batch}, {_threads_text(best.threads)}"
    most = f"Most images a second: {best.latency.images_per_second:,.0f} at {place}."
    if knee is None:
        return most
    rate = f"{knee.latency.images_per_second:,.0f} images a second at {knee.latency.median_ms:.3g} ms"
    return f"{most} The knee is at batch {knee.batch}, {_threads_text(knee.threads)}: {rate}."


# --- software and memory -------------------------------------------------------------------------------------------


def software_bars(
    rows: Sequence[SoftwareRow], title: str = "The same model, made faster by software alone"
) -> go.Figure:
    """Draw the latency of each way to run the uncompressed model, slowest and quickest quarter as whiskers.

    What could not run has no bar, and its reason beside its name.
    """
    ran = [row for row in rows if row.ran]
    best = min(ran, key=lambda row: row.latency.median_ms, default=None)
    quartiles = [_quartiles(row) for row in rows]  # of what did not run: nothing
    values, names = [middle for _, middle, _ in quartiles], [row.name for row in rows]
    top = _software_top([row.latency.p75_ms for row in ran])
    whiskers = [(high - middle, middle - low) if 0 < high <= top else (None, None) for low, middle, high in quartiles]
    errors = {"array": [up for up, _ in whiskers], "arrayminus": [down for _, down in whiskers]}
    errors |= {"thickness": 1.2, "width": 3, "color": INK}
    bars = go.Bar(x=[min(value, top) for value in values], y=names, orientation="h", error_x=errors, width=0.6)
    bars.update(marker_color=[BLUE if row is best else "#b9b9b9" for row in rows], hoverinfo="skip")
    figure = go.Figure(bars)
    for row, (_, _, high) in zip(rows, quartiles, strict=True):
        text = _software_text(row, row is best, row is rows[0])
        place = {"x": min(high, top), "y": row.name, "xanchor": "left", "xshift": 8, "align": "left"}
        figure.add_annotation(text=text + " (bar cut)" * (high > top), showarrow=False, **place)
    figure.update_annotations(font_size=12).update_yaxes(type="category", autorange="reversed", showgrid=False)
    figure.update_xaxes(title="milliseconds, median", range=[0, 1.9 * top])
    words = f"The quickest is {best.name} with {best.latency.median_ms:.3g} ms." if best else "Nothing could run."
    return _calm(figure, words, 120 + 30 * len(rows), **_title(title), showlegend=False)


def _software_top(highs: Sequence[float]) -> float:
    """Return where bars end: at the longest, or at four times the middle one, so that one outlier hides no other."""
    return min(max(highs), 4 * float(np.median(highs))) if highs else 1.0


def _quartiles(row: SoftwareRow) -> tuple[float, float, float]:
    return (row.latency.p25_ms, row.latency.median_ms, row.latency.p75_ms) if row.ran else (0.0, 0.0, 0.0)


def _software_text(row: SoftwareRow, best: bool, first: bool) -> str:
    if not row.ran:
        return _ending_words(f"not run: {row.note}")
    ratio = "" if row.ratio is None or first else f", {row.ratio}"  # the first is what the others are compared with
    return f"{row.latency.median_ms:.3g} ms{ratio}" + (" ★ best" if best else "")


def _ending_words(text: str, longest: int = 60) -> str:
    return text if len(text) <= longest else text[: longest - 1].rsplit(" ", 1)[0] + " …"


def memory_bars(memories: Mapping[str, Memory], title: str = "Memory") -> go.Figure:
    """Draw bytes of weights and the activations' peak of each model, one on the other; name -> memory."""
    names, figure = list(memories), go.Figure()
    parts = (("weights", "weights_bytes", BLUE, ""), ("activations, peak", "activations_bytes", ORANGE, "/"))
    for label, key, color, pattern in parts:
        values = [getattr(memory, key) for memory in memories.values()]
        bars = go.Bar(x=values, y=names, orientation="h", name=label, width=0.5)
        bars.update(
            marker={
                "color": color,
                "pattern": {"shape": pattern, "fgcolor": "white", "size": 7, "solidity": 0.15, "fillmode": "overlay"},
            }
        )
        bars.update(text=[size_text(v) for v in values], textposition="auto", insidetextanchor="middle")
        figure.add_trace(bars.update(hovertemplate="%{y}: %{text}<extra>" + label + "</extra>"))
    figure.update_xaxes(title="bytes", tickformat="~s", rangemode="tozero")
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
    words = " ".join(
        f"{n}: {size_text(m.weights_bytes)} of weights, activations at most {size_text(m.activations_bytes)} at a time."
        for n, m in memories.items()
    )
    layout = {
        "barmode": "stack",
        "legend": {**BELOW, "y": -0.3, "traceorder": "normal"},
        "margin": {"l": 56, "r": 16, "t": 40, "b": 90},
    }
    return _calm(figure, words or "No memory was measured.", 180 + 40 * len(names), **_title(title), **layout)
