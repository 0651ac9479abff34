"""What a panel says: its tiles, its sentences and its table, as HTML. Numbers keep their width and their unit."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from html import escape

from workbench.panel.measure import OTHER, Point, Prediction, Timing, changed, difference, verdict_of
from workbench.profiler import Latency, ScenarioResult, compare, environment
from workbench.profiler.layers import LayerTime, LayerTimes
from workbench.profiler.report import Difference
from workbench.profiler.verdicts import Verdict
from workbench.technique import Pipeline, Technique

DASH = '<span class="wb-none">–</span>'
SAME = "≈ not distinguishable"


def kilobytes(size_bytes: float) -> str:
    """Bytes in kB, always: 412345 -> "412.3"."""
    return f"{size_bytes / 1000:,.1f}"


def milliseconds(ms: float) -> str:
    return f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def times(ratio: float) -> str:
    """A ratio with the digits it deserves: 5.3×, 12×."""
    return f"{ratio:.2f}×" if ratio < 2 else f"{ratio:.1f}×" if ratio < 20 else f"{ratio:.0f}×"


def signed(points: float, digits: int = 1) -> str:
    return f"{points:+.{digits}f}".replace("-", "−")


def machine() -> str:
    """Name the processor as far as it matters for speed: "2 cores, AMX INT8"."""
    here = environment()
    kind = next((f for f in _STRONGEST if f in here.features), "")
    return f"{here.cores} core{'s' if here.cores != 1 else ''}{', ' if kind else ''}{kind}"


_STRONGEST = ("AMX INT8", "AVX-512 VNNI", "AVX-VNNI", "AVX-512", "AVX2", "I8MM", "dot product", "NEON")


def source_link(source: str) -> str:
    """Return a citation with its arXiv number or DOI as a link."""
    link = r'<a href="https://{}\g<1>" target="_blank" rel="noopener">\g<0></a>'
    text = re.sub(r"arXiv:(\d{4}\.\d{4,5})", link.format("arxiv.org/abs/"), escape(source))
    return re.sub(r"doi:(10\.\d{4,}/\S+)", link.format("doi.org/"), text)


def code(technique: Technique) -> str:
    """Return a line of Python that makes the technique."""
    if isinstance(technique, Pipeline):
        return f"wb.Pipeline([{', '.join(map(code, technique.stages))}])"
    return f"wb.{type(technique).__name__}({', '.join(f'{k}={v!r}' for k, v in technique.values().items())})"


def card(technique: type[Technique]) -> str:
    """Return what a technique's module says of it: the idea, when it helps and when it does not, folded away."""
    text = sys.modules[technique.__module__].__doc__ or technique.__doc__ or ""
    parts = [" ".join(part.split()) for part in text.split("\n\n")]
    said = {
        head: part.removeprefix(f"{head}:").strip() for head in CARD for part in parts if part.startswith(f"{head}:")
    }
    if not said:
        return ""
    rows = "".join(f"<dt>{head}</dt><dd>{_code(body)}</dd>" for head, body in said.items())
    return f"<details><summary>When it helps, and when it does not</summary><dl>{rows}</dl></details>"


CARD = ("Idea", "Settings", "When it helps", "When it does not")


def _code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def clock(steps: list) -> str:
    """Say how much longer a training runs, from its steps so far."""
    spent = sum(step.seconds for step in steps)
    left = spent / steps[-1].step * (steps[-1].steps - steps[-1].step)
    return f"about {left / 60:.0f} min left" if left > 90 else f"about {left:.0f} s left"


def sentence(error: Exception) -> str:
    """Return an exception as one readable sentence."""
    text = " ".join(str(error).split()) or "no reason was given"
    known = isinstance(error, (ValueError, RuntimeError)) and text.endswith((".", "!", "?"))
    return text if known else f"This setting could not be measured: {type(error).__name__}: {text}."


def alert(text: str) -> str:
    return f'<div class="wb-alert-box"><span aria-hidden="true">⚠</span> {escape(text)}</div>' if text else ""


def status(state: str, text: str, measurements: int) -> str:
    """Return the progress line; its data attributes tell tests and scripts the same."""
    return f'<span class="wb-state" data-state="{state}" data-measurements="{measurements}">{escape(text)}</span>'


