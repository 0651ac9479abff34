"""The models are what their names say, and their shipped weights do what their record says."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

import workbench as wb
from workbench.models import ModelError, fingerprint, load_weights, weights_path


@pytest.mark.parametrize(("name", "parameters"), [("lenet-300-100", 266_610), ("lenet-5", 431_080)])
def test_lenets_have_the_parameters_of_the_papers(name, parameters):
    assert sum(p.numel() for p in wb.build(name).parameters()) == parameters


@pytest.mark.parametrize("name", wb.MODELS)
def test_build_scales_repeats_and_remembers(name):
    half = wb.build(name, width=0.5, seed=3)
    assert half.architecture == {"name": name, "width": 0.5, "classes": wb.MODELS[name].classes}
    assert fingerprint(half) == fingerprint(wb.build(name, width=0.5, seed=3)) != fingerprint(wb.build(name, width=0.5))
    assert half.eval()(torch.rand(2, 1, 28, 28)).shape == (2, wb.MODELS[name].classes)


def test_build_with_a_seed_leaves_the_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    wb.build("lenet-5", seed=7)
    assert torch.equal(torch.rand(3), expected)


def test_unknown_models_and_missing_weights_say_what_to_do(tmp_path):
    with pytest.raises(ModelError, match="no model called 'lenet'; the workbench has glyphs-cnn"):
        wb.load_model("lenet")
    with pytest.raises(ModelError, match="train them with `workbench train`"):
        load_weights(wb.build("lenet-5"), tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", wb.MODELS)
def test_shipped_weights_reach_the_accuracy_in_their_record(name):
    with safe_open(weights_path(name), "pt") as file:
        record = {key: json.loads(value) for key, value in file.metadata().items()}
    try:
        data = wb.load_data(record["data"])
    except wb.DataError as error:
        pytest.skip(str(error))
    counted = wb.evaluate(wb.load_model(name), data.test)
    assert counted.total == record["test"][1]
    assert abs(counted.correct - record["test"][0]) <= 2  # another processor may round a borderline image differently


@pytest.mark.parametrize(("name", "least"), [("glyphs-cnn", 93.5), ("lenet-300-100", 98.36), ("lenet-5", 99.2)])
def test_recorded_accuracy_is_at_least_what_was_promised(name, least):
    with safe_open(weights_path(name), "pt") as file:
        correct, total = json.loads(file.metadata()["test"])
    assert 100 * correct / total >= least
