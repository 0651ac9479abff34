import gc
import json
import math
import sys

import numpy as np
import pytest
import torch
from test_profiler import Pretended
from test_runtimes import images, quantized, vgg
from torch import nn

from workbench.profiler import (
    SCENARIOS,
    ClockJumped,
    Latency,
    ScenarioResult,
    SweepPoint,
    knee,
    multi_stream,
    offline,
    repeated,
    room,
    scenarios,
    server,
    single_stream,
    sweep_batches,
)
from workbench.runtimes import RuntimeFailed, runtime

MODULE = sys.modules["workbench.profiler.scenarios"]  # whose name the function of that name hides
TICK = 1e-6  # what a look at the pretended clock takes, so that waiting for a moment ends


class PretendedTime:
    """A clock that moves when a model runs, when one sleeps, and a little whenever it is read.

    Only while one sleeps, and in what `others` say, the processor is not this process's.
    """

    def __init__(self):
        self.now, self.away = 100.0, 0.0

    def perf_counter(self):
        self.now += TICK
        return self.now

    def process_time(self):
        return self.now - self.away

    def sleep(self, seconds):
        self.others(seconds)

    def others(self, seconds):
        self.now += seconds
        self.away += seconds


class Steady(Pretended):
    """A model whose every call takes the same time on a pretended clock; in it others may take the processor."""

    def __init__(self, clock, service_ms, batch=1, others_ms=0.0, later=1.0, for_s=math.inf):
        super().__init__()
        self.clock, self.service_ms, self.batch = clock, service_ms, batch
        self.others_ms, self.later, self.begun, self.for_s = others_ms, later, clock and clock.now, for_s

    def run(self):
        slower = self.later if 1 < self.clock.now - self.begun < 1 + self.for_s else 1.0
        self.clock.now += slower * self.service_ms / 1000
        self.clock.others(self.others_ms / 1000)


@pytest.fixture
def clock(monkeypatch):
    pretended = PretendedTime()
    monkeypatch.setattr(MODULE, "time", pretended)
    return pretended


def last(running):
    for result in running:  # noqa: B007
        pass
    return result


def result(latencies_ms, **more):
    figures = {"seconds": 1.0, "images": len(latencies_ms)} | more
    return ScenarioResult("server", "eager", "fp32", 1, 1, np.asarray(latencies_ms, float), **figures)


def test_percentiles_wait_until_there_are_enough_queries():
    few, some, many = (result(np.arange(1, count + 1)) for count in (99, 999, 1001))
    assert (few.p50_ms, few.p90_ms, few.p99_ms) == (50, None, None)
    assert some.p90_ms == pytest.approx(899.2) and some.p99_ms is None
    assert many.p99_ms == 991
    assert math.isnan(result([]).p50_ms) and "no query answered yet" in str(result([]))


def test_a_bound_is_kept_missed_or_not_known():
    many = np.arange(1, 1002)
    assert result(many, bound_ms=991.0).kept is True and result(many, bound_ms=990.0).kept is False
    assert result(many).kept is None and result(many[:500], bound_ms=1e9).kept is None
    assert "not known below 1,000 queries" in str(result(many[:500], bound_ms=5.0, offered_per_second=9.0))
    assert json.loads(json.dumps(result(many, bound_ms=991.0).to_dict()))["kept"] is True


def test_queries_one_after_another_take_what_the_model_takes(clock):
    found = last(single_stream(Steady(clock, 4.0), seconds=1.0))
    assert found.p50_ms == pytest.approx(4.0, abs=0.01)
    assert found.images_per_second == pytest.approx(250, rel=0.01)
    assert found.seconds == pytest.approx(1.0, abs=0.11)  # to the end of a block
    several = last(multi_stream(Steady(clock, 4.0, batch=8), seconds=1.0))
    assert several.images == 8 * several.queries and several.images_per_second == pytest.approx(2000, rel=0.01)
    assert last(offline(Steady(clock, 4.0, batch=8), seconds=0.5)).scenario == "offline"


def test_a_server_is_the_queue_of_theory(clock):
    # Poisson arrivals, equal service times, 80 % load: the mean wait is load / (2 (1 - load)) services (Khinchin).
    found = last(server(Steady(clock, 1.0), rate_per_second=800, bound_ms=20, seconds=40))
    assert found.latencies_ms.min() == pytest.approx(1.0, abs=0.02)
    assert found.latencies_ms.mean() == pytest.approx(1.0 + 0.8 / (2 * 0.2), rel=0.15)
    assert found.images_per_second == pytest.approx(800, rel=0.03)
    assert found.kept and found.p99_ms > 5 and found.waiting == 0