def report(point: Point, baseline: Point) -> str:
    """Return the result on the test images, labelled as such."""
    gap = difference(point.test_hits, baseline.test_hits)
    words = "that is the baseline itself" if point is baseline else compare_accuracies(gap)[1]
    return (
        f"<p><b class='wb-test'>test</b> {escape(point.title)}: <b>{point.test.percent:.2f} %</b> of"
        f" {point.test.total:,} images ({_percent(point.test).partition('(')[2]}, 95 %); baseline"
        f" {baseline.test.percent:.2f} %; {words}. Looked at once for this setting; choose settings by validation.</p>"
    )


# --- comparisons ---------------------------------------------------------------------------------------------------


def compare_sizes(now: int, other: int) -> tuple[str, str]:
    """Return (mood, words) of a size against another; bytes are exact, so any difference is one."""
    if now == other:
        return "same", "= the same size"
    return ("good", f"▼ {times(other / now)} smaller") if now < other else ("bad", f"▲ {times(now / other)} larger")


def compare_accuracies(gap: Difference | None) -> tuple[str, str]:
    """Return (mood, words) of an accuracy against another on the same images."""
    if gap is None:
        return "none", DASH
    if not gap.distinguishable:
        return "same", SAME
    low, high = sorted(abs(edge) for edge in gap.interval)
    word = "more" if gap.points > 0 else "less"
    arrow, mood = ("▲", "good") if gap.points > 0 else ("▼", "bad")
    return mood, f"{arrow} {abs(gap.points):.1f} points {word} ({low:.1f}–{high:.1f})"


def compare_ratio(ratio) -> tuple[str, str]:
    """Return (mood, words) of a ratio "times faster"."""
    if ratio is None:
        return "none", DASH
    if not ratio.distinguishable:
        return "same", SAME
    if ratio.value >= 1:
        return "good", f"▼ {times(ratio.value)} faster"
    return "bad", f"▲ {times(1 / ratio.value)} slower"


def speed(timing: Timing | None):
    """Return how many times faster than the baseline on the same runtime, or None while that is unknown."""
    return compare(timing.now, timing.baseline) if timing and timing.now and timing.now.calls else None


# --- tiles ---------------------------------------------------------------------------------------------------------


def tile(kind: str, title: str, value: str, unit: str, lines: Iterable[tuple[str, str]], note: str = "") -> str:
    """Return one tile: a title, a large number with its unit, two comparisons with their moods, a note."""
    said = "".join(f'<div class="wb-line wb-{mood}">{words}</div>' for mood, words in lines)
    number = f'<span class="wb-number-shown">{value}</span> <span class="wb-unit-shown">{unit}</span>'
    return (
        f'<section class="wb-tile" data-tile="{kind}" aria-label="{escape(title)}"><h4>{title}</h4>'
        f'<div class="wb-value">{number}</div>{said}<div class="wb-note">{note}</div></section>'
    )


def tiles(now: Point | None, baseline: Point | None, pinned: Point | None, name: str, gpu: tuple[str, str]) -> str:
    """Return the four tiles; `name` is the CPU runtime, `gpu` is (runtime or "", why there is none)."""
    made = [size_tile(now, baseline, pinned), accuracy_tile(now, baseline, pinned)]
    made.append(latency_tile("latency", "latency, CPU, batch 1", name, now, pinned))
    if gpu[0]:
        made.append(latency_tile("gpu", "latency, GPU, batch 1", gpu[0], now, pinned))
    else:
        made.append(tile("gpu", "latency, GPU, batch 1", DASH, "", [("none", escape(gpu[1]))]))
    return row_of(made)


def row_of(tiles: Iterable[str]) -> str:
    return f'<div class="wb-tiles">{"".join(tiles)}</div>'


def _pin(mood_words: tuple[str, str] | None) -> tuple[str, str]:
    """Say that a comparison is with the pinned point; an empty line keeps its place when nothing is pinned."""
    if mood_words is None:
        return "none", "&nbsp;"
    mood, words = mood_words
    return mood, f'<span class="wb-star">★</span> vs pinned: {words}'


def size_tile(now, baseline, pinned) -> str:
    title = "size of the file"
    if now is None:
        return tile("size", title, DASH, "kB", [("none", DASH), _pin(None)])
    beside = None if pinned is None else compare_sizes(now.size_bytes, pinned.size_bytes)
    lines = [compare_sizes(now.size_bytes, baseline.size_bytes), _pin(beside)]
    return tile("size", title, kilobytes(now.size_bytes), "kB", lines, f"baseline {kilobytes(baseline.size_bytes)} kB")


