"""Per-call times of several prepared models, taken in turns, and what may be said about their ratio."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from workbench.profiler.units import plain, times
from workbench.runtimes import Prepared, threads

ROUNDS = 20
FEWEST_ROUNDS = 6  # with five, all on one side of 1 is no 95 % proof: by chance alone it happens in 2 of 2**5 cases
BLOCK_MS = 12  # short, so that a panel can stop between two blocks, and a drift of the machine reaches everyone alike
WARM_UP_MS = 250  # at most: a machine that is never steady is measured all the same, and called noisy
LEAST_BUSY = 0.9  # of the wall time, all threads together; below it other processes had the processor meanwhile
STEADY = 0.05  # the difference between two groups of calls that are taken to be alike
LONGEST_MS = 3_600_000.0  # no call takes an hour; a clock that says so was set, or slept
FLOOR = 0.03  # no smaller difference is claimed, however narrow the interval: where weights lie in memory makes as much
NOISY_FLOOR = 0.1  # where the machine was not quiet while they were taken
RESAMPLES = 2000
_RUNS = itertools.count(1)


class ClockJumped(RuntimeError):
    """A call seemed to take no time, less than none, or hours: the clock cannot be trusted, so nothing is reported."""


@dataclass(frozen=True)
class Latency:
    """Times of single calls, in milliseconds, in the order they were taken; one inner tuple for each round."""

    rounds: tuple[tuple[float, ...], ...]
    runtime: str
    precision: str
    batch: int
    threads: int
    run: int  # rounds of one run were taken in turns, and can be paired
    busy: float | None = None  # processor time by wall time of the calls; None on a GPU

    @cached_property
    def samples_ms(self) -> np.ndarray:
        return np.concatenate([np.empty(0), *map(np.asarray, self.rounds)])

    @property
    def calls(self) -> int:
        return len(self.samples_ms)

    @property
    def median_ms(self) -> float:
        return self._percentile(50)

    @property
    def p25_ms(self) -> float:
        return self._percentile(25)

    @property
    def p75_ms(self) -> float:
        return self._percentile(75)

    @property
    def p90_ms(self) -> float | None:
        """The 90th percentile, or None below 100 calls, which are too few to know it."""
        return self._percentile(90) if self.calls >= 100 else None

    @property
    def p99_ms(self) -> float | None:
        """The 99th percentile, or None below 1,000 calls, which are too few to know it."""
        return self._percentile(99) if self.calls >= 1000 else None

    @property
    def iqr_ms(self) -> float:
        """The interquartile range, from the 25th to the 75th percentile."""
        return self.p75_ms - self.p25_ms

    @property
    def images_per_second(self) -> float:
        return 1000 * self.batch / self.median_ms

    @property
    def noisy(self) -> bool:
        """True when the medians of the two halves differ by more than a tenth, or a tenth of the time went to others.

        The latter is seen by the processor's time, since a model that computes on the processor never waits by itself:
        on several threads, whose times add up, only where all of them together had less than one processor.
        """
        return was_noisy(self.samples_ms, self.busy)

    def _percentile(self, percent: float) -> float:
        return float(np.percentile(self.samples_ms, percent)) if self.calls else math.nan

    def to_dict(self) -> dict:
        """Return the figures as JSON can hold them."""
        names = (
            "runtime",
            "precision",
            "batch",
            "threads",
            "calls",
            "median_ms",
            "p25_ms",
            "p75_ms",
            "iqr_ms",
            "p90_ms",
            "p99_ms",
            "busy",
            "noisy",
        )
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        noisy = ", noisy" if self.noisy else ""
        return f"{self.median_ms:.3g} ms ({self.p25_ms:.3g}–{self.p75_ms:.3g}, {self.calls} calls{noisy})"


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the baseline, with its 95 % interval; below 1 is slower.

    `floor` is the difference from 1 that the whole interval must exceed before anything is claimed.
    """

    value: float
    interval: tuple[float, float]
    floor: float = FLOOR

    @property
    def distinguishable(self) -> bool:
        """True when the whole interval lies further from 1 than the floor, faster and slower alike."""
        low, high = self.interval
        return low > 1 + self.floor or high < 1 / (1 + self.floor)

    def to_dict(self) -> dict:
        return {"value": self.value, "interval": list(self.interval), "distinguishable": self.distinguishable}

    def __str__(self) -> str:
        if math.isnan(self.value) or not self.distinguishable:
            return "not distinguishable"
        low, high = self.interval
        if self.value > 1:
            return f"{times(self.value)} faster ({plain(low)}–{plain(high)})"
        return f"{times(1 / self.value)} slower ({plain(1 / high)}–{plain(1 / low)})"


def measure(
    prepared: Sequence[Prepared], calls: int = 100, budget_s: float | None = None, seed: int = 0
) -> Iterator[list[Latency]]:
    """Time every model in turns, A B B A …, and yield all latencies so far after each block of calls.

    Ends after `calls` calls of each, rounded up to a full round; or after the first full round past `budget_s` seconds,
    but not before six. Between two blocks the number of threads and the garbage collector are as they were, so the
    caller may draw, or close the generator. Raises ClockJumped where a time cannot be true.
    """
    if not prepared or calls < 1:
        raise ValueError("measure needs at least one prepared model and one call.")
    run, takers, warm = next(_RUNS), [_Taker(one) for one in prepared], []
    for one in prepared:
        warm.append(warm_up(one))
        yield [taker.latency(run) for taker in takers]
    size = max(1, min(math.ceil(calls / ROUNDS), int(BLOCK_MS / max(warm))))  # one for all: equal calls, paired rounds
    start, rng = time.perf_counter(), np.random.default_rng(seed)
    for _ in range(math.ceil(calls / size)):
        for i in rng.permutation(len(prepared)):
            takers[i].take(size, refresh=warm[i] < BLOCK_MS / 2)
            yield [taker.latency(run) for taker in takers]
        if budget_s is not None and len(takers[0].rounds) >= FEWEST_ROUNDS and time.perf_counter() - start > budget_s:
            return


