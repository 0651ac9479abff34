"""The panel without a browser: controls are moved, the worker is awaited, and what the page would show is read."""

import gc
import itertools
import re
import threading
import time
import weakref
from dataclasses import dataclass
from typing import ClassVar

import plotly.graph_objects as go
import pytest
import torch
import toy

import workbench as wb
from workbench.panel import board, panel
from workbench.panel.board import is_usual
from workbench.panel.figure import Figure
from workbench.panel.worker import Worker
from workbench.surgery import clone
from workbench.technique import Technique, setting


@pytest.fixture(scope="module")
def model():
    return toy.model()


@pytest.fixture(scope="module")
def data():
    return toy.data()


@pytest.fixture
def opened(model, data):
    """Return a function that opens a panel; every panel is closed at the end."""
    made = []

    def open_one(technique=wb.LowRank, mine=model, images=data, **options):
        made.append(panel(technique, mine, images, records=[], runtime="eager", **options))
        assert made[-1].wait_idle()
        return made[-1]

    yield open_one
    for one in made:
        one.close()


def trace(shown, name):
    return shown.drawing._traces[name]


def number(shown, tile):
    """Return the large number of a tile."""
    section = shown.tiles.html.split(f'data-tile="{tile}"')[1]
    return re.search(r'wb-number-shown">([\d.,]+)<', section)[1]


# --- one setting ---------------------------------------------------------------------------------------------------


def test_slider_changes_tiles_figure_and_words(opened):
    shown = opened()
    before = number(shown, "size")
    shown.controls["rank"].value = 0.2
    assert shown.wait_idle()
    assert shown.state == "done"
    exact = wb.ledger(wb.LowRank(rank=0.2).compress(shown.model)).total_bytes
    assert number(shown, "size") == f"{exact / 1000:,.1f}" != before
    assert number(shown, "accuracy") == f"{shown.point.accuracy.percent:.1f}"
    assert list(trace(shown, "tradeoff-now").x) == [exact]
    assert sum(trace(shown, "bytes-now").x) == exact
    assert len(trace(shown, "latency-now").x) > 0
    assert "rank 0.2" in shown.words.html and "eager" in shown.tiles.html
    assert f"{exact:,}" in shown.table.html


def test_accuracy_is_that_of_evaluate(opened, data):
    shown = opened()
    assert shown.point.accuracy == wb.evaluate(shown.point.model, data.val)


def test_model_is_not_touched(opened, model):
    before = [p.clone() for p in model.parameters()]
    opened().controls["rank"].value = 0.1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_callback_leaves_the_work_to_others(opened):
    shown = opened()
    times = []
    for value in (0.2, 0.3, 0.4, 0.5, 0.6):
        start = time.perf_counter()
        shown.controls["rank"].value = value
        returned = time.perf_counter()
        assert shown.wait_idle()
        times.append((returned - start) / (time.perf_counter() - start))
    assert sorted(times)[2] < 0.1


def test_drag_measures_at_most_twice_and_shows_the_last_value(opened):
    shown = opened()
    before = shown.measurements
    for i in range(50):
        shown.controls["rank"].value = round(0.05 + 0.015 * i, 3)
        time.sleep(0.004)
    assert shown.wait_idle()
    assert shown.measurements - before <= 2
    assert shown.point.technique.rank == pytest.approx(0.785)


def test_a_setting_seen_before_is_not_measured_again(opened):
    shown = opened()
    shown.controls["rank"].value = 0.2
    shown.wait_idle()
    first, count = shown.point, shown.measurements
    shown.controls["rank"].value = 0.4
    shown.wait_idle()
    shown.controls["rank"].value = 0.2
    shown.wait_idle()
    assert shown.point is first and shown.measurements == count + 1


def test_number_box_takes_values_between_the_steps(opened):
    shown = opened()
    shown.controls["rank"].value = 0.333
    shown.wait_idle()
    assert shown.point.technique.rank == 0.333


