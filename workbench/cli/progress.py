"""A progress bar over training steps, a Ctrl-C that keeps what was learned, and one line for what is being measured."""

from __future__ import annotations

import os
import signal
import sys

BAR = 24  # characters
STOPPING = b"\nStopping after this step; Ctrl-C again stops at once.\n"


class Progress:
    """Watch a training: draw each `Step`, and answer False once Ctrl-C was pressed; a second one interrupts for good.

    So does the first one before any step: nothing was learned that could be kept. `ended` says that a training was told
    to end. Use it as `with Progress("lenet-5") as watch: technique.compress(model, data, watch)`.
    """

    def __init__(self, title: str):
        self.title, self.bar, self.stopped, self.ended, self.best = title, None, False, False, None

    def __enter__(self) -> Progress:
        self._before = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._before)
        if self.bar is not None:
            self.bar.close()

    def __call__(self, step) -> bool:
        """Draw one step; return False when the training should end."""
        if self.bar is None:
            from tqdm import tqdm

            self.bar = tqdm(total=step.steps, initial=step.step, unit="step", desc=self.title, dynamic_ncols=True)
        if step.accuracy is not None and (self.best is None or step.accuracy.value >= self.best.value):
            self.best = step.accuracy
        self.bar.n = step.step
        best = f"best {self.best.percent:.2f} %" if self.best else ""
        self.bar.set_postfix_str(", ".join(filter(None, [f"loss {step.loss:.3f}", best])))
        self.ended = self.ended or self.stopped
        return not self.stopped

    def _stop(self, *_) -> None:
        if self.stopped or self.bar is None:
            raise KeyboardInterrupt
        self.stopped = True
        os.write(2, STOPPING)  # by the system alone: Python's own files may be in the middle of a write


class Doing:
    """Show on a terminal what is being measured and how far it is, on one line that goes: watch(message, fraction)."""

    def __enter__(self) -> Doing:
        return self

    def __exit__(self, *_) -> None:
        self._write("")

    def __call__(self, message: str, fraction: float) -> None:
        full = round(min(max(fraction, 0), 1) * BAR)
        self._write(f"{'█' * full}{'░' * (BAR - full)} {fraction:4.0%}  {message} …")

    def _write(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{text[:110]}", end="", file=sys.stderr, flush=True)
