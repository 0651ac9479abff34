"""A report as text for a terminal: the profile's table and sentences, then one block for each further section."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from workbench.profiler.sweeps import knee
from workbench.profiler.units import size

if TYPE_CHECKING:
    from workbench.profiler.maps import WinLoseMap
    from workbench.reports.collect import Report

LAYERS_SHOWN = 20
TITLES = {
    "layers": "Layers",
    "roofline": "Roofline of this machine",
    "verdicts": "Why isn't it faster?",
    "scenarios": "Scenarios, MLPerf-like",
    "sweep": "Batch and threads",
    "software": "Software first",
    "memory": "Memory and energy",
    "maps": "Where compression pays on this machine",
}
Table = tuple[tuple[str, ...], list[tuple]]  # the heads of the columns, and rows of numbers and words


def text(report: Report) -> str:
    """Return the report as text; sections that could not be measured say why."""
    blocks = [str(report.profile)]
    for section, title in TITLES.items():
        lines = [*BLOCKS[section](report), *_why_missing(report, section)]
        if lines:
            blocks.append("\n".join([f"{title} ({report.runtime})" if section in ON_RUNTIME else title, *lines]))
    return "\n\n".join(blocks)


ON_RUNTIME = ("layers", "scenarios", "sweep")


def _why_missing(report: Report, section: str) -> list[str]:
    return [f"  not measured: {report.missing[section]}"] if section in report.missing else []


def aligned(table: Table) -> list[str]:
    """Return the lines of a table for a terminal: words to the left, numbers to the right."""
    heads, rows = table
    cells = [tuple(map(_cell, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    left = [all(isinstance(row[i], str | None) for row in rows) for i in range(len(heads))]
    place = lambda text, i: text.ljust(widths[i]) if left[i] else text.rjust(widths[i])
    return ["  " + "  ".join(place(text, i) for i, text in enumerate(line)).rstrip() for line in (heads, *cells)]


def _cell(value) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else number(value)


def number(value: float) -> str:
    """Write a measured number with three digits: 0.0123, 4.56, 1,230."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# --- tables: the same rows for the terminal and for the page ----------------------------------------------------------


def runtime_table(report: Report) -> Table:
    """Return one row a runtime: its single calls, those of the baseline if there is one, and throughput.

    The batch is that of the images a second.
    """
    heads = ("runtime", "computes in", "median, ms", "p25–p75, ms", "p90, ms", "baseline, ms", "against it")
    heads += ("against the best fp32", "images a second", "batch")
    rows = []
    for run in report.profile.runs:
        own, many, best = run.latency, run.throughput, report.profile.ratio_to_best(run)
        middle = f"{number(own.p25_ms)}–{number(own.p75_ms)}"
        times = (own.median_ms, middle, own.p90_ms, run.baseline.median_ms if run.baseline else None)
        against = tuple("" if ratio is None else str(ratio) for ratio in (run.ratio, best))
        noisy = " (noisy)" if own.noisy else ""
        rows.append((run.runtime, own.precision + noisy, *times, *against, many.images_per_second, many.batch))
    return _filled(heads, rows)


def _filled(heads: tuple[str, ...], rows: list[tuple]) -> Table:
    """Return a table without the columns that are empty."""
    columns = [i for i in range(len(heads)) if any(row[i] not in (None, "") for row in rows)]
    keep = lambda row: tuple(row[i] for i in columns)
    return keep(heads), [keep(row) for row in rows]


def layer_table(report: Report) -> Table:
    """Return one row a layer in the order they run, and one for what lies outside of them."""
    heads = ("layer", "kind", "ms", "share, %", "multiply-adds", "weights, bytes", "in and out, bytes", "computes in")
    times = report.layers
    rows = [
        (one.name, one.kind, one.ms, 100 * one.share, one.macs, one.weight_bytes, one.activation_bytes, one.precision)
        for one in times.layers
    ]
    share = 100 * times.outside_ms / times.total_ms
    return heads, [*rows, ("outside layers", "", times.outside_ms, share, None, None, None, "")]


def scenario_table(report: Report) -> Table:
    """Return one row a scenario."""
    heads = ("scenario", "batch", "queries", "median, ms", "p90, ms", "p99, ms", "bound, ms", "images a second")
    rows = []
    for name, r in report.scenarios.items():
        noisy = " (noisy)" if r.noisy else ""
        rows.append((name + noisy, r.batch, r.queries, r.p50_ms, r.p90_ms, r.p99_ms, r.bound_ms, r.images_per_second))
    return heads, rows


def sweep_table(report: Report) -> Table:
    """Return one row for each batch size on each number of threads; a star marks the knee."""
    best = knee(report.sweep)
    rows = [
        (p.batch, p.threads, p.latency.median_ms, p.images_per_second, "★ knee" if p is best else "")
        for p in report.sweep
    ]
    return ("batch", "threads", "median, ms", "images a second", ""), rows