@pytest.mark.parametrize("start", [single_stream, lambda one, **how: server(one, 300, 50, **how)])
def test_a_scenario_is_noisy_where_the_machine_was_not_quiet(clock, start):
    quiet = last(start(Steady(clock, 2.0), seconds=2))
    assert quiet.busy == pytest.approx(1.0, abs=0.01) and not quiet.noisy  # what a server idles is no one else's work
    assert "noisy" not in str(quiet) and quiet.to_dict()["noisy"] is False
    shared = last(start(Steady(clock, 2.0, others_ms=0.5), seconds=2))
    assert shared.busy == pytest.approx(0.8, abs=0.01) and shared.noisy
    assert ", noisy" in str(shared) and shared.to_dict()["busy"] == shared.busy
    drifting = last(start(Steady(clock, 2.0, later=1.2), seconds=2))
    assert drifting.busy > 0.99 and drifting.noisy
    for_a_moment = last(start(Steady(clock, 2.0, later=1.5, for_s=0.3), seconds=2))
    assert for_a_moment.busy > 0.99 and for_a_moment.noisy


def test_waits_in_a_queue_do_not_make_a_server_noisy(clock):
    found = last(server(Steady(clock, 9.0), rate_per_second=100, bound_ms=200, seconds=3, seed=2))
    first, second = (np.median(half) for half in np.array_split(found.latencies_ms, 2))
    assert abs(first - second) > 0.1 * min(first, second) and not found.noisy
    assert found.service_ms == pytest.approx(np.full(found.images, 9.0), abs=0.01)


def test_a_server_s_load_is_what_its_queries_really_took(clock):
    found = last(server(Steady(clock, 2.0), rate_per_second=400, bound_ms=20, seconds=2))
    assert found.load == pytest.approx(0.8, rel=0.02) and found.to_dict()["load"] == found.load
    slower = last(server(Steady(clock, 2.0, later=1.5), rate_per_second=400, bound_ms=20, seconds=2))
    assert slower.load > 0.9
    assert last(single_stream(Steady(clock, 2.0), seconds=0.2)).load is None


def test_on_a_gpu_nobody_knows_who_else_computes(clock):
    one = Steady(clock, 2.0, others_ms=0.5)
    one.device = "cuda"
    found = last(single_stream(one, seconds=0.5))
    assert found.busy is None and not found.noisy


def test_latency_counts_from_the_arrival_whoever_is_before(clock):
    # By the recursion that defines the queue: an answer comes one service after the arrival or the last answer.
    found = last(server(Steady(clock, 3.0), rate_per_second=300, bound_ms=20, seconds=3, seed=4))
    arrivals, finished, expected = MODULE._poisson(300, 3, 4), 0.0, []
    for arrival in arrivals:
        finished = max(arrival, finished) + 0.003 + 3 * TICK
        expected.append(1000 * (finished - arrival))
    assert found.latencies_ms == pytest.approx(expected, rel=0.02, abs=0.02)


def test_arrivals_are_random_and_repeatable():
    arrivals = MODULE._poisson(1000, 20, 0)
    between = np.diff(arrivals)
    assert len(arrivals) / 20 == pytest.approx(1000, rel=0.05)
    assert between.std() / between.mean() == pytest.approx(1.0, rel=0.05)  # exponential, not evenly spaced
    assert np.array_equal(arrivals, MODULE._poisson(1000, 20, 0))
    assert not np.array_equal(arrivals[:9], MODULE._poisson(1000, 20, 1)[:9])


def test_the_clock_of_the_queue_stands_still_while_the_caller_draws(clock):
    results = []
    for pause_s in (0.0, 7.0):
        for found in server(Steady(clock, 2.0), rate_per_second=300, bound_ms=20, seconds=2):
            clock.now += pause_s
            latest = found
        results.append(latest)
    assert results[1].latencies_ms == pytest.approx(results[0].latencies_ms, abs=0.1)
    assert results[1].seconds == pytest.approx(results[0].seconds, abs=0.01)


def test_an_overloaded_server_ends_and_counts_those_who_still_wait(clock):
    found = last(server(Steady(clock, 10.0), rate_per_second=1000, bound_ms=50, seconds=2))
    assert found.kept is False and found.seconds < 4.2
    assert found.images_per_second == pytest.approx(100, rel=0.02)
    assert found.images + found.waiting == found.queries and found.waiting > 1000
    assert found.p99_ms > 2000 and "still waiting" in str(found)


@pytest.mark.parametrize(
    "running, message",
    [
        (lambda one: server(one, 0, 5), "above 0, not 0 queries a second"),
        (lambda one: server(one, 10, -1), "and -1 ms"),
        (lambda one: server(Steady(None, 1, batch=8), 10, 5), "In server a query is one image"),
        (lambda one: server(one, 10, 5, seconds=0), "more than 0, not 0"),
        (lambda one: scenarios(vgg(), images(), "eager", seconds=0), "more than 0, not 0"),
        (lambda one: single_stream(Steady(None, 1, batch=8)), "prepare a batch of 1, not of 8"),
    ],
)
def test_wrong_scenarios_are_named(running, message):
    with pytest.raises(ValueError, match=message):
        next(running(Steady(None, 1.0)))


