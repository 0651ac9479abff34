"""A report as one HTML file that opens anywhere, without a network: figures, tables that sort, verdicts, the machine.

The script that draws figures, plotly.js, is written into the file once, which makes most of its 5 MB.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from workbench import plots
from workbench.profiler.roofline import points
from workbench.profiler.sweeps import knee
from workbench.profiler.units import counted
from workbench.reports import words

if TYPE_CHECKING:
    from workbench.profiler import Run
    from workbench.reports.collect import Report


def html_page(report: Report) -> str:
    """Return the page; nothing in it is loaded from anywhere."""
    sections = "\n".join(_sections(report))
    look = files("workbench.reports").joinpath("page.css").read_text("utf-8")
    script = files("workbench.reports").joinpath("page.js").read_text("utf-8")
    title = html.escape(_title(report))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<style>{look}</style>
<script>{plots.plotly_script()}</script>
</head>
<body>
<header><h1>{title}</h1><p>Measured {report.when} on {html.escape(str(report.profile.environment))}.</p></header>
<main>
{sections}
</main>
<script type="application/json" id="report">{_json(report.to_dict())}</script>
<script>{script}</script>
</body>
</html>
"""


TITLE = 28  # pixels that a figure's title takes
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"


def _title(report: Report) -> str:
    return f"{report.name} against {report.baseline_name}" if report.baseline_name else report.name


def _json(value: Any) -> str:
    """Return JSON that no browser takes for the end of the script that it stands in."""
    return json.dumps(value).replace("<", "\\u003c")


def _sections(report: Report) -> Iterator[str]:
    """Yield the page's sections in the order that a reader asks: how much, why, where, what else."""
    yield _tiles(report)
    yield _section("In words", _list(words.sentences(report)))
    threads = report.profile.runs[0].latency.threads
    yield _section(f"Runtimes, on {counted(threads, 'thread')}", *_runtimes(report))
    for name, title in words.TITLES.items():
        parts = [*PARTS[name](report)]
        if name in report.missing:
            parts.append(f"<p>Not measured: {html.escape(report.missing[name])}</p>")
        if parts:
            yield _section(f"{title} ({report.runtime})" if name in words.ON_RUNTIME else title, *parts)
    yield _section("Where this was measured", _environment(report.profile.environment.card()))


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{''.join(parts)}</section>"


def _list(sentences) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(one)}</li>" for one in sentences) + "</ul>"


# --- pieces ---------------------------------------------------------------------------------------------------------


def _figure(figure, titled: bool = True) -> str:
    """Return a figure with its sentence below it, for those who cannot see it; without its title where a heading is."""
    if not titled:
        top, height = figure.layout.margin.t, figure.layout.height
        figure.update_layout(title_text="", margin_t=top - TITLE, height=height - TITLE)
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, config=plots.CONFIG)
    words_of = html.escape(plots.summary(figure))
    return f'<figure aria-label="{words_of}">{drawn}<figcaption>{words_of}</figcaption></figure>'


def _table(table: words.Table, folded: str = "") -> str:
    """Return a table whose columns sort at a click; `folded` is the line that opens it, where it starts closed."""
    heads, rows = table
    numbers = ["number" if any(isinstance(row[i], int | float) for row in rows) else "" for i in range(len(heads))]
    head = "".join(
        f'<th scope="col" class="{kind}"><button type="button">{html.escape(one)}</button></th>'
        for one, kind in zip(heads, numbers, strict=True)
    )
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    shown = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<details><summary>{html.escape(folded)}</summary>{shown}</details>" if folded else shown


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return f"<td>{html.escape(value or '')}</td>"
    shown = f"{value:,}" if isinstance(value, int) else words.number(value)
    return f'<td class="number" data-value="{value}">{shown}</td>'