def test_equal_models_are_not_distinguishable(opened):
    shown = opened()
    shown.controls["rank"].value = 1.0
    shown.wait_idle()
    assert "≈ not distinguishable" in shown.tiles.html
    assert "points more" not in shown.tiles.html


# --- stop, errors, late results ------------------------------------------------------------------------------------


def test_stop_does_not_wait_and_keeps_what_is_known(opened, model):
    shown = opened(images=toy.data(val=40_000))
    shown.controls["rank"].value = 0.3
    wait_for(lambda: shown.state == "measuring" and shown.point.accuracy)
    shown.stop()
    assert shown.state == "stopped" and "stopped" in shown.status.html
    assert shown.wait_idle()
    assert shown.state == "stopped" and not shown.point.exact
    assert "so far" in shown.tiles.html


def test_newer_setting_stops_the_older_one(opened):
    shown = opened(images=toy.data(val=40_000))
    shown.controls["rank"].value = 0.3
    wait_for(lambda: shown.state == "measuring" and shown.point.accuracy and shown.point.technique.rank == 0.3)
    old = shown.point
    shown.controls["rank"].value = 0.6
    assert shown.wait_idle(120)
    assert not old.exact and shown.point.technique.rank == 0.6 and shown.point.exact


@dataclass(frozen=True)
class Breaking(Technique):
    """Fails above a half."""

    amount: float = setting(0.0, low=0.0, high=1.0, step=0.1, neutral=0.0)
    kind: str = setting("plain", choices=("plain", "other"))

    def compress(self, model, data=None, watch=None):
        if self.amount > 0.5:
            raise ValueError("Layer 'conv1' holds NaN; train the model again first.")
        if self.kind == "other":
            raise KeyError("conv9")
        return clone(model)


def test_error_is_one_sentence_and_the_panel_lives_on(opened):
    shown = opened(Breaking)
    shown.controls["amount"].value = 0.8
    shown.wait_idle()
    assert "Layer &#x27;conv1&#x27; holds NaN" in shown.alert.html and shown.alert.role == "alert"
    assert shown.state == "failed"
    shown.controls["amount"].value = 0.2
    shown.wait_idle()
    assert shown.alert.html == "" and shown.state == "done"
    shown.controls["kind"].value = "other"
    shown.wait_idle()
    assert "KeyError" in shown.alert.html


def test_worker_drops_what_became_old():
    seen, errors, gate = [], [], threading.Event()
    worker = Worker(errors.append)

    def job(name):
        def steps(stale):
            seen.append(name)
            yield
            gate.wait(5)
            yield
            seen.append(name + " late")

        return steps

    worker.submit(job("first"))
    wait_for(lambda: seen)
    worker.submit(job("second"))
    worker.submit(job("third"))
    gate.set()
    assert worker.wait_idle(10)
    worker.close()
    assert seen == ["first", "third", "third late"] and not errors


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


# --- undo, presets, pin, address -----------------------------------------------------------------------------------


def test_undo_and_redo(opened):
    shown = opened()
    for value in (0.2, 0.4):
        shown.controls["rank"].value = value
        shown.wait_idle()
    shown.undo()
    shown.wait_idle()
    assert shown.values["rank"] == 0.2 and not shown.redo_button.disabled
    shown.undo()
    shown.wait_idle()
    assert shown.values["rank"] == 0.5 and shown.undo_button.disabled
    shown.redo()
    shown.wait_idle()
    assert shown.values["rank"] == 0.2
    shown.controls["rank"].value = 0.9
    shown.wait_idle()
    assert shown.redo_button.disabled


def test_drag_is_one_step_of_undo(opened):
    shown = opened()
    for i in range(20):
        shown.controls["rank"].value = 0.1 + 0.01 * i
    shown.wait_idle()
    shown.undo()
    shown.wait_idle()
    assert shown.values["rank"] == 0.5