def test_a_clock_that_goes_back_is_refused(clock):
    class Jumping(Steady):
        def run(self):
            self.clock.now -= 5.0

    with pytest.raises(ClockJumped, match="measure again"):
        next(multi_stream(Jumping(clock, 1.0)))


def test_a_scenario_can_be_stopped_anywhere():
    before = torch.get_num_threads()
    one = runtime("eager").prepare(vgg(), images(), threads=before + 1)
    for start in (lambda: single_stream(one), lambda: server(one, 100, 50)):
        running = start()
        next(running)
        assert torch.get_num_threads() == before and gc.isenabled()
        running.close()
    assert torch.get_num_threads() == before and gc.isenabled()


def test_all_scenarios_run_in_the_expected_order():
    def ordered():
        found = last(scenarios(vgg(32), images(4), seconds=0.3, bound_ms=100.0))
        assert tuple(found) == SCENARIOS
        alone, several, served, bulk = found.values()
        assert (alone.batch, several.batch, served.batch) == (1, 8, 1)
        assert served.offered_per_second == pytest.approx(0.8 * alone.images_per_second)
        enough = bulk.images_per_second > 0.9 * alone.images_per_second > served.images_per_second
        return enough and served.p50_ms > alone.p50_ms and several.p50_ms > alone.p50_ms

    assert any(ordered() for _ in range(4))  # they are timed one after the other, so the machine must hold still


def test_offline_leaves_out_batches_that_have_no_room(monkeypatch):
    free_for(20, monkeypatch)
    tried = []
    monkeypatch.setattr(MODULE, "_most_images", lambda prepared, _: tried.extend(prepared) or prepared[-1])
    found = last(scenarios(nn.Flatten(), images(), "eager", seconds=0.01, bound_ms=100.0))
    assert [one.batch for one in tried] == [1, 8] and found["offline"].batch == 8
    free_for(9, monkeypatch)
    with pytest.raises(RuntimeFailed, match="A batch of 8 would take about"):
        next(scenarios(nn.Flatten(), images(), "eager", seconds=0.01))


def free_for(count, monkeypatch):
    """Pretend that memory is free for inputs of so many images and nothing else."""
    monkeypatch.setattr(room, "free_bytes", lambda: count * images().nbytes)


def test_int8_answers_more_in_every_scenario():
    model = vgg(64)

    def more():
        fp32, int8 = (last(scenarios(one, images(), seconds=0.2)) for one in (model, quantized(model)))
        return all(int8[name].images_per_second > fp32[name].images_per_second for name in SCENARIOS)

    assert any(more() for _ in range(4))


def test_a_batch_repeats_the_images_there_are():
    assert torch.equal(repeated(images(2), 5), images(2)[[0, 1, 0, 1, 0]])


def point(batch, median_ms, threads=1):
    return SweepPoint(batch, threads, Latency(((median_ms,),), "eager", "fp32", batch, threads, run=1))


def test_the_knee_is_the_quickest_that_reaches_nine_tenths():
    curve = [point(1, 1.0), point(2, 1.2), point(4, 1.6), point(8, 2.9), point(16, 5.7)]  # 1000 … 2500, 2759, 2807 a s
    assert knee(curve).batch == 8
    assert knee(curve[:2]).batch == 2
    assert knee([*curve, point(4, 1.4, threads=2)]).threads == 2
    assert knee(curve[:1]).batch == 1
    with pytest.raises(ValueError, match="run the sweep to its end"):
        knee([])


def test_a_sweep_grows_to_every_batch_on_every_number_of_threads():
    seen = [len(points) for points in sweep_batches(vgg(), images, "eager", (1, 4), (1, 2), calls=6)]
    assert seen[:4] == [0] * 4 and seen == sorted(seen) and seen[-1] == 4
    points = last(sweep_batches(vgg(), images, "eager", (1, 16), calls=6))
    assert [one.batch for one in points] == [1, 16]
    assert points[1].latency.median_ms > points[0].latency.median_ms
    assert points[1].images_per_second == points[1].latency.images_per_second


def test_a_sweep_leaves_out_batches_that_have_no_room(monkeypatch):
    free_for(20, monkeypatch)
    assert [one.batch for one in last(sweep_batches(nn.Flatten(), images, "eager", calls=6))] == [1, 2, 4, 8]
    free_for(1, monkeypatch)
    with pytest.raises(RuntimeFailed, match="A batch of 1 would take about"):
        next(sweep_batches(nn.Flatten(), images, "eager"))


def test_a_sweep_names_the_batch_that_cannot_be_prepared():
    with pytest.raises(RuntimeFailed, match="at least one thread and one image"):
        last(sweep_batches(vgg(), images, "eager", (1, 0)))
