"""Put the profiler to the test on this machine: `python scripts/bench_profiler.py` prints what held, else fails.

On glyphs-cnn and five models of torchvision: ten repeated medians within 5 % of their middle, or called noisy;
agreement with `torch.utils.benchmark` within 5 %, timed in turns; at most 2 % more time for timed calls than for the
same calls by themselves. On glyphs-cnn in fp32 and int8: the order of the scenarios, and the server's bound, which
most of three runs must keep; runs on a machine that lost or gained speed, so that they were not offered 80 %, are told
and do not count. A machine that does other work meanwhile misses some of these, so the last line tells its load.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import benchmark

import workbench as wb
from workbench.profiler import ScenarioResult, environment, latency, scenarios
from workbench.profiler.timing import undisturbed
from workbench.runtimes import Prepared, runtime

SERVER_RUNS, MOST_RUNS = 3, 20  # each with other arrivals
LOADS = 0.72, 0.88  # of capacity: a run that was offered less or more, since the machine changed, is not one at 80 %
MODELS = ("glyphs-cnn", "resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0", "squeezenet1_1", "mnasnet0_5")
REPEATS, FEWEST_ALIKE = 10, 9
ALIKE, OVERHEAD = 0.05, 0.02
PAIRS_S, LONGEST_S, FEWEST_PAIRS = 4.0, 20.0, 30  # of calls in turns; the longest where few are undisturbed
DISTURBED = "not known: other processes had the processor in every turn"
ALONE = 0.97  # processor time by wall time: below it another process had the processor meanwhile
SHORTEST_MS = 4.0  # of the calls that make one half of a pair: far above what one look at the clock takes


@dataclass(frozen=True)
class Finding:
    """One claim, what was found, and whether it held."""

    model: str
    claim: str
    found: str
    held: bool

    def __str__(self) -> str:
        return f"{'held' if self.held else 'MISSED':<8}{self.model:<20}{self.claim:<32}{self.found}"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", action="append", choices=MODELS, help="only this one; may be repeated")
    options.add_argument("--runtime", default="openvino", help="default: openvino")
    options.add_argument("--calls", type=int, default=100, help="calls of one of the repeated runs")
    options.add_argument("--json", type=Path, help="write the findings to this file too")
    chosen = options.parse_args()
    found = []
    for finding in findings(chosen.model or MODELS, chosen.runtime, chosen.calls):
        found.append(finding)
        print(finding, flush=True)
    place = environment()
    print(f"\nOn {place}; load {place.load}.")
    if chosen.json:
        held = {"environment": place.to_dict(), "findings": [asdict(one) for one in found]}
        chosen.json.write_text(json.dumps(held, indent=1) + "\n")
    sys.exit(not all(finding.held for finding in found))


def findings(names, runtime_name: str, calls: int) -> Iterator[Finding]:
    """Yield what was found of each model, one claim after another."""
    for name in names:
        prepared = runtime(runtime_name).prepare(*subject(name))
        yield repeated_medians(name, prepared, calls)
        ratio = agreement(prepared)
        words = DISTURBED if math.isnan(ratio) else f"{ratio:.3f} of theirs"
        yield Finding(name, "agrees with torch's benchmark", words, abs(ratio - 1) <= ALIKE)
        more = overhead(prepared)
        words = DISTURBED if math.isnan(more) else f"{100 * more:+.2f} % of the time"
        yield Finding(name, "timing costs little", words, more <= OVERHEAD)
    if "glyphs-cnn" in names:
        yield from scenario_order(runtime_name)


def subject(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a model and one image for it."""
    if name in wb.MODELS:
        return wb.load_model(name), wb.load_data("glyphs").example(1)
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.get_model(name).eval(), torch.randn(1, 3, 224, 224)


def repeated_medians(name: str, prepared: Prepared, calls: int) -> Finding:
    """Measure ten times, and count the medians that are near their middle or were called noisy."""
    runs = [latency(prepared, calls) for _ in range(REPEATS)]
    middle = statistics.median(run.median_ms for run in runs)
    near = [abs(run.median_ms - middle) <= ALIKE * middle for run in runs]
    noisy = sum(run.noisy for run, close in zip(runs, near, strict=True) if not close)
    words = f"{sum(near)} of {REPEATS} near {middle:.3g} ms, {noisy} of the others called noisy"
    return Finding(name, "repeats itself", words, sum(near) + noisy >= FEWEST_ALIKE)


def agreement(prepared: Prepared) -> float:
    """Return the median of our time by that of `torch.utils.benchmark` over single calls taken in turns.

    Turns in which another process had the processor do not count; NaN if that were all. The clock is named, since
    torch's own default also waits for accelerators, and does so within the time that it takes.
    """
    names, clock = {"run": prepared.run}, time.perf_counter
    timer = benchmark.Timer("run()", globals=names, num_threads=prepared.threads, timer=clock)
    third = lambda: [prepared.timed() for _ in range(3)][-1]  # theirs makes two calls first that are not counted
    theirs, ours = _in_turns(prepared, lambda: timer.timeit(1), third)
    ratios = [own / (1000 * other.median) for own, other in zip(ours, theirs, strict=True)]
    return statistics.median(ratios or [math.nan])