def accuracy_tile(now, baseline, pinned) -> str:
    title = "accuracy, validation"
    if now is None or now.accuracy is None:
        note = "" if baseline is None or baseline.accuracy is None else f"baseline {baseline.accuracy.percent:.1f} %"
        return tile("accuracy", title, DASH, "%", [("none", DASH), _pin(None)], note)
    low, high = now.accuracy.interval
    unit = f'% <span class="wb-plusminus">± {50 * (high - low):.1f}</span>'
    beside = None if pinned is None else compare_accuracies(difference(now.hits, pinned.hits))
    lines = [compare_accuracies(difference(now.hits, baseline.hits)), _pin(beside)]
    seen = f"{now.accuracy.total:,} images" + ("" if now.exact else " so far")
    note = f"baseline {baseline.accuracy.percent:.1f} % · {seen}"
    return tile("accuracy", title, f"{now.accuracy.percent:.1f}", unit, lines, note)


def _against_best(timing: Timing) -> tuple[str, str]:
    """Compare with the best fp32 runtime, which may be the one of the line above."""
    if not timing.best or not timing.best.calls:
        return "none", "&nbsp;"
    if timing.best is timing.baseline:
        return "none", f"{escape(timing.runtime)} is the best fp32 here"
    mood, said = compare_ratio(compare(timing.now, timing.best))
    return mood, f'{said} <span class="wb-than">vs {escape(timing.best.runtime)}</span>'


def latency_tile(kind: str, title: str, name: str, now: Point | None, pinned: Point | None) -> str:
    """Return the tile of a latency: predicted until it is measured, and then both."""
    timing, guess = now and now.timings.get(name), now and now.predicted.get(name)
    if not timing or not timing.now or not timing.now.calls:
        value, unit = (milliseconds(guess.ms), f"ms {PREDICTED}") if guess else (DASH, "ms")
        return tile(
            kind, title, value, unit, [("none", DASH), ("none", DASH), _pin(None), _foreseen(guess)], escape(name)
        )
    lines = [compare_ratio(speed(timing))]
    lines += [_against_best(timing), _foreseen(guess)]
    other = pinned and pinned is not now and pinned.timings.get(name)
    # Times of separate runs are shown side by side; no claim is made about their ratio.
    lines.append(_pin(("none", f"{milliseconds(other.now.median_ms)} ms") if other and other.now else None))
    precision = f'computes in <b class="wb-precision">{escape(timing.precision)}</b>'
    note = f"{escape(name)}, {precision}{_noisy(timing.now)}"
    return tile(kind, title, milliseconds(timing.now.median_ms), "ms", lines, note)


def _noisy(taken: Latency | ScenarioResult) -> str:
    return ", noisy" if taken.noisy else ""


def scenario_tile(name: str, now: ScenarioResult | None, baseline: ScenarioResult | None, pinned) -> str:
    """Return the tile of an MLPerf-like scenario: images a second, how long queries waited, and whether in time.

    Scenarios run one after the other, not in turns, so their figures stand side by side without a ratio.
    """
    title = f"{escape(name)}, MLPerf-like"
    if now is None or not now.queries:
        return tile("scenario", title, DASH, "images/s", [("none", DASH), ("none", DASH), _pin(None)])
    tail = [f"{label} {milliseconds(ms)} ms" for label, ms in (("p90", now.p90_ms), ("p99", now.p99_ms)) if ms]
    lines = [("none", " · ".join(tail) or f"median {milliseconds(now.p50_ms)} ms"), _in_time(now)]
    lines.append(_pin(("none", f"{rate(pinned)} images/s") if pinned and pinned is not now else None))
    beside = f"baseline {rate(baseline)}{_noisy(baseline)} · " if baseline else ""
    return tile("scenario", title, rate(now), "images/s", lines, f"{beside}{now.queries:,} queries{_noisy(now)}")


def rate(result: ScenarioResult) -> str:
    per_second = result.images_per_second
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.1f}"


def _in_time(result: ScenarioResult) -> tuple[str, str]:
    """Say whether a server kept its bound; other scenarios have none."""
    if result.bound_ms is None:
        return "none", "&nbsp;"
    bound = f"bound {milliseconds(result.bound_ms)} ms at {result.offered_per_second:,.0f} queries/s"
    if result.kept is None:
        return "none", bound
    return ("good", f"✓ {bound}") if result.kept else ("bad", f"✗ {bound}")


PREDICTED = '<span class="wb-predicted">predicted</span>'


