"""Fine-tuning: labels or a teacher, what lies on the weights stays, bad input is told."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toy

import workbench as wb


@pytest.fixture(scope="module")
def model():
    return toy.model()


@pytest.fixture(scope="module")
def data():
    return toy.data(val=200)


def test_no_epochs_change_nothing_and_need_no_data(model):
    same = wb.FineTune.neutral().compress(model)
    images = toy.data().example(4)
    assert wb.FineTune(epochs=0).is_neutral and same is not model
    assert torch.equal(same(images), model(images))


def test_the_same_seed_gives_the_same_weights_and_the_model_stays(model, data):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, again, other = (wb.FineTune(epochs=1, seed=seed).compress(model, data) for seed in (0, 0, 1))
    images = data.example(4)
    assert torch.equal(first(images), again(images)) and not torch.equal(first(images), other(images))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_cut_network_gets_accuracy_back(model, data):
    cut = wb.ChannelPruning(sparsity=0.7).compress(model, data)
    mended = wb.FineTune(epochs=4, learning_rate=3e-3).compress(cut, data)
    assert wb.evaluate(mended, data.val).value > wb.evaluate(cut, data.val).value + 0.1


def test_where_answers_alone_count_wrong_labels_do_no_harm(model, data):
    """A split whose labels are all one too high, for training and for choosing the best epoch."""
    train, val = (replace(split, labels=(split.labels + 1) % toy.CLASSES) for split in (data.train, data.val))
    wrong = replace(data, train=train, val=val)
    settings = {"epochs": 12, "learning_rate": 3e-3}
    taught = wb.FineTune(**settings, soft_weight=1.0).compress(model, wrong)
    alone = wb.FineTune(**settings).compress(model, wrong)
    images = data.val.batch(slice(0, 200))[0]
    agree = [(net(images).argmax(1) == model(images).argmax(1)).float().mean() for net in (taught, alone)]
    assert agree[0] > 0.8 and agree[1] < 0.6


def test_in_a_pipeline_the_teacher_is_the_model_given_to_it(model, data):
    cut, stage = wb.ChannelPruning(sparsity=0.5), wb.FineTune(epochs=1, soft_weight=0.9)
    together = wb.Pipeline([cut, stage]).compress(model, data)
    by_hand = wb.FineTune(epochs=1, soft_weight=0.9, teacher=model).compress(cut.compress(model, data), data)
    alone = stage.compress(cut.compress(model, data), data)
    images = data.example(4)
    assert torch.equal(together(images), by_hand(images)) and not torch.equal(together(images), alone(images))


def test_the_control_learns_from_labels_alone():
    stage = wb.FineTune(epochs=3, soft_weight=0.9, seed=2)
    assert stage.control() == wb.FineTune(epochs=3, soft_weight=0.0, seed=2)
    assert wb.MagnitudePruning().control() is None


def test_bad_input_is_told(model, data):
    with pytest.raises(ValueError, match="pass a data set from load_data"):
        wb.FineTune().compress(model, data.example(4))
    with pytest.raises(ValueError, match=r"needs weights in float32, .*call model.float\(\)"):
        wb.FineTune().compress(toy.model().half(), data)


@pytest.mark.parametrize("images", [96, 512])
def test_any_number_of_steps_can_be_trained(model, data, images):
    """Four steps once divided by zero in torch's schedule."""
    few = replace(data, train=data.train.take(images))
    assert wb.evaluate(wb.FineTune(epochs=1).compress(model, few), data.val).total == 200