def software_table(report: Report) -> Table:
    """Return one row for each way to run the uncompressed model; what did not run has its reason."""
    first = report.software[0]
    rows = [
        (row.name, row.latency.median_ms, "" if row is first else str(row.ratio), row.difference, row.note or row.what)
        if row.ran
        else (row.name, None, "not run", None, row.note)
        for row in report.software
    ]
    return ("way", "median, ms", "against the first", "difference", "what it is"), rows


def verdict_table(report: Report) -> Table:
    """Return one row a verdict, that of the whole model first."""
    rows = [(one.layer or "the whole", one.kind, one.evidence, one.advice) for one in report.verdicts]
    return ("layer", "verdict", "evidence", "try"), rows


def memory_table(report: Report) -> Table:
    """Return one row for each model and kind of memory, in bytes."""
    rows = []
    for name, one in report.memory.items():
        rows += [(name, "weights", one.weights_bytes), (name, "activations at most", one.activations_bytes)]
        rows += [(name, f"process resident, {stage}", count) for stage, count in one.resident_bytes.items()]
        rows += [(name, "GPU at most", one.cuda_bytes)] if one.cuda_bytes is not None else []
    return ("model", "memory", "bytes"), rows


def memory_words(report: Report) -> str:
    """Say why a smaller file takes no less memory, where that is so; else return ""."""
    before, now = (report.memory.get(role) for role in ("baseline", "now"))
    if not (before and now) or now.weights_bytes < before.weights_bytes:
        return ""
    if report.profile.model.size_bytes >= report.profile.baseline.size_bytes:
        return ""
    return "The file became smaller, the memory did not: torch holds each weight as a plain number, rounded or zero."


def map_table(found: WinLoseMap) -> Table:
    """Return one row for each value of the map's y, with times faster in each column; nothing where not measured."""
    heads = (f"{found.y_name} \\ {found.x_name}", *map(str, found.x))
    cells = [[None if math.isnan(ratio) else float(ratio) for ratio in row] for row in found.ratio]
    return heads, [(str(y), *row) for y, row in zip(found.y, cells, strict=True)]


def roof_table(report: Report) -> Table:
    """Return one row for each roof, as it was measured."""
    roofs = report.roofline
    moved = "copied" if roofs.device == "cuda" else "read"
    rows = [(f"{name} products", peak, "billion operations a second") for name, peak in roofs.peaks.items()]
    return ("roof", "measured", "unit"), rows + [
        (f"{n} {moved}", b, "GB a second") for n, b in roofs.bandwidths.items()
    ]


# --- blocks of text -------------------------------------------------------------------------------------------------


def _layers(report: Report) -> Iterator[str]:
    if report.layers is None:
        return
    heads, rows = layer_table(report)
    slowest = sorted(rows[:-1], key=lambda row: -row[2])[:LAYERS_SHOWN]
    yield from aligned((heads, [(*row[:5], *map(_size, row[5:7]), row[7]) for row in [*slowest, rows[-1]]]))
    if len(rows) - 1 > LAYERS_SHOWN:
        yield f"  the slowest {LAYERS_SHOWN} of {len(rows) - 1} layers; --json and --html have all of them"
    if report.layers.noisy:
        yield "  noisy: the machine was not quiet while they were taken"


def _size(count: int | None) -> str:
    return "" if count is None else size(count)


def _roofline(report: Report) -> Iterator[str]:
    if report.roofline is not None:
        yield from aligned(roof_table(report))


def _verdicts(report: Report) -> Iterator[str]:
    for one in report.verdicts:
        yield f"  {one.kind}: {one}"


def _scenarios(report: Report) -> Iterator[str]:
    if report.scenarios:
        yield from aligned(scenario_table(report))
    for one in report.scenarios.values():
        if one.kept is not None:
            yield f"  the bound of {number(one.bound_ms)} ms was {'kept' if one.kept else 'broken'}"
    if any(one.noisy for one in report.scenarios.values()):
        yield "  noisy: the machine was not quiet while they were taken"


def _sweep(report: Report) -> Iterator[str]:
    if report.sweep:
        yield from aligned(sweep_table(report))


def _software(report: Report) -> Iterator[str]:
    if report.software:
        yield from aligned(software_table(report))


def _memory(report: Report) -> Iterator[str]:
    if report.memory:
        heads, rows = memory_table(report)
        yield from aligned((heads, [(*row[:2], size(row[2])) for row in rows]))
    if memory_words(report):
        yield f"  {memory_words(report)}"
    if report.energy:
        yield f"  energy: {report.energy}"


def _maps(report: Report) -> Iterator[str]:
    for one in report.maps:
        yield f"  {one.title}, times faster. {one.what}"
        yield from aligned(map_table(one))


BLOCKS = {
    "layers": _layers,
    "roofline": _roofline,
    "verdicts": _verdicts,
    "scenarios": _scenarios,
    "sweep": _sweep,
    "software": _software,
    "memory": _memory,
    "maps": _maps,
}


def sentences(report: Report) -> Sequence[str]:
    """Return what the report says in plain sentences: the whole's verdicts first, then the profile's."""
    return [*(str(one) for one in report.verdicts if one.layer is None), *report.profile.sentences()]