def _foreseen(guess: Prediction | None) -> tuple[str, str]:
    """Say what was predicted and how far off that was, here and in the median of all so far."""
    if guess is None or guess.error is None:
        return "none", "&nbsp;"
    usual = f", median {100 * guess.median_error:.0f} %" if guess.median_error is not None else ""
    return "none", f"<small>predicted {milliseconds(guess.ms)}: {100 * guess.error:.0f} % off{usual}</small>"


# --- in words ------------------------------------------------------------------------------------------------------


def in_words(now: Point | None, baseline: Point | None, name: str, hint: str = "") -> str:
    """Return the sentences under the figure."""
    if now is None:
        return f"<p>{escape(hint)}</p>" if hint else "<p>Weighing the model …</p>"
    said = [
        _size_words(now, baseline),
        _accuracy_words(now, baseline),
        *_why(now, baseline, name),
    ]
    if hint:
        said.append(escape(hint))
    return f"<p>{' '.join(filter(None, said))}</p>"


def _size_words(now: Point, baseline: Point) -> str:
    if now.size_bytes == baseline.size_bytes:
        return f"<b>{escape(now.title)}</b> leaves the file as it was, {kilobytes(now.size_bytes)} kB."
    if now.size_bytes > baseline.size_bytes:
        more = now.size_bytes / baseline.size_bytes - 1
        return (
            f"<b>{escape(now.title)}</b> makes the file {more:.0%} <b>larger</b>: what it adds outweighs what it saves."
        )
    saved = 1 - now.size_bytes / baseline.size_bytes
    return (
        f"<b>{escape(now.title)}</b> removes {100 * saved:.1f} % of the bytes"
        f" and leaves {100 * now.macs / max(baseline.macs, 1):.0f} % of the multiply-adds."
    )


def _accuracy_words(now: Point, baseline: Point) -> str:
    gap = difference(now.hits, baseline.hits)
    if gap is None:
        return ""
    lost, won, total = changed(now.hits, baseline.hits)
    text = f"{lost:,} of {total:,} validation images became wrong and {won:,} right"
    if not gap.distinguishable:
        return f"{text}: not distinguishable from the baseline (compared image by image)."
    low, high = gap.interval
    return f"{text}: {signed(gap.points)} points ({signed(low)} to {signed(high)}, paired, 95 %)."


def _why(now: Point, baseline: Point, place: str) -> list[str]:
    """Say why the point is as fast as it is, and which layers became larger."""
    said = []
    timing, found = now.timings.get(place), verdict_of(now, baseline, place)
    if found:
        said.append(judged(found))
    if found and timing.now.noisy and "not quiet" not in found.evidence:
        said.append("The machine was not quiet meanwhile, so take these times with care.")
    if found and found.kind != "no kernel" and "simulated" in timing.note:
        said.append(escape(timing.note[0].upper() + timing.note[1:]) + ".")
    grown = [n for n, b in now.layer_bytes.items() if n != OTHER and b > 1.02 * baseline.layer_bytes[n]]
    if grown and now is not baseline:
        names = ", ".join(grown[:3]) + (" and others" if len(grown) > 3 else "")
        said.append(
            f"{escape(names)} {'takes' if len(grown) == 1 else 'take'} more bytes than before: too small to gain."
        )
    return said


def verdict_list(verdicts: Iterable[Verdict], why_not: str = "") -> str:
    """Return the verdicts in their order, each with its evidence and one thing to try."""
    rows = "".join(f"<li>{judged(verdict)}</li>" for verdict in verdicts)
    missing = f"<p>{escape(why_not)}</p>" if why_not else ""
    return f"<h4>What holds the slowest layers back</h4><ul>{rows}</ul>{missing}" if rows or missing else ""


def judged(verdict: Verdict) -> str:
    """Return a verdict as a sentence behind its kind."""
    return f'<b class="wb-kind">{escape(verdict.kind)}</b> {escape(str(verdict))}'


# --- the table -----------------------------------------------------------------------------------------------------


def table(now: Point | None, baseline: Point | None, pinned: Point | None) -> str:
    """Return a fold with every number of the panel, with units."""
    if baseline is None:
        return "<details><summary>Table</summary></details>"
    columns = {"baseline": baseline, "now": now, "pinned": pinned}
    shown = {name: point for name, point in columns.items() if point is not None}
    head = "".join(f"<th scope=col>{name}</th>" for name in ("", *shown))
    rows = [_row(label, [cell(p) for p in shown.values()]) for label, cell in _ROWS]
    for runtime in dict.fromkeys(name for p in shown.values() for name in p.timings):
        rows += _timing_rows(runtime, list(shown.values()))
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return (
        f"<details><summary>Table</summary><div class='wb-tables'>{whole}{_layer_table(now, baseline)}</div></details>"
    )


