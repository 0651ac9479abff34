"""Shipped results are found for exactly the technique, the settings and the model that they were made with."""

from __future__ import annotations

import json

import pytest
import torch
import toy

import workbench as wb
from workbench import results
from workbench.paths import shipped


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
        technique = getattr(wb, one["technique"])(**one["settings"])
        assert results.result_path(technique, wb.load_model(one["model"])).name == one["file"], technique


def test_nothing_shipped_means_none(model):
    assert wb.FineTune(epochs=39, seed=9).recall(model) is None
