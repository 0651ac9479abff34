"""One thread that runs the newest job, in small steps, and drops whatever became old.

A job is a generator. It yields between batches, and may yield a number: the seconds it wants to rest. When a newer
job arrives, or Stop is pressed, the running job is closed at its next yield; nothing it computed later is shown.
Each step holds `MEASURING`: two panels on one page share the processor, and two steps at once would make the
milliseconds lie.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

from workbench.runtimes import MEASURING

Steps = Iterator["float | None"]
Job = Callable[[Callable[[], bool]], Steps]  # called with `stale()`, which turns true when the job became old


def give_way() -> None:
    """Let another panel's worker have one turn; called between the steps of a long training run."""
    MEASURING.release()
    time.sleep(0.001)
    MEASURING.acquire()


class Worker:
    """A daemon thread with one latest-wins slot and a generation number.

    `on_error(exception)` is told of every exception that leaves a job; the thread lives on.
    """

    def __init__(self, on_error: Callable[[Exception], None]):
        self.generation = 0
        self._on_error = on_error
        self._slot: Job | None = None
        self._running = False
        self._closed = False
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> int:
        """Put `job` in the slot, in place of one that has not begun; return its generation."""
        with self._wake:
            self.generation += 1
            self._slot = job
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._loop, name="workbench-panel", daemon=True)
                self._thread.start()
            self._wake.notify_all()
            return self.generation

    def stop(self) -> None:
        """Empty the slot and make the running job stale."""
        with self._wake:
            self.generation += 1
            self._slot = None
            self._wake.notify_all()

    def close(self) -> None:
        """Stop, and let the thread end."""
        self.stop()
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    @property
    def busy(self) -> bool:
        with self._wake:
            return self._running or self._slot is not None

    def wait_idle(self, timeout: float = 60.0) -> bool:
        """Wait until nothing runs and nothing waits; return False if that took longer than `timeout` seconds."""
        with self._wake:
            return self._wake.wait_for(lambda: not self._running and self._slot is None, timeout)

    def _loop(self) -> None:
        while True:
            with self._wake:
                self._running = False
                self._wake.notify_all()
                self._wake.wait_for(lambda: self._slot is not None or self._closed)
                if self._closed:
                    return
                job, self._slot, generation = self._slot, None, self.generation
                self._running = True
            self._run(job, generation)

    def _run(self, job: Job, generation: int) -> None:
        steps = None
        try:
            steps = job(lambda: self.generation != generation)
            while not self._stale_after(self._step(steps), generation):
                pass
        except StopIteration:
            pass
        except Exception as error:
            self._on_error(error)
        finally:
            if steps is not None:
                steps.close()

    @staticmethod
    def _step(steps: Steps) -> float | None:
        with MEASURING:
            return next(steps)

    def _stale_after(self, rest: float | None, generation: int) -> bool:
        with self._wake:
            return self._wake.wait_for(lambda: self.generation != generation, rest or 0)