def test_presets_reach_both_ends(opened):
    shown = opened()
    for name, rank in (("strongest", 0.05), ("gentlest", 1.0), ("as opened", 0.5)):
        shown.preset.value = name
        shown.wait_idle()
        assert shown.values["rank"] == rank and shown.values["finetune"] == 0


def test_pin_compares_and_lets_go(opened):
    shown = opened()
    shown.pin()
    shown.controls["rank"].value = 0.2
    shown.wait_idle()
    assert "vs pinned" in shown.tiles.html and len(trace(shown, "tradeoff-pinned").x) == 1
    shown.pin()
    shown.pin()
    assert "vs pinned" not in shown.tiles.html


def test_address_holds_the_settings(opened):
    shown = opened()
    shown.controls["rank"].value = 0.2
    shown.wait_idle()
    assert shown.address.settings["rank"] == "0.2"
    assert eval(shown.address.code) == wb.LowRank(rank=0.2)
    shown.address.found = {"rank": "0.7", "finetune": "0", "unknown": "1"}
    shown.wait_idle()
    assert shown.values["rank"] == 0.7


def test_address_out_of_range_is_told(opened):
    shown = opened()
    shown.address.found = {"rank": "7"}
    shown.wait_idle()
    assert shown.values["rank"] == 0.5
    assert "rank is 7" in shown.alert.html


# --- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Growing(Technique):
    """Trains for fifty steps; width 0.5 is shipped."""

    trains: ClassVar[bool] = True
    width: float = setting(0.5, low=0.25, high=1.0, step=0.25, neutral=1.0)

    def recall(self, model):
        return clone(model) if self.width == 0.5 else None

    def compress(self, model, data=None, watch=None):
        for i in range(1, 51):
            time.sleep(0.01)
            accuracy = wb.Accuracy(i, 100) if i % 10 == 0 else None
            if watch is not None and watch(wb.Step(i, 50, 0, 1 / i, accuracy, 0.01)) is False:
                break
        return clone(model)


def test_shipped_student_is_shown_at_once_and_others_ask_for_training(opened):
    shown = opened(Growing)
    assert shown.point is not None and shown.train_button.disabled
    shown.controls["width"].value = 0.75
    shown.wait_idle()
    assert shown.point is None and not shown.train_button.disabled
    assert "press Train it here" in shown.words.html


def test_training_draws_a_curve_and_shows_the_student(opened):
    shown = opened(Growing)
    shown.controls["width"].value = 0.75
    shown.wait_idle()
    shown.train()
    wait_for(lambda: len(trace(shown, "training-loss").x) > 3)
    assert shown.state == "training" and "/50" in shown.status.html
    assert shown.wait_idle()
    assert shown.point.technique.width == 0.75 and shown.point.exact
    assert list(trace(shown, "training-accuracy").y)[-1] == 50.0


def test_stop_keeps_the_student_so_far(opened):
    shown = opened(Growing)
    shown.controls["width"].value = 0.25
    shown.wait_idle()
    shown.train()
    wait_for(lambda: shown.state == "training")
    shown.stop()
    assert shown.state == "stopped"
    assert shown.wait_idle()
    assert shown.point.technique.width == 0.25 and "stopped after" in shown.point.note and shown.point.exact


def test_fine_tuning_waits_for_its_button(opened):
    shown = opened()
    shown.controls["finetune"].value = 2
    shown.wait_idle()
    assert shown.point.technique.finetune == 0
    assert "Fine-tune it here" in shown.words.html and not shown.train_button.disabled


# --- report --------------------------------------------------------------------------------------------------------


def test_report_measures_the_test_images_once(opened, data):
    shown = opened()
    assert shown.point.test is None
    shown.report()
    shown.wait_idle()
    assert shown.point.test == wb.evaluate(shown.point.model, data.test)
    assert "test" in shown.report_view.html and f"{shown.point.test.percent:.2f}" in shown.report_view.html