def latencies(prepared: Sequence[Prepared], calls: int = 100, budget_s: float | None = None) -> list[Latency]:
    """Time several models in turns and return one latency each; see `measure`."""
    results = []
    for results in measure(prepared, calls, budget_s):  # noqa: B007
        pass
    return results


def latency(prepared: Prepared, calls: int = 100, budget_s: float | None = None) -> Latency:
    """Time one model by itself; to compare two, time them together with `latencies`."""
    return latencies([prepared], calls, budget_s)[0]


def compare(latency: Latency, baseline: Latency, seed: int = 0) -> Ratio:
    """Return how many times faster `latency` is than `baseline`, both taken in one run of `measure`.

    The value is the median over rounds of baseline time by own time; the interval comes from resampling rounds
    (percentile bootstrap; Efron, 1979, doi:10.1214/aos/1176344552). Raises ValueError for separate runs.
    """
    if latency.run != baseline.run:
        raise ValueError("These latencies come from separate runs; measure both in one call of latencies([...]).")
    count = min(len(latency.rounds), len(baseline.rounds))
    if not count:
        return Ratio(math.nan, (0.0, math.inf))
    own, base = (np.array([np.median(taken) for taken in one.rounds[:count]]) for one in (latency, baseline))
    ratios = base / own
    picks = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    low, high = np.percentile(np.median(ratios[picks], axis=1), (2.5, 97.5))
    if count < FEWEST_ROUNDS or not _halves_agree(ratios):
        low, high = min(low, 1.0), max(high, 1.0)
    floor = NOISY_FLOOR if latency.noisy or baseline.noisy else FLOOR
    return Ratio(float(np.median(ratios)), (float(low), float(high)), floor)


def _halves_agree(ratios: np.ndarray) -> bool:
    first, second = (np.median(half) for half in np.array_split(ratios, 2))
    return bool((first > 1) == (second > 1))


@dataclass
class _Taker:
    """Takes the times of one model, round after round, and the processor time that went into them."""

    prepared: Prepared
    rounds: list[tuple[float, ...]] = field(default_factory=list)
    wall_s: float = 0.0
    processor_s: float = 0.0

    def take(self, size: int, refresh: bool) -> None:
        with undisturbed(self.prepared.threads):
            if refresh:
                self.prepared.run()  # the model before it has left its own weights in the cache
            processor, wall = time.process_time(), time.perf_counter()
            taken = [self.prepared.timed() for _ in range(size)]
            self.wall_s += time.perf_counter() - wall
            self.processor_s += time.process_time() - processor
        self.rounds.append(tuple(checked_ms(taken)))

    def latency(self, run: int) -> Latency:
        one = self.prepared
        busy = self.processor_s / self.wall_s if self.wall_s and one.device == "cpu" else None
        return Latency(tuple(self.rounds), one.runtime, one.precision, one.batch, one.threads, run, busy)


@contextlib.contextmanager
def undisturbed(count: int) -> Iterator[None]:
    """Hold the measuring lock, torch's number of threads and the garbage collector for the length of the block."""
    with threads(count):
        collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collecting:
                gc.enable()


def warm_up(prepared: Prepared) -> float:
    """Run until two neighboring groups of calls agree or time is up; return the quickest group, in ms for a call."""
    with undisturbed(prepared.threads):
        start = time.perf_counter()
        size = 3 if _group(prepared, 1) < WARM_UP_MS else 1  # a call that takes seconds is long enough by itself
        groups = [_group(prepared, size), _group(prepared, size)]
        while not _steady(*groups[-2:]) and (time.perf_counter() - start) * 1000 < WARM_UP_MS:
            groups.append(_group(prepared, size))
    return min(groups)


def checked_ms(taken: Sequence[float] | np.ndarray) -> Sequence[float] | np.ndarray:
    """Return times in ms as they are; raises ClockJumped if one of them cannot be how long a call took."""
    times_ms = np.asarray(taken)
    wrong = times_ms[~((times_ms > 0) & (times_ms < LONGEST_MS))]  # NaN is wrong too
    if not len(wrong):
        return taken
    raise ClockJumped(
        f"The clock says that a call took {wrong[0]:,.6g} ms, which cannot be. Perhaps the machine slept, its clock was"
        " set, or the model does nothing at all. Nothing of this run is reported; measure again."
    )


def was_noisy(taken_ms: np.ndarray, busy: float | None) -> bool:
    """Return True for times, float (calls,), taken on a machine that was not quiet; see `Latency.noisy`."""
    if len(taken_ms) < 4:
        return False
    if busy is not None and busy < LEAST_BUSY:
        return True
    first, second = (float(np.median(half)) for half in np.array_split(taken_ms, 2))
    return abs(first - second) > 0.1 * min(first, second)


def _steady(first: float, second: float) -> bool:
    return abs(first - second) < STEADY * second


def _group(prepared: Prepared, size: int) -> float:
    return float(np.median(checked_ms([prepared.timed() for _ in range(size)])))