def _tiles(report: Report) -> str:
    best = min(report.profile.runs, key=lambda run: run.latency.median_ms)
    quickest = max(report.profile.runs, key=lambda run: run.throughput.images_per_second)
    tiles = [*_size_tile(report), *_accuracy_tile(report), *_latency_tile(best)]
    rate = quickest.throughput
    words_of = f"images a second, {quickest.runtime}, batch {rate.batch}"
    tiles.append((f"{rate.images_per_second:,.0f}", words_of, _versus(quickest.throughput_ratio)))
    cells = (f"<div><strong>{html.escape(n)}</strong><span>{html.escape(w)}</span>{v}</div>" for n, w, v in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _versus(ratio) -> str:
    return "" if ratio is None else f"<em>{html.escape(str(ratio))}</em>"


def _size_tile(report: Report) -> Iterator[tuple[str, str, str]]:
    model, base = report.profile.model, report.profile.baseline
    versus = f"<em>the baseline {plots.size_text(base.size_bytes)}</em>" if base else ""
    yield plots.size_text(model.size_bytes), "the file", versus


def _accuracy_tile(report: Report) -> Iterator[tuple[str, str, str]]:
    accuracy, difference = report.profile.model.accuracy, report.profile.accuracy_difference
    if accuracy is not None:
        split = {"val": "validation", "train": "training"}.get(report.profile.split, report.profile.split)
        yield f"{accuracy.percent:.1f} %", f"accuracy, {accuracy.total:,} {split} images", _versus(difference)


def _latency_tile(run: Run) -> Iterator[tuple[str, str, str]]:
    words_of = f"{run.runtime}, {run.latency.precision}, batch {run.latency.batch}"
    yield f"{run.latency.median_ms:.3g} ms", f"latency, {words_of}", _versus(run.ratio)


def _runtimes(report: Report) -> Iterator[str]:
    samples, roles = {}, ("baseline", "now") if report.profile.baseline else ("now",)
    for run in report.profile.runs:
        if run.baseline is not None:
            samples[f"{run.runtime}, baseline"] = run.baseline.samples_ms
        samples[run.runtime] = run.latency.samples_ms
    yield _figure(plots.latency_distribution(samples, roles=roles))
    yield _table(words.runtime_table(report))


def _environment(card: dict[str, str]) -> str:
    items = "".join(f"<dt>{html.escape(title)}</dt><dd>{html.escape(told)}</dd>" for title, told in card.items())
    return f'<dl class="card">{items}</dl>'


# --- one function a section: figures first, then the table -----------------------------------------------------------


def _layers(report: Report) -> Iterator[str]:
    if report.layers is not None:
        yield _figure(plots.layer_treemap(report.layers))
        if report.baseline_layers is not None:
            yield _figure(plots.layer_waterfall(report.baseline_layers, report.layers))
        yield _table(words.layer_table(report), f"Table of {len(report.layers.layers)} layers")


def _roofline(report: Report) -> Iterator[str]:
    if report.roofline is not None:
        now, before = (points(one) if one else [] for one in (report.layers, report.baseline_layers))
        yield _figure(plots.roofline_plot(report.roofline, now, before), titled=False)
        yield _table(words.roof_table(report), "Table of roofs")


def _verdicts(report: Report) -> Iterator[str]:
    if report.verdicts:
        yield _table(words.verdict_table(report))


def _scenarios(report: Report) -> Iterator[str]:
    if report.scenarios:
        yield _figure(plots.scenario_latencies(report.scenarios), titled=False)
        yield _table(words.scenario_table(report))


def _sweep(report: Report) -> Iterator[str]:
    if report.sweep:
        yield _figure(plots.batch_sweep(report.sweep, knee(report.sweep)), titled=False)
        yield _table(words.sweep_table(report), "Table of the sweep")


def _software(report: Report) -> Iterator[str]:
    if report.software:
        yield _figure(plots.software_bars(report.software))
        yield _table(words.software_table(report), "Table of ways to run it")


def _memory(report: Report) -> Iterator[str]:
    if report.memory:
        yield _figure(plots.memory_bars(report.memory), titled=False)
        yield _table(words.memory_table(report), "Table of memory")
    if words.memory_words(report):
        yield f"<p>{words.memory_words(report)}</p>"
    if report.energy:
        yield f"<p>Energy: {html.escape(str(report.energy))}.</p>"


def _maps(report: Report) -> Iterator[str]:
    for one in report.maps:
        yield _figure(plots.win_lose_plot(one))
        yield _table(words.map_table(one), f"Table of times faster: {one.title}")


PARTS = {
    "layers": _layers,
    "roofline": _roofline,
    "verdicts": _verdicts,
    "scenarios": _scenarios,
    "sweep": _sweep,
    "software": _software,
    "memory": _memory,
    "maps": _maps,
}