def layer_times_table(now: LayerTimes | None, before: LayerTimes | None, verdicts: Iterable[Verdict]) -> str:
    """Return a fold with each layer's time, before and now, what it computes and moves, and its verdict."""
    if now is None:
        return ""
    kinds = {verdict.layer: verdict.kind for verdict in verdicts}
    was = {layer.name: layer.ms for layer in before.layers} if before else {}
    heads = ("ms", "before", "share, %", "multiply-adds", "weights, bytes", "in and out, bytes", "kernel", "verdict")
    head = "".join(f"<th scope=col>{text}</th>" for text in ("layer", *heads))
    rows = "".join(
        _times_row(layer, was.get(layer.name), now.total_ms, kinds.get(layer.name, "")) for layer in now.layers
    )
    ends = [("outside layers", now.outside_ms, before and before.outside_ms)]
    ends.append(("end to end", now.total_ms, before and before.total_ms))
    foot = "".join(_row(text, [*_shares(ms, old, now.total_ms), *[""] * 5]) for text, ms, old in ends)
    made = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody><tfoot>{foot}</tfoot>"
    return f"<details><summary>Layers</summary><div class='wb-tables'><table data-sorts>{made}</table></div></details>"


def _times_row(layer: LayerTime, before_ms: float | None, total_ms: float, verdict: str) -> str:
    counts = [f"{number:,}" for number in (layer.macs, layer.weight_bytes, layer.activation_bytes)]
    cells = [*_shares(layer.ms, before_ms, total_ms), *counts, escape(layer.kernel), verdict]
    return _row(f"{escape(layer.name)} <small>{escape(layer.kind)}</small>", cells)


def _shares(ms: float, before_ms: float | None, total_ms: float) -> list[str]:
    return [f"{ms:.4f}", DASH if before_ms is None else f"{before_ms:.4f}", f"{100 * ms / total_ms:.1f}"]


def _row(label: str, cells: list[str]) -> str:
    return f"<tr><th scope=row>{label}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>"


def _percent(accuracy) -> str:
    if accuracy is None:
        return DASH
    low, high = accuracy.interval
    return f"{accuracy.percent:.2f} ({100 * low:.1f}–{100 * high:.1f})"


_ROWS = (
    ("setting", lambda p: escape(p.title)),
    ("size of the file, bytes", lambda p: f"{p.size_bytes:,}"),
    ("parameters", lambda p: f"{p.parameters:,}"),
    ("multiply-adds, one image", lambda p: f"{p.macs:,}"),
    ("accuracy, validation, % (95 %)", lambda p: _percent(p.accuracy)),
    ("accuracy, test, % (95 %)", lambda p: _percent(p.test)),
)


def _timing_rows(name: str, shown: list[Point]) -> list[str]:
    found = [_taken(name, point, shown) for point in shown]
    rows = {
        "median, ms": lambda one: milliseconds(one.median_ms),
        "middle half, ms": lambda one: f"{milliseconds(one.p25_ms)}–{milliseconds(one.p75_ms)}",
        "p90, ms": lambda one: DASH if one.p90_ms is None else milliseconds(one.p90_ms),
        "computes in": lambda one: escape(one.precision),
    }
    return [
        _row(f"{escape(name)}: {what}", [cell(one) if one else DASH for one in found]) for what, cell in rows.items()
    ]


def _taken(name: str, point: Point, shown: list[Point]):
    """Return a point's latency on a runtime; the baseline's is the one taken in turns with another shown point."""
    if point.technique is None:
        timings = [p.timings.get(name) for p in shown[1:]]
        return next((t.baseline for t in timings if t and t.baseline and t.baseline.calls), None)
    timing = point.timings.get(name)
    return timing.now if timing and timing.now and timing.now.calls else None


def _layer_table(now: Point | None, baseline: Point) -> str:
    names = [f"{what} {when}" for what in ("bytes", "parameters", "multiply-adds") for when in ("before", "after")]
    head = "".join(f"<th scope=col>{name}</th>" for name in ("layer", *names))
    kinds = ("layer_bytes", "layer_parameters", "layer_macs")
    rows = []
    for name in baseline.layer_bytes:
        cells = []
        for kind in kinds:
            cells += [f"{getattr(baseline, kind)[name]:,}", f"{getattr(now, kind)[name]:,}" if now else DASH]
        rows.append(_row(escape(name), cells))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
