"""The panel of a pipeline without a browser: chips, the address, undo, what each stage left, and training."""

import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import toy

import workbench as wb
from workbench import results
from workbench.panel import measure, panel, pipeline
from workbench.records import Record
from workbench.surgery import clone, weighted_layers
from workbench.technique import Technique, setting
from workbench.weights import bake_weights, weight_parametrizations

PRUNE, CLUSTER = wb.MagnitudePruning(sparsity=0.5), wb.WeightClustering(bits=3)
ROUND = wb.Quantization(weight_bits=8, activation_bits=32)


@dataclass(frozen=True)
class Filled(Technique):
    """A naive stage: it forgets the mask and moves every weight."""

    by: float = setting(0.01, low=0.0, high=1.0, step=0.01)

    def compress(self, model, data=None, watch=None):
        small = bake_weights(clone(model))
        for _, layer in weighted_layers(small):
            layer.weight.data += self.by
        return small


@dataclass(frozen=True)
class Trained(Technique):
    """Trains for thirty steps and changes nothing."""

    trains: ClassVar[bool] = True
    epochs: int = setting(1, low=1, high=9, step=1)

    def compress(self, model, data=None, watch=None):
        for i in range(1, 31):
            time.sleep(0.005)
            if watch(wb.Step(i, 30, 0, 1 / i, wb.Accuracy(i, 100) if i % 10 == 0 else None, 0.005)) is False:
                break
        return clone(model)


@dataclass(frozen=True)
class Refusing(Technique):
    """Comes first or not at all."""

    def compress(self, model, data=None, watch=None):
        if any(len(weight_parametrizations(layer)) for _, layer in weighted_layers(model)):
            raise ValueError("Every layer carries a mask. Put this stage before those that prune.")
        return clone(model)


@pytest.fixture(scope="module")
def model():
    return toy.model()


@pytest.fixture(scope="module")
def data():
    return toy.data(val=200, test=100)


@pytest.fixture
def opened(model, data, monkeypatch):
    """Return a function that opens a panel of stages, which takes no times; every panel is closed at the end."""
    monkeypatch.setattr(measure, "time_point", lambda *_: iter(()))
    made = []

    def open_one(*stages, **options):
        options = {"records": [], "runtime": "eager", **options}
        made.append(panel(wb.Pipeline(stages), model, data, **options))
        assert made[-1].wait_idle()
        return made[-1]

    yield open_one
    for one in made:
        one.close()


def chips(shown):
    """Return what the chips say."""
    return [chip.children[1].description for chip in shown.chips.children]


def press(shown, i, which):
    """Press the button "‹", "›" or "✕" of a chip, or the chip itself, and wait."""
    place = {"‹": 0, "pick": 1, "›": 2, "✕": 3}[which]
    shown.chips.children[i].children[place].click()
    assert shown.wait_idle()


# --- chips ---------------------------------------------------------------------------------------------------------


def test_chips_are_the_stages_and_the_result_is_that_of_the_pipeline(opened, model, data):
    shown = opened(PRUNE, CLUSTER)
    assert chips(shown) == ["1. Magnitude pruning 0.5", "2. Weight clustering 3"]
    assert shown.state == "done" and shown.point.technique == wb.Pipeline([PRUNE, CLUSTER])
    assert shown.point.size_bytes == wb.ledger(wb.Pipeline([PRUNE, CLUSTER]).compress(model, data)).total_bytes
    assert "Pipeline</h3>" in shown.header.html


def test_a_stage_is_added_at_the_end_and_chosen(opened):
    shown = opened(PRUNE)
    shown.adding.value = wb.WeightClustering
    shown.add_button.click()
    assert shown.wait_idle()
    assert chips(shown) == ["1. Magnitude pruning 0.5", "2. Weight clustering 4"] and "bits" in shown.controls
    assert shown.point.technique.stages == (PRUNE, wb.WeightClustering())
    assert shown.stage_view.html.count('scope="row"') == 2


def test_a_stage_is_removed_and_the_last_one_stays(opened):
    shown = opened(PRUNE, CLUSTER)
    press(shown, 0, "✕")
    assert chips(shown) == ["1. Weight clustering 3"] and shown.point.technique.stages == (CLUSTER,)
    assert shown.chips.children[0].children[3].disabled
    shown.remove(0)
    assert shown.technique.stages == (CLUSTER,)


def test_a_stage_moves_and_stops_at_the_ends(opened):
    shown = opened(PRUNE, CLUSTER, ROUND)
    press(shown, 0, "›")
    assert shown.point.technique.stages == (CLUSTER, PRUNE, ROUND) and "sparsity" in shown.controls
    press(shown, 1, "‹")
    assert shown.point.technique.stages == (PRUNE, CLUSTER, ROUND)
    first, last = shown.chips.children[0].children, shown.chips.children[2].children
    assert first[0].disabled and last[2].disabled and not first[2].disabled
    shown.move(2, +5)
    assert shown.technique.stages == (PRUNE, CLUSTER, ROUND)


