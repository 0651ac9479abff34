"""The lessons' helpers: texts from records, predictions, tasks, figures that follow; and records that still hold."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import workbench as wb
from workbench import plots
from workbench.models import fingerprint
from workbench.panel import lesson
from workbench.panel.controls import View
from workbench.panel.measure import Point
from workbench.records import record_names

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SAMPLE = {  # one or two settings of each sweep, counted anew
    "low_rank": [{"rank": 0.5, "objective": "outputs"}, {"rank": 0.5, "objective": "weights", "recalibrate": False}],
    "magnitude_pruning": [{"sparsity": 0.5, "scope": "layer"}, {"sparsity": 0.9, "scope": "global"}],
    "channel_pruning": [{"sparsity": 0.25, "recalibrate": True}],
    "quantization": [{"weight_bits": 3, "granularity": "channel", "activation_bits": 8, "calibration": "mse"}],
    "distillation": [{"width": 0.25, "soft_weight": 0.9}],
    "clustering": [{"bits": 3, "initial": "linear", "scope": "layer"}],
}
PARTS = (
    *("## When you leave", "## The idea", "## A toy", "$$", "lesson.source(", "lesson.predict(", "panel = "),
    *("lesson.check_prediction(", "## Reading", "## A closer look", "## The trade-off", "## When it does not help"),
    *("lesson.task(", "lesson.solution(", "## In three sentences", "**Sources.**"),
)
IMAGES = 2  # a sum in another order, on another processor, may decide an image anew that stood on the edge


@pytest.fixture(scope="module")
def model():
    return wb.load_model("glyphs-cnn")


@pytest.fixture(scope="module")
def data():
    return wb.load_data("glyphs")


class FakePanel:
    """What a lesson needs of a panel, moved by hand."""

    def __init__(self):
        self.status = View()
        self.point, self.baseline = None, point("baseline", 1000, 90)
        self.place = "eager"
        self.knobs = {knob.name: knob for knob in wb.LowRank.settings()}
        self.turn = 0

    def move(self, point):
        self.point, self.turn = point, self.turn + 1
        self.status.html = f"turn {self.turn}"


def point(title, size_bytes, right, exact=True, technique=None):
    hits = torch.arange(100) < right
    return Point(title, technique, torch.nn.Linear(1, 1), size_bytes, 1, 1, {}, {}, {}, hits, exact)


# --- records -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SAMPLE))
def test_recorded_figures_still_come_out(name, model, data):
    """The sentences of the notebooks quote these; when one drifts, `python scripts/make_records.py` measures anew."""
    for settings in SAMPLE[name]:
        record = next(iter(lesson.records(name, **settings)))
        technique = next(t for t in wb.TECHNIQUES if t.__name__ == record.technique)(**record.settings)
        small = technique.recall(model) or technique.compress(model, data)
        assert wb.ledger(small).total_bytes == record.size_bytes, f"{technique}: bytes"
        assert abs(wb.evaluate(small, data.val).correct - record.correct) <= IMAGES, f"{technique}: right answers"


def test_recorded_pipelines_still_come_out(model, data):
    technique = wb.Pipeline([wb.MagnitudePruning(sparsity=0.5), wb.WeightClustering(bits=4)])
    found, small = lesson.quote("deep_compression", technique), technique.compress(model, data)
    assert wb.ledger(small).total_bytes == found.record.size_bytes
    assert abs(wb.evaluate(small, data.val).correct - found.record.correct) <= IMAGES
    assert found.base == lesson.quote("deep_compression", wb.Pipeline()).record, "no stage, so nothing changed"
    with pytest.raises(KeyError, match=r"MagnitudePruning\(sparsity=0\.12.*scripts/make_records\.py"):
        lesson.quote("deep_compression", wb.Pipeline([wb.MagnitudePruning(sparsity=0.12)]))


def test_recorded_orders_still_come_out(model, data):
    share, prune = wb.WeightClustering(bits=3), wb.MagnitudePruning(sparsity=0.5)
    for stages in ([prune, share], [share, prune]):
        found, small = lesson.quote("combining", wb.Pipeline(stages)), wb.Pipeline(stages).compress(model)
        assert wb.ledger(small).total_bytes == found.record.size_bytes
        assert abs(wb.evaluate(small, data.val).correct - found.record.correct) <= IMAGES


def test_records_belong_to_the_shipped_weights(model):
    weights = fingerprint(model)
    for name in record_names():
        for record in wb.read_records(name):
            if record.model == "glyphs-cnn":
                assert record.versions.get("weights") == weights, f"{name} was measured on other weights"
                assert (record.split, record.total) in (("val", 2209), ("test", 4465)), name


def test_times_in_records_name_their_machine():
    for name in record_names():
        for record in wb.read_records(name):
            assert not record.latency or (record.machine and record.date), f"{name}: {record.settings}"


def test_quote_speaks_in_units():
    half, base = lesson.quote("low_rank", rank=0.5), lesson.baseline("low_rank")
    assert half.record.settings["objective"] == "outputs", "settings left out are at their defaults"
    assert half.rank == 0.5 and half.size.endswith("\u00a0MB") and half.smaller.endswith("×")
    assert half.times_smaller == base.size_bytes / half.record.size_bytes
    assert half.lost == pytest.approx(base.accuracy.percent - half.record.accuracy.percent)
    assert "points less" in half.points and lesson.Quote(base, base).points == "the same accuracy"
    with pytest.raises(AttributeError, match="it has the settings"):
        half.bits  # noqa: B018
    with pytest.raises(KeyError, match=r"scripts/make_records\.py"):
        lesson.quote("low_rank", rank=0.123)


def test_usual_records_are_one_curve():
    for name in SAMPLE:
        records = lesson.usual(name)
        swept = {"low_rank": "rank", "quantization": "weight_bits", "distillation": "width", "clustering": "bits"}
        swept = swept.get(name, "sparsity")
        values = [record.settings[swept] for record in records]
        assert len(values) == len(set(values)) > 3 and lesson.baseline(name) in records


# --- text ----------------------------------------------------------------------------------------------------------


def test_source_is_what_runs():
    shown = lesson.source(wb.Accuracy.interval.fget).data
    assert shown.startswith("```python\n@property\ndef interval(self)") and shown.endswith("```")


def test_text_table_and_solution():
    assert lesson.say("\n    One.\n    Two.\n").data == "One.\nTwo."
    assert lesson.table([{"a": 1, "b": "x"}]).data == "| a | b |\n| --- | --- |\n| 1 | x |"
    assert lesson.solution("1. Yes.").data.startswith("<details><summary>Solutions</summary>\n\n1. Yes.")


# --- figures -------------------------------------------------------------------------------------------------------


def test_a_figure_is_drawn_by_jupyter_and_has_words():
    figure = plots.matrix({"a": torch.eye(5)})
    plot, words = lesson.show(figure).outputs
    assert plot["data"][lesson.PLOTLY]["data"][0]["type"] == "heatmap"
    assert plots.summary(figure) in words["data"]["text/html"]


def test_a_figure_follows_the_panel():
    panel, drawn = FakePanel(), []
    out = lesson.follow(panel, lambda at: drawn.append(at.title) or plots.matrix({at.title: torch.eye(2)}))
    assert out.outputs == () and drawn == []
    first = point("rank 0.5", 500, 80, exact=False)
    panel.move(first)
    panel.move(first)
    panel.move(point("rank 0.2", 200, 40))
    assert drawn == ["rank 0.5", "rank 0.2"]
    assert "rank 0.2" in json.dumps(out.outputs)


def test_tradeoff_gathers_exact_points():
    panel = FakePanel()
    out = lesson.tradeoff(panel, {"low rank": lesson.usual("low_rank")})
    panel.move(point("rank 0.5", 500, 80, exact=False))
    assert out.outputs[0]["data"][lesson.PLOTLY]["data"][-1]["name"] != "yours"
    panel.move(point("rank 0.4", 400, 70))
    panel.move(point("rank 0.3", 300, 60))
    yours = out.outputs[0]["data"][lesson.PLOTLY]["data"][-1]
    assert yours["name"] == "yours" and [text.split("<br>")[0] for text in yours["text"]] == ["rank 0.4", "rank 0.3"]


def test_tradeoff_names_the_stages_of_a_pipeline():
    out = lesson.tradeoff(FakePanel(), {"both": lesson.records("deep_compression")})
    texts = out.outputs[0]["data"][lesson.PLOTLY]["data"][0]["text"]
    assert any("Magnitude pruning 0.5 → Weight clustering 4" in text for text in texts)


def test_gallery_shows_classes_and_mistakes(model, data):
    assert lesson.gallery(data, 3).data.count("<img") == 3
    wrong = lesson.gallery(data, 2, wrong_by=model).data
    assert wrong.count("<img") == 2 and wrong.count(", not ") == 4  # in the picture's words and below it


# --- predict -------------------------------------------------------------------------------------------------------


def test_prediction_is_final_and_met_again():
    asked = lesson.predict("How much smaller?", {"twice": 2, "four times": 4}, key="test")
    box = lesson.check_prediction("test", 3.7, "It is 3.7 times smaller.")
    assert "None yet" in box.html and "3.7" not in box.html, "the answer stays hidden until there is a prediction"
    asked.commit()
    assert asked.answer is None and asked.button.disabled
    asked.choice.value = "twice"
    assert not asked.button.disabled
    asked.button.click()
    assert asked.choice.disabled and asked.button.disabled
    assert "twice" in box.html and "measured: four times" in box.html and "3.7 times" in box.html
    asked.choice.value = "four times"
    asked.commit()
    assert asked.answer == "twice"


def test_right_prediction_is_called_so():
    asked = lesson.predict("How much?", {"none": 0, "much": 9}, key="right")
    asked.choice.value = "none"
    asked.commit()
    assert "as measured" in lesson.check_prediction("right", 0.3, "Almost none.").html


# --- tasks ---------------------------------------------------------------------------------------------------------


def test_task_says_what_is_met_and_stays_done():
    panel = FakePanel()
    task = lesson.task(panel, "Twice smaller, within 5 points.", smaller=2, within=5)
    assert "Task" in task.html and task.solved_by is None
    panel.move(point("rank 0.3", 300, 89))
    assert "✗" not in task.html and task.solved_by is None, "the setting that the panel opens with does not count"
    panel.move(point("rank 0.6", 600, 89))
    assert task.html.count("✗") == 1 and task.html.count("✓") == 1
    panel.move(point("rank 0.4", 400, 89, exact=False))
    assert "is being counted" in task.html and task.solved_by is None
    panel.move(point("rank 0.5", 500, 85))
    assert task.solved_by.title == "rank 0.5" and "Solved by <b>rank 0.5</b>" in task.html
    panel.move(point("rank 1", 1000, 90))
    assert "Solved by <b>rank 0.5</b>" in task.html


def test_task_asks_for_settings_and_for_harm():
    panel = FakePanel()
    panel.move(point("opening", 1000, 90, technique=wb.LowRank()))
    task = lesson.task(panel, "Break it.", loses=40, objective="weights", recalibrate=False)
    panel.move(point("a", 500, 20, technique=wb.LowRank(rank=0.5)))
    assert "recalibrate on, wanted off" in task.html and task.solved_by is None
    panel.move(point("b", 500, 20, technique=wb.LowRank(rank=0.5, objective="weights", recalibrate=False)))
    assert task.solved_by is not None


@pytest.mark.parametrize("wanted", [True, False])
def test_task_asks_whether_a_stage_undoes_another(wanted):
    panel = FakePanel()
    panel.undone = lambda point: ["A filled 3 zeros, which undoes B."] if point.title == "bad" else []
    panel.move(point("opening", 1000, 90))
    task = lesson.task(panel, "Undo.", undoes=wanted)
    panel.move(point("good", 500, 90))
    assert "no stage undoes another" in task.html and (task.solved_by is None) == wanted
    panel.move(point("bad", 400, 90))
    assert ("A filled 3 zeros, which undoes B" in task.html) == wanted and task.solved_by is not None


@pytest.mark.parametrize(("ratio", "faster", "same"), [(2.0, True, False), (1.0, False, True)])
def test_task_asks_for_time(monkeypatch, ratio, faster, same):
    panel, shown = FakePanel(), point("a", 500, 90)
    panel.move(point("opening", 1000, 90))
    quick = lesson.task(panel, "Faster.", faster=1.5)
    slow = lesson.task(panel, "No faster.", no_faster=True)
    panel.move(shown)
    assert "is being measured" in quick.html and "is being measured" in slow.html
    found = SimpleNamespace(value=ratio, distinguishable=ratio != 1)
    monkeypatch.setattr(lesson, "speed", lambda timing: found)
    shown.timings["eager"] = SimpleNamespace(done=True)
    panel.move(shown)
    assert (quick.solved_by is not None, slow.solved_by is not None) == (faster, same)


def test_task_asks_for_a_verdict(monkeypatch):
    panel, shown = FakePanel(), point("a", 500, 90)
    panel.move(point("opening", 1000, 90))
    asked = lesson.task(panel, "No kernel.", verdict="no kernel")
    panel.move(shown)
    assert "is being measured" in asked.html
    for kind, solved in (("faster", False), ("no kernel", True)):
        monkeypatch.setattr(lesson, "verdict_of", lambda *args, kind=kind: SimpleNamespace(kind=kind))
        panel.move(shown)
        assert f"verdict {kind}, wanted no kernel" in asked.html and (asked.solved_by is shown) == solved


# --- measured when the page opens ----------------------------------------------------------------------------------


def test_race_and_sensitivity(model, data):
    race = lesson.race({"whole": model, "same": model}, data, runtimes=("eager",), calls=6)
    row = next(iter(race.rows()))
    assert row["runtime"] == "eager" and row["whole"].endswith(" ms, fp32") and "ms, fp32<br>" in row["same"]
    assert "taken in turns on" in race._repr_markdown_() and race.ms("eager", "whole") > 0
    alone = lesson.sensitivity(wb.LowRank(rank=0.5, objective="weights"), model, data, images=94)
    assert alone[0].layer == "features.0.0" and alone[0].weights == 288
    assert min(alone, key=lambda one: one.change) is alone[0] and "%" in str(alone[0])


# --- the notebooks' anatomy ----------------------------------------------------------------------------------------


def cells(path):
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_has_its_parts(path):
    text = "\n\n".join(source for _, source in cells(path))
    assert [part for part in PARTS if part not in text] == []
    assert text.count("lesson.task(") == 3
    goals = next(source for _, source in cells(path) if source.startswith("## When you leave"))
    assert goals.count("\n- **") == 3
    idea = next(source for _, source in cells(path) if source.startswith("## The idea"))
    assert len(idea.split()) <= 140, f"the idea of {path.name} has {len(idea.split())} words"
    assert "next cell" not in text and "run the cell" not in text.lower(), "on a dashboard there is no cell to run"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_knows_its_title_and_neighbors(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    card = book["metadata"]["workbench"]
    assert cells(path)[0][1].startswith(f"# {card['title']}\n") and card["title"].endswith("?")
    assert f"{card['minutes']} minutes" in cells(path)[0][1] and card["description"].endswith(".")
    place = NOTEBOOKS.index(path)
    for other in NOTEBOOKS[max(0, place - 1) : place] + NOTEBOOKS[place + 1 : place + 2]:
        assert f"]({other.name})" in cells(path)[0][1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_prose_holds_no_measured_number(path):
    """Percentages, factors and milliseconds come from records or from the page's own measurement."""
    allowed = {"95 %", "99.9 %", "3\\,\\%", "40 %", "90 %", "1 kB"}  # confidence, percentile, floor; settings of toys
    for kind, source in cells(path):
        if kind == "markdown":
            found = re.findall(r"\d[\d.,]*\s?(?:%|points\b|ms\b|kB\b|MB\b)|\d[\d.]*×(?!\d)", source)
            typed = [one for one in found if one not in allowed and not one.startswith("5×")]
            assert typed == [], f"{path.name}: {typed} in {source[:60]!r}"