def overhead(prepared: Prepared) -> float:
    """Return how much longer timed calls take than the same by themselves, as a part; NaN if all were disturbed."""
    count = max(1, round(SHORTEST_MS / latency(prepared, 10).median_ms))
    timed, plain = _in_turns(prepared, lambda: _spent(prepared.timed, count), lambda: _spent(prepared.run, count))
    return statistics.median([t / p for t, p in zip(timed, plain, strict=True)] or [math.nan]) - 1


def _in_turns(prepared: Prepared, first: Callable, second: Callable) -> tuple[list, list]:
    """Call both in turns, and return what each gave in those turns in which no other process had the processor."""
    found, start = ([], []), time.perf_counter()
    while time.perf_counter() - start < (PAIRS_S if len(found[0]) >= FEWEST_PAIRS else LONGEST_S):
        with undisturbed(prepared.threads):
            prepared.run()
            one, alone = _watched(first)
            prepared.run()
            other, too = _watched(second)
        if alone and too:
            found[0].append(one)
            found[1].append(other)
    return found


def _watched(act: Callable) -> tuple[Any, bool]:
    """Return what `act` gives, and whether this process had a processor all the while."""
    processor, wall = time.process_time(), time.perf_counter()
    result = act()
    wall = time.perf_counter() - wall
    return result, time.process_time() - processor > ALONE * wall


def _spent(act: Callable, count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        act()
    return time.perf_counter() - start


def scenario_order(runtime_name: str) -> Iterator[Finding]:
    """Yield whether the scenarios of glyphs-cnn stand in the expected order, in fp32 and int8."""
    model, data = wb.load_model("glyphs-cnn"), wb.load_data("glyphs")
    models = {"fp32": model, "int8": wb.Quantization(weight_bits=8).compress(model, data)}
    found = {}
    for precision, one in models.items():
        runs = []
        while sum(map(_as_meant, runs)) < SERVER_RUNS and len(runs) < MOST_RUNS:
            runs.append(_last(scenarios(one, data.example(64), runtime_name, seed=len(runs))))
        meant = [run for run in runs if _as_meant(run)]
        found[precision] = (meant or runs)[-1]
        yield from _ordered(f"glyphs-cnn {precision}", found[precision])
        yield _bound_kept(f"glyphs-cnn {precision}", [run["server"] for run in meant], len(runs) - len(meant))
    rates = {name: [found[p][name].images_per_second for p in models] for name in found["fp32"]}
    words = ", ".join(f"{name} {int8 / fp32:.2f}×" for name, (fp32, int8) in rates.items())
    yield Finding("glyphs-cnn", "int8 answers more", words, all(int8 > fp32 for fp32, int8 in rates.values()))


def _ordered(name: str, found: dict) -> Iterator[Finding]:
    alone, served, bulk = (found[scenario] for scenario in ("single stream", "server", "offline"))
    rates = [round(one.images_per_second) for one in (bulk, alone, served)]
    words = "offline {:,}, single stream {:,}, server {:,} images/s".format(*rates)
    yield Finding(name, "order of throughput", words, rates == sorted(rates, reverse=True))
    words = f"median alone {alone.p50_ms:.3g} ms, served {served.p50_ms:.3g} ms"
    yield Finding(name, "waiting in a queue takes time", words, alone.p50_ms < served.p50_ms)


def _as_meant(found: dict[str, ScenarioResult]) -> bool:
    """Return whether the machine was steady while it served, and as quick as when its capacity was measured."""
    alone, served = found["single stream"], found["server"]
    return not (alone.noisy or served.noisy) and LOADS[0] <= served.load <= LOADS[1]


def _bound_kept(name: str, served: list[ScenarioResult], unsteady: int) -> Finding:
    """Return whether most runs at 80 % of capacity kept their bound: a machine that stands still breaks one of them."""
    tails = ", ".join(f"{one.p99_ms or float('nan'):.3g} ms at {one.load:.0%}" for one in served)
    bounds = ", ".join(f"{one.bound_ms:.3g}" for one in served)
    kept = sum(one.kept is True for one in served)
    words = f"in {kept} of {len(served)} runs: p99 {tails} of capacity, bounds {bounds} ms"
    words += f"; in {unsteady} more the machine was not steady" if unsteady else ""
    return Finding(name, "server keeps its bound", words, len(served) >= SERVER_RUNS and kept > len(served) / 2)


def _last(running: Iterator[dict[str, ScenarioResult]]) -> dict[str, ScenarioResult]:
    *_, found = running
    return found


if __name__ == "__main__":
    main()
