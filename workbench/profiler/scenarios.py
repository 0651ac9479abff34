"""Latency and throughput as different things: MLPerf-like scenarios.

The scenarios follow Reddi et al. (2020), "MLPerf Inference Benchmark", arXiv:1911.02549; multi stream follows the rules
of its later rounds, a query of several images as soon as the last one is answered. They are like MLPerf's, not MLPerf's
own: runs are short, and accuracy is not part of them.

    single stream   one image, and the next as soon as it is answered        a phone's camera: latency
    multi stream    one image of each of several streams in every query      a car's cameras: latency
    server          queries arrive at random times and wait in one queue     a service: latency under load, p99
    offline         all images are there at once, in batches of any size     an archive: images a second
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from workbench.profiler.room import bytes_for_one, has_room, require_room
from workbench.profiler.timing import checked_ms, latencies, undisturbed, warm_up, was_noisy
from workbench.profiler.units import counted
from workbench.runtimes import Prepared
from workbench.runtimes import runtime as runtime_named

SCENARIOS = ("single stream", "multi stream", "server", "offline")
BLOCK_S = 0.1  # between two of these the caller may draw or stop, and the clock of the run stands still
STREAMS = 8  # images in a query of multi stream, as in MLPerf
LOAD = 0.8  # the part of its capacity that a server is offered
BOUND = 20  # times what a query takes alone: twice what the slowest hundredth of a steady queue at this load waits
LEAST_BOUND_MS = 15.0  # what MLPerf's server allows ResNet-50; a busy operating system stops a process for as long
FEWEST_FOR_P99 = 1000
OFFLINE_BATCHES = (1, 8, 32, 64)
PARTS, FEWEST_IN_PART = 20, 5  # of a run, and queries in each: a tenth of a second or so
SLOWER = 1.2  # by which a part's median query is above the run's where the machine lost speed for a moment


@dataclass(frozen=True, eq=False)
class ScenarioResult:
    """What one scenario measured so far. `latencies_ms`, float (queries,): from a query's arrival to its answer.

    `seconds` is the time the run took on its own clock, which stands still while the caller draws; `images` were
    answered in it. Only a server has `offered_per_second`, queries that arrive a second on average; `bound_ms`, which
    99 % of its queries must keep; and `waiting`: queries not answered at the end, which count with their wait so far.
    `service_ms`, float (answered queries,): what each took to compute, without its wait in the queue. `busy` is
    processor time by wall time of that computing, and None on a GPU; what a server idles is in neither.
    """

    scenario: str
    runtime: str
    precision: str
    batch: int
    threads: int
    latencies_ms: np.ndarray = field(repr=False)
    seconds: float
    images: int
    offered_per_second: float | None = None
    bound_ms: float | None = None
    waiting: int = 0
    service_ms: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)
    busy: float | None = None

    @property
    def queries(self) -> int:
        return len(self.latencies_ms)

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else float("nan")

    @property
    def p50_ms(self) -> float:
        return self._percentile(50, fewest=1, otherwise=float("nan"))

    @property
    def p90_ms(self) -> float | None:
        """The 90th percentile, or None below 100 queries, which are too few to know it."""
        return self._percentile(90, fewest=100)

    @property
    def p99_ms(self) -> float | None:
        """The 99th percentile, or None below 1,000 queries, which are too few to know it."""
        return self._percentile(99, fewest=FEWEST_FOR_P99)

    @property
    def kept(self) -> bool | None:
        """Whether 99 % of the queries were answered within the bound; None without a bound or a p99."""
        return None if self.bound_ms is None or self.p99_ms is None else self.p99_ms <= self.bound_ms

    @property
    def load(self) -> float | None:
        """The part of its capacity that a server was offered, by what its queries really took; None without a rate.

        It is not the load that was meant where the machine became slower or faster after its capacity was measured.
        """
        if self.offered_per_second is None or not len(self.service_ms):
            return None
        return self.offered_per_second * float(np.mean(self.service_ms)) / 1000

    @property
    def noisy(self) -> bool:
        """True when the machine was not quiet, by the times that queries took to compute.

        As `Latency.noisy`, and when one twentieth of the run was slower than the whole by more than a fifth: a queue
        that fills in a slow tenth of a second is seen in its p99 long after. Waits are left out: a few arrivals close
        together make one half of a run wait longer on the quietest machine.
        """
        return was_noisy(self.service_ms, self.busy) or self._lost_speed()

    def _lost_speed(self) -> bool:
        if len(self.service_ms) < PARTS * FEWEST_IN_PART:
            return False
        parts = [np.median(part) for part in np.array_split(self.service_ms, PARTS)]
        return bool(max(parts) > SLOWER * np.median(self.service_ms))

    def _percentile(self, percent: float, fewest: int, otherwise: float | None = None) -> float | None:
        return float(np.percentile(self.latencies_ms, percent)) if self.queries >= fewest else otherwise

    def to_dict(self) -> dict:
        """Return the figures as JSON can hold them."""
        names = (
            "scenario runtime precision batch threads queries images seconds images_per_second p50_ms p90_ms p99_ms "
            "offered_per_second load bound_ms kept waiting busy noisy"
        )
        return {name: getattr(self, name) for name in names.split()}

    def __str__(self) -> str:
        if not self.queries:
            return f"{self.scenario}: no query answered yet"
        tails = {"p90": self.p90_ms, "p99": self.p99_ms}
        tail = "".join(f", {name} {value:.3g}" for name, value in tails.items() if value is not None)
        rate = f"{self.images_per_second:,.3g}" if self.images_per_second < 100 else f"{self.images_per_second:,.0f}"
        noisy = ", noisy" if self.noisy else ""
        return (
            f"{self.scenario}: median {self.p50_ms:.3g} ms{tail}, {rate} images/s, "
            f"{counted(self.queries, 'query', 'queries')} of {counted(self.batch, 'image')}{noisy}{self._about_bound()}"
        )

    def _about_bound(self) -> str:
        if self.bound_ms is None:
            return ""
        said = {True: "kept", False: "not kept", None: f"not known below {FEWEST_FOR_P99:,} queries"}[self.kept]
        left = f", {counted(self.waiting, 'query', 'queries')} still waiting" if self.waiting else ""
        return f"; {self.offered_per_second:,.3g} a second offered, bound {self.bound_ms:.3g} ms {said}{left}"


def single_stream(prepared: Prepared, seconds: float = 2.0) -> Iterator[ScenarioResult]:
    """Send one image, and the next as soon as it is answered; yield what was measured so far about ten times a second.

    Raises ValueError unless `prepared` takes batches of one image and `seconds` is above 0.
    """
    return _one_after_another("single stream", _one_image(prepared, "single stream"), seconds)


def multi_stream(prepared: Prepared, seconds: float = 2.0) -> Iterator[ScenarioResult]:
    """Send one image of each stream in a query, and the next query as soon as it is answered; see `single_stream`.

    There are as many streams as images in the batch of `prepared`.
    """
    return _one_after_another("multi stream", prepared, seconds)


def offline(prepared: Prepared, seconds: float = 2.0) -> Iterator[ScenarioResult]:
    """Work through images that are all there, batch after batch; a query is a batch. See `single_stream`."""
    return _one_after_another("offline", prepared, seconds)


def server(
    prepared: Prepared, rate_per_second: float, bound_ms: float, seconds: float = 5.0, seed: int = 0
) -> Iterator[ScenarioResult]:
    """Let queries of one image arrive at random times for `seconds`, and answer them one at a time, first come first.

    Arrivals are a Poisson process of `rate_per_second`, drawn beforehand; from then on the clock decides. A query's
    latency counts from its arrival, waiting included, however far behind the server is. Ends when all are answered, or
    as many seconds after the last arrival; who waits then counts as `waiting`. Raises ValueError for a rate, a bound or
    seconds that are not above 0, and unless `prepared` takes batches of one image.
    """
    if not rate_per_second > 0 or not bound_ms > 0:
        offered = f"{rate_per_second} queries a second and {bound_ms} ms"
        raise ValueError(f"A server needs a rate and a bound above 0, not {offered}.")
    _require_time(seconds)
    _one_image(prepared, "server")
    arrivals = _poisson(rate_per_second, seconds, seed)
    serving, now = _Serving(prepared, arrivals), 0.0  # seconds on the clock of the run
    warm_up(prepared)
    while len(serving.answers) < len(arrivals) and now < 2 * seconds:
        now = serving.block(now)
        yield serving.result(now, rate_per_second, bound_ms)


@dataclass
class _Computing:
    """Adds up wall time and processor time between `begin` and `end`."""

    wall_s: float = 0.0
    processor_s: float = 0.0

    def begin(self) -> None:
        self.wall_s -= time.perf_counter()
        self.processor_s -= time.process_time()

    def end(self) -> None:
        self.wall_s += time.perf_counter()
        self.processor_s += time.process_time()

    def busy(self, device: str) -> float | None:
        return self.processor_s / self.wall_s if self.wall_s > 0 and device == "cpu" else None


@dataclass
class _Serving:
    """A server at work: when it answered the queries so far, and how long each took to compute."""

    prepared: Prepared
    arrivals: np.ndarray
    answers: list[float] = field(default_factory=list)
    service_ms: list[float] = field(default_factory=list)
    computing: _Computing = field(default_factory=_Computing)

    def block(self, now: float) -> float:
        """Answer queries for one block from `now` on, noting when; return what the clock then says."""
        start, until = now, now + BLOCK_S
        with undisturbed(self.prepared.threads):
            self.prepared.run()  # the caller's drawing has left other things in the cache
            began = time.perf_counter() - now
            self.computing.begin()
            while len(self.answers) < len(self.arrivals) and start <= now < until:
                now = self._answer(began)
            self.computing.end()
        return now

    def _answer(self, began: float) -> float:
        arrival = began + self.arrivals[len(self.answers)]
        if time.perf_counter() < arrival:
            self.computing.end()
            _wait_until(arrival)
            self.computing.begin()
        started = time.perf_counter()
        self.prepared.run()
        answered = time.perf_counter()
        self.service_ms.append(1000 * (answered - started))
        self.answers.append(answered - began)
        return self.answers[-1]

    def result(self, now: float, rate: float, bound_ms: float) -> ScenarioResult:
        """Return the result so far: who has arrived and is not answered counts with the wait so far."""
        arrived = max(len(self.answers), int(np.searchsorted(self.arrivals, now)))
        waiting = arrived - len(self.answers)
        waits_ms = 1000 * (np.array(self.answers + [now] * waiting) - self.arrivals[:arrived])
        figures = (now, len(self.answers), rate, bound_ms, waiting)
        return _result("server", self.prepared, waits_ms, self.service_ms, self.computing, *figures)


def _poisson(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Draw the times of a Poisson process: their number is Poisson, and given it they are uniform. At least one."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(0, seconds, max(1, rng.poisson(rate * seconds))))


def _wait_until(moment: float) -> None:
    """Wait for a moment of perf_counter; sleep only while it is far, since sleepers wake up late."""
    while (left := moment - time.perf_counter()) > 0:
        if left > 0.002:
            time.sleep(left - 0.001)


def _one_image(prepared: Prepared, scenario: str) -> Prepared:
    if prepared.batch != 1:
        raise ValueError(f"In {scenario} a query is one image; prepare a batch of 1, not of {prepared.batch}.")
    return prepared


def _require_time(seconds: float) -> None:
    if not seconds > 0:
        raise ValueError(f"A scenario runs for some seconds, more than 0, not {seconds}.")


def _one_after_another(scenario: str, prepared: Prepared, seconds: float) -> Iterator[ScenarioResult]:
    _require_time(seconds)
    taken_ms, spent, computing = [], 0.0, _Computing()
    warm_up(prepared)
    while spent < seconds:
        with undisturbed(prepared.threads):
            prepared.run()  # the caller's drawing has left other things in the cache
            computing.begin()
            began = last = time.perf_counter()
            while began <= last < began + BLOCK_S:  # a clock that goes back ends it too, and is then refused
                prepared.run()
                before, last = last, time.perf_counter()
                taken_ms.append(1000 * (last - before))
            computing.end()
        spent += last - began
        taken = np.array(taken_ms)
        yield _result(scenario, prepared, taken, taken, computing, spent, len(taken) * prepared.batch)


def _result(scenario, prepared: Prepared, latencies_ms, service_ms, computing: _Computing, *figures) -> ScenarioResult:
    how = (prepared.runtime, prepared.precision, prepared.batch, prepared.threads)
    unrest = {"service_ms": np.array(service_ms), "busy": computing.busy(prepared.device)}
    return ScenarioResult(scenario, *how, checked_ms(latencies_ms), *figures, **unrest)


def scenarios(
    model: nn.Module,
    example: Tensor,
    runtime: str = "openvino",
    threads: int = 1,
    seconds: float = 2.0,
    bound_ms: float | None = None,
    seed: int = 0,
) -> Iterator[dict[str, ScenarioResult]]:
    """Run all scenarios, `seconds` each, and yield what was measured so far by the scenario's name.

    `example`, float (B, C, H, W): images that are repeated as often as a batch needs. The server is offered 80 % of
    what single stream answered, and keeps `bound_ms`, by default twenty times single stream's median but no less than
    15 ms; it runs on until 1,000 queries make a p99, at most ten times as long. Offline takes the best of a few batch
    sizes, of those that have room. Raises RuntimeFailed where the runtime cannot run the model or the images of multi
    stream have no room, and ValueError unless `seconds` is above 0.
    """
    prepare, found = runtime_named(runtime).prepare, {}
    needed = bytes_for_one(model, repeated(example, 1))
    require_room(needed, STREAMS)
    one = prepare(model, repeated(example, 1), threads)
    yield from _into(found, single_stream(one, seconds))
    alone = found["single stream"]
    yield from _into(found, multi_stream(prepare(model, repeated(example, STREAMS), threads), seconds))
    bound_ms = bound_ms or max(LEAST_BOUND_MS, BOUND * alone.p50_ms)
    rate = LOAD * alone.images_per_second
    length = max(seconds, min(1.1 * FEWEST_FOR_P99 / rate, 10 * seconds))
    yield from _into(found, server(one, rate, bound_ms, length, seed))
    many = [prepare(model, repeated(example, batch), threads) for batch in OFFLINE_BATCHES if has_room(needed, batch)]
    yield from _into(found, offline(_most_images(many, seconds), seconds))


def _into(found: dict[str, ScenarioResult], running: Iterator[ScenarioResult]) -> Iterator[dict[str, ScenarioResult]]:
    for result in running:
        found[result.scenario] = result
        yield dict(found)


def _most_images(prepared: Sequence[Prepared], budget_s: float) -> Prepared:
    """Return the one that answers most images a second, tried in turns."""
    tried = latencies(prepared, calls=20, budget_s=budget_s)
    return prepared[int(np.argmax([one.images_per_second for one in tried]))]


def repeated(images: Tensor, count: int) -> Tensor:
    """Return a batch of `count` images, float (count, C, H, W), those of `images` over and over."""
    return images[torch.arange(count) % len(images)].contiguous()
