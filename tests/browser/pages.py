"""The small notebook that the panel's browser tests open, and how they read what a panel shows."""

import json
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

CELLS = (
    f"import sys; sys.path.insert(0, {str(TESTS)!r})\nimport toy\nimport workbench as wb\n"
    "from workbench.panel import panel\nmodel, data = toy.model(), toy.data(val={images})",
    "shown = panel(wb.{technique}, model, data, records=[])\nshown",
)


PROFILER = (
    CELLS[0],
    "from workbench.panel import ProfilerPanel\n"
    "shown = ProfilerPanel(wb.{technique}, model, data, runtime='eager')\nshown",
)


def write_notebook(path, technique="LowRank", images=1200, sources=CELLS):
    """Write a notebook with one panel on the toy model."""
    cells = [
        {
            "cell_type": "code",
            "id": f"cell{i}",
            "metadata": {},
            "source": source.replace("{technique}", technique).replace("{images}", str(images)),
            "outputs": [],
            "execution_count": None,
        }
        for i, source in enumerate(sources)
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


SIZE = '.wb-tile[data-tile="size"] .wb-number-shown'
ACCURACY = '.wb-tile[data-tile="accuracy"]'
LATENCY = '.wb-tile[data-tile="latency"] .wb-number-shown'


def state(page):
    """Return the state of the first panel on the page: "measuring", "done", "stopped", …"""
    return page.locator(".wb-state").first.get_attribute("data-state")


def measurements(page):
    return int(page.locator(".wb-state").first.get_attribute("data-measurements"))


def wait_for_state(page, wanted, timeout=60_000):
    page.wait_for_function(
        "wanted => document.querySelector('.wb-state')?.dataset.state === wanted", arg=wanted, timeout=timeout
    )


def wait_for_marks(page, fewest=20):
    """Wait until plotly, which may be read after all else, has drawn more than so many points, bars and boxes."""
    drawn = ".js-plotly-plot .trace path, .js-plotly-plot .points path"
    page.wait_for_function("([marks, n]) => document.querySelectorAll(marks).length > n", arg=[drawn, fewest])
