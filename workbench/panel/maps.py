"""Win/lose maps on a page: choose what is compressed, press Measure, and watch where it pays on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from html import escape

import ipywidgets
import numpy as np

from workbench import plots
from workbench.panel import controls, words
from workbench.panel.lesson import Card, Plot
from workbench.panel.worker import Steps, Worker
from workbench.profiler.maps import WinLoseMap, integer_map, low_rank_map, sparse_map, width_map

FRAME = 1.0  # seconds between two drawings: each replaces the whole figure on the page
MAPS: dict[str, Callable[[], Iterator[WinLoseMap]]] = {
    "zeros × batch": sparse_map,
    "rank × size": low_rank_map,
    "bits × size": integer_map,
    "channels": width_map,
}


class MapPanel(ipywidgets.VBox):
    """A choice of maps, each measured when asked for and drawn as it grows; what was measured stays.

    `maps`: by its name, a function that returns a generator of growing maps.
    """

    def __init__(self, maps: Mapping[str, Callable[[], Iterator[WinLoseMap]]] = MAPS):
        super().__init__()
        self.maps, self.found, self.state = dict(maps), {}, "resting"
        names = [(name, name) for name in self.maps]
        self.choice = controls.choice("map", names, names[0][1], "What is compressed, and over what")
        self.measure_button = controls.button("Measure", "Measure this map here, now", self.measure, accent=True)
        self.stop_button = controls.button("Stop", "Stop; what is measured stays", self.stop, disabled=True)
        self.status = controls.View(kind="wb-status", role="status")
        self.caption = Card(kind="wb-note", name="what the map shows")
        self.plot = Plot()
        self.worker = Worker(self._failed)
        self.choice.observe(lambda _: self._choose(), "value")
        self.children = (
            controls.row("wb-acts", self.choice, self.measure_button, self.stop_button, self.status),
            self.plot,
            self.caption,
        )
        self.add_class("wb-panel")
        self._drawn = 0.0
        self._choose()

    @property
    def shown(self) -> WinLoseMap | None:
        """The chosen map, as far as it is measured."""
        return self.found.get(self.choice.value)

    def measure(self) -> None:
        """Measure the chosen map from its beginning."""
        name = self.choice.value
        self.worker.submit(lambda stale: self._measure(name, stale))

    def stop(self) -> None:
        """Stop measuring; the cells that are known stay."""
        self.worker.stop()
        self._say("stopped", "stopped; what is measured stays")

    def wait_idle(self, timeout: float = 60.0) -> bool:
        """Wait until nothing is measured any more; False when that took longer than `timeout` seconds."""
        return self.worker.wait_idle(timeout)

    def close(self) -> None:
        """End the worker's thread and take the panel from the page."""
        self.worker.close()
        super().close()

    def _measure(self, name: str, stale) -> Steps:
        self._say("measuring", "measuring …")
        try:
            for found in self.maps[name]():
                self.found[name] = found
                if not stale() and time.monotonic() - self._drawn > FRAME:
                    self._say("measuring", f"measuring … {_cells(found)}")
                    self._draw()
                yield
        finally:
            self._draw()
        if not stale():
            self._say("done", f"measured, {_cells(self.found[name])}")

    def _choose(self) -> None:
        """Show the chosen map as far as it is known."""
        self._draw()
        if self.state != "measuring":
            known = f"measured, {_cells(self.shown)}" if self.shown else "not measured here yet: press Measure"
            self._say("resting", known)

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        if self.shown is None:
            self.plot.outputs, self.caption.html = (), ""
            return
        figure = plots.win_lose_plot(self.shown)
        # A title in a figure does not wrap; on a narrow page the sentence stands below instead.
        self.plot.draw(figure.update_layout(title_text=self.shown.title, margin_t=40))
        key = "▲ faster, ▼ slower, ≈ not distinguishable, · not measured"
        # The count makes each text a new one: a page that was opening when the last was sent gets this one.
        self.caption.html = f"{escape(self.shown.what)} {_cells(self.shown)}: {key}."

    def _failed(self, error: Exception) -> None:
        self._say("failed", words.sentence(error))

    def _say(self, state: str, text: str) -> None:
        self.state = state
        self.stop_button.disabled = state != "measuring"
        self.status.html = words.status(state, text, len(self.found))


def _cells(found: WinLoseMap) -> str:
    return f"{int(np.isfinite(found.ratio).sum())} of {found.ratio.size} cells"