def test_the_controls_are_those_of_the_chosen_stage_and_change_it_alone(opened):
    shown = opened(PRUNE, CLUSTER)
    press(shown, 1, "pick")
    assert set(shown.controls) == {knob.name for knob in wb.WeightClustering.settings()}
    shown.controls["bits"].value = 2
    assert shown.wait_idle()
    assert chips(shown)[1] == "2. Weight clustering 2"
    press(shown, 0, "pick")
    assert shown.point.technique.stages == (PRUNE, wb.WeightClustering(bits=2))
    assert shown.controls["sparsity"].value == 0.5


def test_a_preset_puts_its_stages_there(opened):
    shown = opened(PRUNE, presets={"filled": wb.Pipeline([CLUSTER, Filled()])})
    shown.preset.value = "filled"
    assert shown.wait_idle()
    assert shown.point.technique.stages == (CLUSTER, Filled()) and shown.preset.value == ""
    assert pipeline._read("Filled", shown._offered) == Filled(), "the address can name what a preset holds"


def test_undo_brings_back_stages_and_their_order(opened):
    shown = opened(PRUNE, CLUSTER)
    press(shown, 0, "›")
    press(shown, 1, "✕")
    for expected in ((CLUSTER, PRUNE), (PRUNE, CLUSTER)):
        shown.undo_button.click()
        assert shown.wait_idle()
        assert shown.point.technique.stages == expected
    shown.redo()
    assert shown.wait_idle()
    assert shown.point.technique.stages == (CLUSTER, PRUNE) and len(shown.chips.children) == 2


def test_a_panel_without_stages_is_refused(model, data):
    with pytest.raises(ValueError, match="opens with at least one stage"):
        panel(wb.Pipeline(), model, data)


# --- the page's address --------------------------------------------------------------------------------------------


def test_the_address_brings_the_stages_back(opened):
    there = opened(PRUNE, wb.WeightClustering(bits=2, initial="density"), ROUND)
    here = opened(wb.LowRank(rank=0.5))
    assert eval(there.address.code) == there.technique
    here.address.found = dict(there.address.settings)
    assert here.wait_idle()
    assert here.point.technique == there.technique and here.alert.html == ""


@pytest.mark.parametrize("name", pipeline.OFFERED)
def test_every_stage_on_offer_survives_the_address(name):
    kind = getattr(wb, name)
    for knob in kind.settings():
        for value in {knob.positions()[0], knob.positions()[-1]}:
            try:
                stage = kind(**{knob.name: value})
            except ValueError:  # does not go with the defaults of the others
                continue
            assert pipeline._read(pipeline._written(stage), {name: kind}) == stage


@pytest.mark.parametrize(
    ("stages", "told"),
    [
        ("MagnitudePruning:sparsity=7", "sparsity is 7.0"),
        ("MagnitudePruning:rank=0.5", "has no setting &#x27;rank&#x27;"),
        ("MagnitudePruning;Shrinking", "&#x27;Shrinking&#x27; is not one of"),
        ("", "is not one of"),
        ("Picky:one=3,two=1", "one is 3, more than two"),
    ],
)
def test_an_address_that_does_not_fit_is_told_and_changes_nothing(opened, stages, told):
    shown = opened(PRUNE, toy.Picky())
    shown.address.found = {"stages": stages}
    assert shown.wait_idle()
    assert "address of this page does not fit" in shown.alert.html and told in shown.alert.html
    assert shown.point.technique.stages == (PRUNE, toy.Picky())
    press(shown, 0, "✕")
    assert shown.alert.html == ""


# --- what each stage left ------------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_stage_and_nothing_is_broken(opened):
    shown = opened(PRUNE, CLUSTER, ROUND)
    rows = shown.stage_view.html.split('<th scope="row">')[1:]
    assert len(rows) == 3 and all("✓ nothing" in row and "50.0 %" in row for row in rows)
    assert "<td>8</td>" in rows[1] and "<td>8</td><td>8</td>" in rows[2], "eight values, then also eight bits"


def test_the_table_says_which_stage_broke_what(opened):
    shown = opened(PRUNE, CLUSTER, Filled())
    *good, bad = shown.stage_view.html.split('<th scope="row">')[1:]
    assert all("✓ nothing" in row for row in good)
    assert "✗ Filled filled" in bad and "which undoes Magnitude pruning" in bad
    press(shown, 2, "✕")
    assert "✗" not in shown.stage_view.html


def test_factoring_clusters_is_told_and_mended_by_the_order(opened):
    shown = opened(CLUSTER, wb.LowRank(rank=0.25))
    assert "✗ Low rank left up to" in shown.stage_view.html and "undoes Weight clustering" in shown.stage_view.html
    press(shown, 1, "‹")
    assert shown.state == "done" and "✗" not in shown.stage_view.html


def test_a_stage_that_refuses_is_told_and_the_chips_still_work(opened):
    shown = opened(PRUNE, Refusing())
    assert shown.state == "failed" and "Put this stage before" in shown.alert.html
    press(shown, 1, "‹")
    assert shown.state == "done" and shown.alert.html == ""


