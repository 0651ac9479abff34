"""The profiler's panel and the map panel without a browser: conditions, scenarios, layers, verdicts, Stop, errors."""

import math
import re
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import profiles
import pytest
import toy

import workbench as wb
from workbench import plots
from workbench.panel import MapPanel, ProfilerPanel, measure, profiler, words
from workbench.panel.measure import Point, Prediction
from workbench.profiler import LayerTime, LayerTimes, Limits, Ratio
from workbench.profiler.maps import WinLoseMap
from workbench.profiler.roofline import Roofline
from workbench.profiler.verdicts import Verdict
from workbench.runtimes import RuntimeFailed
from workbench.surgery import clone

ROOFS = Roofline({"fp32": 100.0, "int8": 400.0}, {"L1": 200.0, "memory": 10.0}, 1, "made up", {})


@pytest.fixture(scope="module")
def model():
    return toy.model()


@pytest.fixture(scope="module")
def data():
    return toy.data(val=256)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Measure shortly: roofs are made up, scenarios take a moment, and verdicts follow from no measurement."""
    monkeypatch.setattr(profiler, "SECONDS", 0.05)
    monkeypatch.setattr(profiler, "LAYER_CALLS", 10)
    monkeypatch.setattr(measure, "CALLS", 20)
    monkeypatch.setattr(profiler, "growing_roofline", lambda threads, device: iter([ROOFS]))
    monkeypatch.setattr(profiler, "limits", lambda *args: None)
    said = lambda layer: Verdict(layer.name, "memory-bound", f"{layer.name} moves many bytes.", "Store fewer.")
    monkeypatch.setattr(profiler, "layer_verdicts", lambda model, x, times, known: [said(one) for one in times.layers])


@pytest.fixture
def opened(model, data):
    made = []

    def open_one(technique=wb.LowRank, mine=model, **options):
        made.append(ProfilerPanel(technique, mine, data, runtime="eager", **options))
        assert made[-1].wait_idle()
        return made[-1]

    yield open_one
    for one in made:
        one.close()


def number(shown, tile):
    section = shown.tiles.html.split(f'data-tile="{tile}"')[1]
    return re.search(r'wb-number-shown">([\d.,]+)<', section)[1]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


# --- the panel -----------------------------------------------------------------------------------------------------


def test_everything_measured_is_on_the_page(opened):
    shown = opened()
    assert shown.state == "done" and shown.alert.html == ""
    assert float(number(shown, "latency")) > 0 and float(number(shown, "scenario").replace(",", "")) > 0
    look = shown.look(shown.point)
    assert look.times.total_ms > 0 and {p.name for p in look.points} > {"0.0"}
    assert "memory-bound" in shown.verdict_view.html and "Store fewer." in shown.verdict_view.html
    assert shown.verdict_view.html.count("<li>") == 4 and look.told()[0].layer == look.times.slowest(1)[0].name
    assert shown.words.html.count("wb-kind") == 1  # the verdict on the whole
    assert "outside layers" in shown.table.html and "data-sorts" in shown.table.html
    assert shown.header.html.startswith("<h3>Profiler: ")


def test_layers_and_what_is_outside_add_up_to_the_whole(opened):
    shown = opened()
    times = shown.look(shown.point).times
    bars = shown._layer_ms(times)
    assert list(bars) == [*shown._layers, "other", "outside layers"]
    assert sum(bars.values()) == pytest.approx(times.total_ms)


def test_slider_moves_the_layers_under_the_roofs(opened):
    shown = opened()
    marks = shown.figure.data[2]
    before = [*marks.x, *marks.y]
    shown.controls["rank"].value = 0.1
    assert shown.wait_idle()
    assert [*marks.x, *marks.y] != before and list(shown.figure.data[1].x) == [
        p.intensity for p in shown.look(shown.baseline).points
    ]
    roofs = [trace.name for trace in shown.figure.data if trace.name and "GB/s" in trace.name]
    assert len(roofs) == len(ROOFS.bandwidths)


def test_baseline_is_looked_into_once(opened, monkeypatch):
    taken, real = [], profiler.measure_layers
    monkeypatch.setattr(profiler, "measure_layers", lambda models, *rest: taken.extend(models) or real(models, *rest))
    shown = opened()
    shown.controls["rank"].value = 0.1
    assert shown.wait_idle()
    assert len(taken) == 3 and taken.count(shown.model) == 1


def test_batch_and_threads_are_conditions_of_their_own(opened):
    shown = opened(batch=4)
    assert shown.place == "eager" and shown.batch.disabled  # a query of single stream is one image
    first = shown.point.timings["eager"]
    shown.scenario.value = "offline"
    assert shown.wait_idle()
    assert shown.place == "eager, batch 4" and not shown.batch.disabled
    assert shown.point.timings["eager, batch 4"].now.batch == 4 and shown.point.timings["eager"] is first
    assert "batch 4" in shown.tiles.html and "offline" in shown.tiles.html


def test_server_says_whether_its_bound_was_kept(opened):
    shown = opened(scenario="server")
    result = shown.look(shown.point).results["server"]
    alone = shown.look(shown.baseline).results["single stream"]
    assert result.offered_per_second == pytest.approx(0.8 * alone.images_per_second)
    assert result.bound_ms >= 10 and "bound" in shown.tiles.html
    assert shown.look(shown.baseline).results["server"].offered_per_second == result.offered_per_second


def test_a_scenario_on_a_busy_machine_is_called_noisy():
    quiet = profiles.scenarios()["server"]
    loud = replace(quiet, busy=0.5, service_ms=np.ones(8))
    assert "noisy" not in words.scenario_tile("server", quiet, quiet, None)
    assert "queries, noisy" in words.scenario_tile("server", loud, quiet, None)
    assert re.search(r"baseline [\d,.]+, noisy · ", words.scenario_tile("server", quiet, loud, None))


def test_a_condition_seen_before_is_not_measured_again(opened):
    shown = opened()
    count, result = shown.measurements, shown.look(shown.point).results["single stream"]
    shown.scenario.value = "multi stream"
    shown.wait_idle()
    shown.scenario.value = "single stream"
    shown.wait_idle()
    assert shown.measurements == count + 1 and shown.look(shown.point).results["single stream"] is result


def test_stop_does_not_wait_and_what_was_interrupted_is_done_again(opened, monkeypatch):
    shown = opened()
    monkeypatch.setattr(profiler, "SECONDS", 30.0)
    shown.scenario.value = "multi stream"
    wait_for(lambda: "multi stream" in shown.look(shown.baseline).results)
    shown.stop()
    assert shown.state == "stopped"
    assert shown.wait_idle() and "multi stream" not in shown.look(shown.baseline).finished
    monkeypatch.setattr(profiler, "SECONDS", 0.05)
    shown.controls["rank"].value = 0.2
    assert shown.wait_idle() and shown.state == "done"
    assert "multi stream" in shown.look(shown.point).finished


def test_stop_and_newer_settings_break_off_the_timing_of_layers(opened, monkeypatch):
    closed, real = [], profiler.measure_layers

    def endless(*args):
        *_, found = real(*args)
        try:
            while True:
                yield found
        finally:
            closed.append(args[0][0])

    shown = opened()
    monkeypatch.setattr(profiler, "measure_layers", endless)
    shown.controls["rank"].value = 0.2
    wait_for(lambda: shown.point.technique.rank == 0.2 and shown.look(shown.point).points)
    interrupted = shown.look(shown.point)
    shown.controls["rank"].value = 0.3
    wait_for(lambda: closed)
    wait_for(lambda: shown.point.technique.rank == 0.3 and shown.look(shown.point).points)
    shown.stop()
    assert shown.wait_idle(5) and len(closed) == 2 and shown.state == "stopped"
    assert interrupted.times is None and interrupted.verdicts is None and interrupted.points
    monkeypatch.setattr(profiler, "measure_layers", real)
    shown.controls["rank"].value = 0.2
    assert shown.wait_idle() and interrupted.times is not None


def test_learning_is_broken_off_at_any_step(model, data):
    example, known = data.example(), measure.Foresight(measure.LatencyModel("eager", 1, 1))
    running = measure.learn([measure.weigh("one", None, model, example, measure.layer_names(model))], known, example)
    steps = [next(running) for _ in range(5)]
    running.close()
    assert steps == [measure.LEARN_REST, None, None, None, None] and not known.learnt


def test_the_whole_is_judged_by_what_the_layers_showed(opened, monkeypatch):
    starting = Limits(ROOFS, {"ReLU": 1000.0}, "eager", 1)
    monkeypatch.setattr(profiler, "limits", lambda *_: starting)
    module = sys.modules["workbench.profiler.verdicts"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "compare", lambda *_: Ratio(1.0, (0.9, 1.1)))
    shown = opened()
    shown.controls["rank"].value = 0.2
    assert shown.wait_idle()
    timing = shown.point.timings[shown.place]
    assert timing.known is starting and timing.layers == shown.look(shown.point).verdicts
    assert "launch-bound</b> It multiplies" in shown.words.html and "empty layers takes" in shown.words.html
    assert "see the verdicts of the profiler" not in shown.words.html


def test_a_runtime_that_shows_no_layers_says_so(opened, monkeypatch):
    def refuse(*args):
        raise RuntimeFailed("The runtime eager does not show its layers; choose openvino.")

    monkeypatch.setattr(profiler, "measure_layers", refuse)
    shown = opened()
    assert shown.state == "done" and "choose openvino" in shown.verdict_view.html


def test_a_model_that_fails_is_one_sentence_and_the_panel_lives_on(opened, monkeypatch):
    shown, real = opened(), measure.time_point

    def fail(*args):
        raise RuntimeFailed("The model fails on an input of shape (1, 1, 16, 16): no.")
        yield

    monkeypatch.setattr(measure, "time_point", fail)
    shown.controls["rank"].value = 0.2
    assert shown.wait_idle() and shown.state == "failed" and "fails on an input" in shown.alert.html
    monkeypatch.setattr(measure, "time_point", real)
    shown.controls["rank"].value = 0.3
    assert shown.wait_idle() and shown.state == "done" and shown.alert.html == ""


@pytest.mark.parametrize("wrong", [{"scenario": "race"}, {"threads": 0}, {"threads": 4096}])
def test_conditions_that_cannot_be_are_refused(model, data, wrong):
    with pytest.raises(ValueError, match=r"race|threads is"):
        ProfilerPanel(wb.LowRank, model, data, **wrong)


def test_page_that_opened_meanwhile_is_sent_everything(opened):
    shown, sent = opened(), []
    shown.figure.observe(lambda change: sent.append(change["new"]), "_py2js_update")
    shown.header.opened = 1.0
    assert sent[0]["style_data"]["x"][2] == [p.intensity for p in shown.look(shown.point).points]
    assert len(sent[0]["layout_data"]["annotations"]) == 3 + len(ROOFS.peaks)


def test_figure_always_has_the_same_traces():
    empty, full = plots.profiler_figure(["conv", "fc"]), plots.profiler_figure(["conv", "fc"], roofline=ROOFS)
    assert [trace.type for trace in empty.data] == [trace.type for trace in full.data]
    assert plots.summary(full).endswith(".")


def test_a_layer_too_quick_for_the_clock_has_a_row():
    quick = LayerTime("fold", "Reorder", 0.0, 0.0, 0, 0, 64, "fp32", "reorder_f32")
    times = LayerTimes((quick,), 0.5, 0.5, "openvino", "fp32", 1, 1, False)
    table = words.layer_times_table(times, None, [])
    assert "<td>0.0000</td>" in table and "<td>100.0</td>" in table and words.layer_times_table(None, None, []) == ""


def test_roofs_that_were_interrupted_are_measured_again(opened, monkeypatch):
    taken = []
    monkeypatch.setattr(profiler, "growing_roofline", lambda threads, device: taken.append(threads) or iter([ROOFS]))
    shown = opened()
    shown._whole_roofs.clear()  # as after Stop
    shown.controls["rank"].value = 0.3
    assert shown.wait_idle() and taken == [1, 1] and shown._whole_roofs == {1}


# --- predicted, then measured --------------------------------------------------------------------------------------


def test_a_prediction_is_marked_as_one():
    point = Point("half", None, None, 1, 1, 1, {}, {}, {})
    point.predicted["eager"] = Prediction(0.25)
    tile = words.latency_tile("latency", "latency", "eager", point, None)
    assert "0.250" in tile and "wb-predicted" in tile and "off" not in tile


def test_prediction_stands_until_the_measurement_and_then_beside_it(opened, model, monkeypatch):
    shown, seen = opened(mine=clone(model)), []
    assert shown.point.predicted == {}  # nothing was learnt before the first measurement
    real = measure.time_point
    monkeypatch.setattr(measure, "time_point", lambda *args: seen.append(shown.tiles.html) or real(*args))
    shown.controls["rank"].value = 0.2
    assert shown.wait_idle()
    guess = shown.point.predicted["eager"]
    assert "wb-predicted" in seen[0] and f"{guess.ms:.3f}" in seen[0]
    assert guess.error == pytest.approx(abs(guess.ms / shown.point.timings["eager"].now.median_ms - 1))
    assert "wb-predicted" not in shown.tiles.html and f"{100 * guess.error:.0f} % off" in shown.tiles.html


def test_predictions_learn_from_few_models_and_each_once(model, data):
    example = data.example()
    points = [measure.weigh(str(i), None, model, example, measure.layer_names(model)) for i in range(7)]
    known = measure.Foresight(measure.LatencyModel("eager", 1, 1))
    for _ in range(2):
        assert {*measure.learn(points, known, example)} <= {measure.LEARN_REST, None}
    assert known.full and len(known.learnt) == measure.MOST_LEARNT
    assert [one.title for one in known.learnt] == ["0", "1", "2", "3", "4"]


def test_a_runtime_without_layers_predicts_nothing(model, data, monkeypatch):
    def refuse(*args):
        raise RuntimeFailed("It does not show its layers.")

    monkeypatch.setattr(measure, "measure_layers", refuse)
    known = measure.Foresight(measure.LatencyModel("eager", 1, 1))
    point = measure.weigh("one", None, model, data.example(), measure.layer_names(model))
    assert list(measure.learn([point], known, data.example())) == [measure.LEARN_REST]
    measure.predict(point, known, "eager", data.example())
    assert point.predicted == {}


# --- maps ----------------------------------------------------------------------------------------------------------


def growing(cells=4, gate=None, fails=False):
    """Yield a map of one row that fills cell by cell; wait for `gate` after the second."""
    ratio = np.full((1, cells), math.nan)
    for i in range(cells):
        if fails and i == 1:
            raise RuntimeFailed("This torch multiplies no sparse matrix.")
        if gate and i == 2:
            gate.wait(5)
        ratio[0, i] = 2.0
        yield WinLoseMap("Zeros", "batch", tuple(range(cells)), "zeros", (0.5,), ratio.copy(), ratio, ratio, "made up")


@pytest.fixture
def mapped():
    made = []

    def open_one(**options):
        made.append(MapPanel(**options))
        return made[-1]

    yield open_one
    for one in made:
        one.close()


def test_map_is_measured_when_asked_for(mapped):
    shown = mapped(maps={"zeros": growing, "others": growing})
    assert shown.shown is None and "press Measure" in shown.status.html and shown.plot.outputs == ()
    shown.measure_button.click()
    assert shown.wait_idle(10) and shown.state == "done"
    assert "4 of 4 cells" in shown.status.html and len(shown.plot.outputs) == 2
    assert shown.caption.html.startswith("made up 4 of 4 cells: ▲ faster") and shown.caption in shown.children
    shown.choice.value = "others"
    assert shown.plot.outputs == ()
    shown.choice.value = "zeros"
    assert len(shown.plot.outputs) == 2


def test_stopped_map_keeps_its_cells(mapped):
    gate = threading.Event()
    shown = mapped(maps={"zeros": lambda: growing(gate=gate)})
    shown.measure()
    wait_for(lambda: shown.shown is not None and np.isfinite(shown.shown.ratio).sum() == 2)
    shown.stop()
    gate.set()
    assert shown.wait_idle(10) and shown.state == "stopped"
    assert np.isfinite(shown.shown.ratio).sum() <= 3 and len(shown.plot.outputs) == 2


def test_map_that_fails_says_why(mapped):
    shown = mapped(maps={"zeros": lambda: growing(fails=True)})
    shown.measure()
    assert shown.wait_idle(10) and shown.state == "failed"
    assert "no sparse matrix" in shown.status.html and not shown.measure_button.disabled