def test_page_that_opens_later_sees_the_figure_as_it_is(opened):
    state = opened().figure.get_state()
    assert all(len(bar["x"]) for bar in state["_widget_data"] if bar["type"] == "bar")


def test_page_that_opened_meanwhile_is_sent_everything(opened):
    shown, sent = opened(), []
    shown.figure.observe(lambda change: sent.append(change["new"]), "_py2js_update")
    shown.header.opened = 1.0
    marks = dict(zip(shown.drawing._traces, sent[0]["style_data"]["x"], strict=True))
    assert marks["tradeoff-now"] == [shown.point.size_bytes] and len(marks["latency-now"]) > 0


@pytest.mark.parametrize("technique", [wb.LowRank, wb.MagnitudePruning, wb.ChannelPruning, wb.Quantization])
def test_every_technique_has_a_panel(opened, technique):
    shown = opened(technique)
    assert shown.state == "done", shown.alert.html


def test_a_setting_without_effect_is_greyed_out_and_not_named(opened):
    shown = opened(wb.LowRank(rank=0.5, kept=0.9))
    greyed = lambda: {name for name, control in shown.controls.items() if control.disabled}
    assert greyed() == {"kept"} and "rank 0.5" in shown.words.html and "kept" not in shown.words.html
    shown.controls["choose"].value = "energy"
    assert greyed() == {"rank"}
    assert shown.wait_idle()
    assert "kept 0.9" in shown.words.html and "rank" not in shown.words.html
    shown.undo()
    assert greyed() == {"kept"} and shown.wait_idle()


def test_another_technique_keeps_the_points_tried_so_far(opened):
    shown = opened((wb.LowRank, wb.MagnitudePruning(sparsity=0.8)))
    first = shown.point
    shown.chooser.value = wb.MagnitudePruning
    assert shown.wait_idle()
    assert shown.point.technique == wb.MagnitudePruning(sparsity=0.8)
    assert set(shown.controls) == {knob.name for knob in wb.MagnitudePruning.settings()}
    assert "Magnitude pruning" in shown.header.html and "When it does not" in shown.card.html
    assert list(trace(shown, "tradeoff-tried").x) == [first.size_bytes]
    assert shown.address.settings["technique"] == "MagnitudePruning"
    shown.undo()
    assert shown.wait_idle()
    assert shown.kind is wb.LowRank and shown.point is first and shown.chooser.value is wb.LowRank


def moved(shown, rank):
    shown.controls["rank"].value = rank
    assert shown.wait_idle()
    return shown.point


def test_networks_not_used_for_longest_go_and_their_figures_stay(opened, monkeypatch):
    monkeypatch.setattr(board, "MOST_MODELS", 3)
    shown = opened(images=toy.data(val=128))
    points = [moved(shown, 0.1)]
    gone, small = weakref.ref(points[0].model), points[0].model.state_dict()
    points += [moved(shown, rank) for rank in (0.2, 0.3, 0.4, 0.2, 0.6)]  # 0.2 is used again before it would go
    gc.collect()
    assert [point.model is not None for point in points] == [False, True, False, True, True, True] and gone() is None
    sizes, known = [point.size_bytes for point in points], points[0].hits
    assert set(trace(shown, "tradeoff-tried").x) >= {*sizes[:-1]} and points[0].timings["eager"].done
    measurements = shown.measurements
    assert moved(shown, 0.1) is points[0] and points[0].hits is known and shown.measurements == measurements
    again = points[0].model.state_dict()
    assert small.keys() == again.keys() and all(torch.equal(small[name], again[name]) for name in small)