def test_settings_that_do_not_go_together_are_told_and_the_chips_still_work(opened):
    shown = opened(PRUNE, toy.Picky())
    press(shown, 1, "pick")
    shown.controls["two"].value = 0
    assert shown.wait_idle()
    assert "one is 1, more than two" in shown.alert.html
    press(shown, 0, "pick")
    assert shown.alert.html == "" and shown.point.technique.stages == (PRUNE, toy.Picky())


def test_shipped_pipelines_are_drawn_as_their_front(opened, monkeypatch):
    tried = {0.5: (90, 500), 0.6: (80, 600), 0.8: (70, 200)}
    stages = {s: wb.Pipeline([wb.MagnitudePruning(sparsity=s), CLUSTER]).values() for s in tried}
    known = {"model": "", "data": "toy", "technique": "Pipeline", "split": "val", "total": 100}
    rest = {"fp32_bytes": 1000, "parameters": 9, "macs": 9}
    records = [Record(settings=stages[s], correct=c, size_bytes=b, **known, **rest) for s, (c, b) in tried.items()]
    monkeypatch.setattr(pipeline, "record_names", lambda: ["some"])
    monkeypatch.setattr(pipeline, "read_records", lambda name: records)
    drawn = opened(PRUNE, records=None).drawing._traces["tradeoff-recorded"]
    assert list(drawn.x) == [200, 500], "what is larger and right less often is not on the front"
    assert drawn.text[0].startswith("Magnitude pruning 0.8 → Weight clustering 3")


# --- training ------------------------------------------------------------------------------------------------------


def test_a_training_stage_asks_for_its_button_and_shows_what_is_there_before(opened):
    shown = opened(PRUNE, Trained(), ROUND)
    assert shown.point.technique.stages == (PRUNE, ROUND) and shown.point.exact
    assert "Shown before its training: press Train it here." in shown.words.html
    assert not shown.train_button.disabled and shown.stage_view.html.count('scope="row"') == 2


def test_pressing_the_button_trains_and_draws_the_curve(opened):
    shown = opened(PRUNE, Trained())
    shown.train_button.click()
    assert shown.wait_idle()
    assert shown.point.technique.stages == (PRUNE, Trained()) and shown.train_button.disabled
    assert list(shown.drawing._traces["training-accuracy"].y) == [10.0, 20.0, 30.0]
    assert shown.stage_view.html.count('scope="row"') == 2 and "✗" not in shown.stage_view.html


def test_epochs_of_a_stage_wait_for_the_button_too(opened):
    shown = opened(wb.MagnitudePruning(sparsity=0.5, finetune=1), ROUND)
    assert shown.alert.html == "" and shown.point.technique.stages == (PRUNE, ROUND)
    assert not shown.train_button.disabled


def test_nothing_but_training_shows_nothing_before_it(opened):
    shown = opened(Trained())
    assert shown.point is None and shown.stage_view.html == ""
    assert "press Train it here" in shown.words.html


# --- shipped results -----------------------------------------------------------------------------------------------


@pytest.fixture
def shipping(model, tmp_path, monkeypatch):
    """Let this test ship a result of the toy."""
    monkeypatch.setattr(results, "shipped", lambda *parts: tmp_path.joinpath(*parts))
    return lambda technique, result: results.keep(technique, model, result)


def test_a_shipped_training_stands_at_once_with_what_each_stage_left(opened, shipping, model, data):
    trained = wb.FineTune(epochs=1)
    shipping(wb.Pipeline([PRUNE, trained]), wb.MagnitudePruning(sparsity=0.75).compress(model))
    shown = opened(PRUNE, trained, ROUND)
    assert shown.state == "done" and shown.point.technique == wb.Pipeline([PRUNE, trained, ROUND])
    assert shown.stage_view.html.count("<tr>") == 4
    zeros = [report.invariants.sparsity for report, _ in shown._reports[shown.point.technique]]
    assert zeros == pytest.approx([0.5, 0.75, 0.75], abs=0.01)


def test_a_first_stage_alone_is_recalled_by_its_own_result(shipping, model, data):
    tuned = wb.MagnitudePruning(sparsity=0.5, finetune=1)
    shipping(tuned, wb.MagnitudePruning(sparsity=0.75).compress(model))
    reports = wb.Pipeline([tuned, CLUSTER]).recalled(model, data)
    assert [report.stage for report in reports] == [tuned, CLUSTER]
    assert wb.Pipeline([CLUSTER, tuned]).recalled(model, data) is None


def test_what_has_no_effect_needs_no_result(model, data):
    assert wb.FineTune(epochs=0).recall(model) is not None
    assert len(wb.Pipeline([PRUNE, wb.FineTune(epochs=0)]).recalled(model, data)) == 2


def test_a_chip_names_no_setting_without_effect():
    assert pipeline.brief(wb.LowRank(rank=0.5)) == "Low rank 0.5"
    assert pipeline.brief(wb.LowRank(rank=0.5, choose="energy", kept=0.9)) == "Low rank 0.9"
    assert pipeline.brief(wb.SemiStructuredPruning()) == "Semi structured pruning 2:4"
