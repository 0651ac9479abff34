"""Shipped results are found for exactly the technique, the settings and the model that they were made with."""

from __future__ import annotations

import json
import re

import pytest
import torch
import toy

import workbench as wb
from workbench import results
from workbench.paths import shipped
from workbench.records import technique_of


@pytest.fixture(scope="module")
def model():
    return toy.model()


def test_what_was_kept_is_recalled_for_exactly_this(model, tmp_path):
    pruned = wb.MagnitudePruning(sparsity=0.8).compress(model)
    technique = wb.FineTune(epochs=3)
    path = results.keep(technique, model, pruned, tmp_path)
    images = toy.data().example(4)
    assert path.name.startswith("Sequential-FineTune-") and path.suffix == ".wb"
    assert torch.equal(results.recall(technique, model, tmp_path)(images), pruned(images))
    assert results.recall(wb.FineTune(epochs=4), model, tmp_path) is None
    assert results.recall(wb.FineTune(epochs=3, teacher=model), model, tmp_path) is None
    assert results.recall(technique, pruned, tmp_path) is None


def test_the_key_follows_the_models_numbers(model):
    technique, other = wb.FineTune(), toy.model()
    key = results.result_key(technique, other)
    assert key == results.result_key(technique, model)
    with torch.no_grad():
        other[0].bias.add_(1)
    assert results.result_key(technique, other) != key


def test_a_student_that_was_passed_is_part_of_the_key(model):
    keys = {results.result_key(wb.Distillation(student=student), model) for student in (None, model, toy.model())}
    assert len(keys) == 2  # the toys are equal, number by number


def test_a_pipeline_is_found_by_its_stages(model):
    stages = [wb.MagnitudePruning(), wb.FineTune()]
    first, second = wb.Pipeline(stages), wb.Pipeline(stages[::-1])
    assert results.result_key(first, model) != results.result_key(second, model)


def test_every_shipped_result_is_in_the_index_and_found_by_its_settings():
    folder = shipped("data", "results")
    index = json.loads((folder / "index.json").read_text()) if folder.is_dir() else []
    assert {one["file"] for one in index} == {path.name for path in folder.glob("*.wb")}
    for one in index:
        technique = technique_of(one["technique"], one["settings"])
        assert results.result_path(technique, wb.load_model(one["model"])).name == one["file"], technique


def offered_in_notebooks():
    """Return the techniques that train and stand in a cell of a notebook that opens a panel."""
    found = set()
    for path in sorted(shipped("notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        texts = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        names = {name for text in texts if "wb.panel(" in text for name in re.findall(r"\bwb\.([A-Z]\w+)", text)}
        found |= {name for name in names if getattr(getattr(wb, name), "trains", False)}
    return sorted(found - {"FineTune"})  # a stage of pipelines: their presets are tested below


FROM_NOTEBOOKS = {  # presets that train; one-shot stages around a shipped one are computed
    "06, with training": wb.Pipeline([wb.MagnitudePruning(sparsity=0.8, finetune=1), wb.WeightClustering(bits=4)]),
    "07, quantization-aware": wb.Pipeline([wb.MagnitudePruning(), wb.QuantizationAwareTraining()]),
    "07, all three, trained": wb.Pipeline(
        [wb.MagnitudePruning(sparsity=0.8), wb.WeightClustering(), wb.Quantization(), wb.FineTune(epochs=1)]
    ),
}


def test_the_notebooks_offer_what_trains():
    assert {"GradualPruning", "AdaRound", "DistillationFeatures", "EntropyAwareTraining"} <= set(offered_in_notebooks())


@pytest.mark.parametrize("name", offered_in_notebooks())
def test_the_first_look_at_a_technique_that_trains_is_shipped(name):
    net = wb.load_model("glyphs-cnn")
    found = getattr(wb, name)().recall(net)
    assert found is not None, f"python scripts/make_results.py {name}"
    assert found(torch.zeros(1, 1, 28, 28)).shape == (1, 47) and not found.training


@pytest.mark.parametrize("pipeline", FROM_NOTEBOOKS.values(), ids=FROM_NOTEBOOKS)
def test_a_preset_that_trains_is_shipped(pipeline):
    net, few = wb.load_model("glyphs-cnn"), wb.load_data("glyphs")
    reports = pipeline.recalled(net, few)
    assert [report.stage for report in reports] == list(pipeline.stages)
    assert not any(report.broken for report in reports)


def index():
    path = shipped("data", "results", "index.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


@pytest.mark.parametrize("one", index(), ids=lambda one: one["file"])
def test_the_index_counts_what_the_file_gets_right(one):
    split = wb.load_data(one["data"]).val
    counted = wb.evaluate(wb.load(shipped("data", "results", one["file"])), split)
    assert counted.total == one["total"]
    assert abs(counted.correct - one["correct"]) <= 2  # scores that are almost equal may differ by machine


def test_the_shipped_results_stay_small():
    assert sum(path.stat().st_size for path in shipped("data", "results").glob("*")) < 7e6


def test_nothing_shipped_means_none(model):
    assert wb.FineTune(epochs=39, seed=9).recall(model) is None