def test_networks_that_were_trained_here_or_pinned_stay(opened, monkeypatch):
    monkeypatch.setattr(board, "MOST_MODELS", 1)
    shown = opened(wb.LowRank(rank=0.5, finetune=1), images=toy.data(val=128))
    shown.train()
    assert shown.wait_idle() and shown.point.trained_here
    trained = shown.point
    shown.controls["finetune"].value = 0
    pinned = moved(shown, 0.2)
    shown.pin()
    other = moved(shown, 0.3)
    moved(shown, 0.4)
    assert trained.model is not None and pinned.model is not None and other.model is None
    shown.pin()  # the pin moves to the shown point
    moved(shown, 0.3)
    assert pinned.model is None and other.model is not None


def test_address_names_the_technique(opened):
    shown = opened((wb.LowRank, wb.MagnitudePruning))
    shown.address.found = {"technique": "MagnitudePruning", "sparsity": "0.9"}
    assert shown.wait_idle()
    assert shown.point.technique.sparsity == 0.9


def test_settings_that_do_not_go_together_are_told(opened):
    shown = opened(toy.Picky)
    shown.controls["two"].value = 0
    assert shown.wait_idle()
    assert "one is 1, more than two" in shown.alert.html
    shown.controls["one"].value = 0
    assert shown.wait_idle()
    assert shown.alert.html == "" and shown.state == "done"


def test_what_does_not_help_is_said(opened):
    shown = opened(wb.MagnitudePruning)
    shown.controls["sparsity"].value = 0.9
    shown.wait_idle()
    timing = shown.point.timings["eager"]
    if not timing.now.noisy:
        assert "no kernel that skips single zeros" in shown.words.html or "faster" in shown.words.html
    quantized = opened(wb.Quantization)
    assert "only simulates rounding" in quantized.words.html or "simulated" in quantized.words.html


def test_only_records_that_differ_by_the_slider_make_the_recorded_curve():
    defaults = wb.LowRank().values()
    assert is_usual(wb.LowRank, {**defaults, "rank": 0.2})
    assert is_usual(wb.LowRank, {**defaults, "rank": 1.0, "objective": "weights"})  # the untouched model is on it
    assert not is_usual(wb.LowRank, {**defaults, "objective": "weights"})
    assert not is_usual(wb.LowRank, {**defaults, "finetune": 1})


def test_a_late_page_does_not_take_back_what_was_drawn_since():
    """A page reports what plotly made of the message before, under the number of the last one, which it has read."""
    figure = Figure(go.Figure(go.Scatter(x=[1], y=[1], visible=False), {"xaxis": {"range": [0, 1]}}))
    with figure.batch_update():
        figure.data[0].visible = True
        figure.layout.xaxis.range = [0, 9]
    numbers = {"trace_edit_id": figure._last_trace_edit_id, "layout_edit_id": figure._last_layout_edit_id}
    figure.set_state(
        {"_js2py_traceDeltas": {"trace_deltas": [{"uid": figure.data[0].uid, "visible": False}], **numbers}}
    )
    figure.set_state({"_js2py_layoutDelta": {"layout_delta": {"xaxis": {"range": [0, 1]}}, **numbers}})
    assert figure.data[0].visible is True and figure.layout.xaxis.range == (0, 9)


def test_what_is_drawn_while_a_page_reports_is_sent():
    """A page reports after each message, and Python takes that in on one thread while it draws on another."""
    figure = Figure(go.Figure([go.Scatter(x=[1], y=[1]) for _ in range(8)]))
    sent, over = [], threading.Event()
    figure.observe(lambda change: change["new"] and sent.append(change["new"]), "_py2js_update")

    def report():
        for number in itertools.takewhile(lambda _: not over.is_set(), itertools.count()):
            deltas = [{"uid": trace.uid, "visible": True} for trace in figure.data]
            figure.set_state({"_js2py_traceDeltas": {"trace_deltas": deltas, "trace_edit_id": number}})

    page = threading.Thread(target=report)
    page.start()
    for _ in range(300):
        figure.send_again()
    over.set()
    page.join()
    assert len(sent) == 300
