"""Time a dashboard in a real browser: `make bench` prints how long a learner waits for each thing.

Opens a page with one panel through Voilà, moves its slider by keyboard, and reads the page every few milliseconds.
`--notebook PATH` times another page that has a panel; by default one is written for glyphs-cnn and LowRank. Then it
prints how long each one-shot technique takes after a move of its slider, on glyphs-cnn and on torchvision's ResNet-18.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "browser"), str(ROOT / "tests")]

MOVES_S = 75

CELLS = (
    'import workbench as wb\nfrom workbench.panel import panel\ndata = wb.load_data("glyphs")\n'
    'model = wb.load_model("glyphs-cnn")',
    "panel(wb.LowRank, model, data)",
)
WATCH = """() => {
    // Note when the page changes, from the key press on; textContent, since innerText would cost a layout.
    const text = (where) => document.querySelector(where)?.textContent ?? "";
    window.seen = {};
    window.began = performance.now();
    const before = { size: text('[data-tile="size"] .wb-number-shown') };
    const note = (name) => (window.seen[name] ??= performance.now() - window.began);
    const look = () => {
        const accuracy = text('[data-tile="accuracy"]'), state = document.querySelector(".wb-state").dataset.state;
        if (text('[data-tile="size"] .wb-number-shown') !== before.size) {
            note("size");
            if (/images so far/.test(accuracy)) note("first");
            if (/images(?! so far)/.test(accuracy) && /\\d/.test(text('[data-tile="accuracy"] .wb-number-shown'))) {
                note("first");
                note("exact");
            }
            const guessed = document.querySelector('[data-tile="latency"] .wb-predicted');
            if (!guessed && /\\d/.test(text('[data-tile="latency"] .wb-number-shown'))) note("latency");
            if (state === "done") note("done");
        }
        if (!("done" in window.seen)) setTimeout(look, 4);
    };
    look();
}"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--notebook", type=Path, help="a notebook with a panel")
    options.add_argument("--moves", type=int, default=9, help="how often the slider is moved, by one step each")
    options.add_argument("--json", type=Path, help="write the figures to this file too")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = chosen.notebook or write_notebook(Path(folder) / "bench.ipynb")
        figures = measure(path, chosen.moves)
    for name, value in figures.items():
        print(f"{name:<42} {value}")
    for name, value in slider_moves():
        print(f"{name:<42} {value}", flush=True)
        figures[name] = value
    if chosen.json:
        chosen.json.write_text(json.dumps(figures, indent=1) + "\n")


def write_notebook(path: Path) -> Path:
    cells = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": c, "outputs": [], "execution_count": None}
        for i, c in enumerate(CELLS)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path


def measure(path: Path, moves: int) -> dict[str, str]:
    """Open the page, move the slider `moves` times, and return each figure as text."""
    from conftest import FLAGS, HOW_TO_GET_ONE, chromium_path, serving
    from playwright.sync_api import sync_playwright

    if chromium_path() is None:
        raise SystemExit(HOW_TO_GET_ONE)
    command = ("-m", "workbench", "dashboard", "--no-browser", "--notebooks", str(path.parent))
    with serving(*command, says=r"(http://127\.0\.0\.1:\d+/)") as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(180_000)
        page.goto(f"{address}voila/render/{path.name}", wait_until="commit")
        page.wait_for_selector(".js-plotly-plot .main-svg .bglayer", state="attached")
        plot_ms = page.evaluate("performance.now()")
        page.wait_for_selector('.wb-state[data-state="done"]', state="attached")
        seen = [move(page) for _ in range(moves)]
        kernel = json.loads(page.locator("#jupyter-config-data").inner_text())["kernelId"]
        memory = kernel_memory(kernel)
        browser.close()
    return report(plot_ms, [one for one in seen if "done" in one], memory)


def move(page) -> dict[str, float]:
    """Move the slider one step, to a value not seen before; return what the page showed when, in milliseconds."""
    slider = page.locator(".wb-dial input[type=range]").first
    slider.focus()
    page.evaluate(WATCH)
    page.keyboard.press("ArrowLeft")
    page.evaluate("window.released = performance.now() - window.began")
    page.wait_for_function("'done' in window.seen", timeout=60_000)
    return page.evaluate("({...window.seen, released: window.released})")


def slider_moves() -> Iterator[tuple[str, str]]:
    """Yield the median time of each one-shot technique after a move of its slider, the first move not counted."""
    import torch
    import torchvision

    import workbench as wb

    data = wb.load_data("glyphs")
    models = {"glyphs-cnn": (wb.load_model("glyphs-cnn"), data, "aim 60 ms")}
    models["ResNet-18"] = (torchvision.models.resnet18().eval(), torch.randn(8, 3, 64, 64), "aim 1,000 ms")
    for technique in wb.TECHNIQUES:
        for name, (model, images, aim) in models.items():
            if not technique().must_train:
                yield f"{technique.__name__} on {name}", f"{_move_ms(technique, model, images)} ({aim})"


def _move_ms(technique, model, images) -> str:
    """Return the median of four moves along the first setting that has a value without effect, in words.

    A technique that takes longer than MOVES_S for that is not moved again.
    """
    knob = next((k for k in technique.settings() if k.has_neutral), technique.settings()[0])
    positions = knob.positions()
    spent = []
    try:
        for part in (0.5, 0.4, 0.6, 0.3, 0.7):
            if sum(spent) > 1000 * MOVES_S:
                break
            began = time.perf_counter()
            technique(**{knob.name: positions[round(part * (len(positions) - 1))]}).compress(model, images)
            spent.append(1000 * (time.perf_counter() - began))
    except ValueError as error:
        return f"not here: {error}"
    moved = f"{statistics.median(spent[1:]):,.0f} ms" if spent[1:] else f"not moved after {MOVES_S} s"
    return f"{moved}, first {spent[0]:,.0f} ms"


def kernel_memory(kernel: str) -> str:
    """Return the resident memory of the kernel's process, found by its connection file."""
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if kernel.encode() in status.read_bytes():
                lines = (status.parent / "status").read_text().splitlines()
                kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
                return f"{kilobytes / 1024:,.0f} MB"
        except (OSError, StopIteration):
            continue
    return "not known on this system"


def report(plot_ms: float, seen: list[dict[str, float]], memory: str) -> dict[str, str]:
    """Return the figures in words; times after release begin when the last key was let go."""
    sizes = sorted(one["size"] for one in seen)
    p75 = sizes[min(len(sizes) - 1, int(0.75 * len(sizes)))]
    after = {
        name: statistics.median(max(0.0, one[name] - one["released"]) for one in seen)
        for name in ("first", "exact", "latency")
    }
    return {
        "page to first plot, cold": f"{plot_ms / 1000:.1f} s",
        "slider to size tile, median": f"{statistics.median(sizes):.0f} ms",
        "slider to size tile, p75": f"{p75:.0f} ms (aim 150 ms)",
        "release to first accuracy": f"{after['first']:.0f} ms (aim 400 ms)",
        "release to exact validation accuracy": f"{after['exact']:.0f} ms (aim 1,200 ms)",
        "release to measured latency": f"{after['latency']:.0f} ms (aim 2,000 ms)",
        "kernel memory": memory,
    }


if __name__ == "__main__":
    main()
