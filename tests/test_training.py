"""Accuracy and its interval, training that repeats, stops and goes on."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import workbench as wb
from workbench.training import Accuracy, jitter


@pytest.fixture(scope="module")
def data():
    glyphs = wb.load_data("glyphs")
    return replace(glyphs, train=glyphs.train.take(640), val=glyphs.val.take(300))


def small_model(seed=0):
    return wb.build("glyphs-cnn", width=0.125, seed=seed)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_fraction_and_solves_its_equation(counts):
    accuracy = Accuracy(*counts)
    low, high = accuracy.interval
    assert 0 <= low <= accuracy.value <= high <= 1
    for end in (low, high):
        if 0 < end < 1:  # by definition: the fraction lies 1.96 standard errors of `end` away from `end`
            error = math.sqrt(end * (1 - end) / accuracy.total)
            assert math.isclose(abs(accuracy.value - end), 1.959964 * error, rel_tol=1e-4, abs_tol=1e-9)


def test_accuracy_reads_as_a_sentence():
    assert str(Accuracy(921, 1000)) == "92.1 % (90.3–93.6 %) of 1,000 images"


def test_evaluations_grow_to_the_exact_count(data):
    model = small_model()
    seen = list(wb.evaluations(model, data.val, batch_size=128))
    assert [a.total for a in seen] == [128, 256, 300]
    images, labels = data.val.batch(slice(None))
    with torch.no_grad():
        expected = int((model.eval()(images).argmax(1) == labels).sum())
    assert seen[-1] == wb.evaluate(model, data.val) == Accuracy(expected, 300)


def test_evaluate_leaves_the_mode_of_the_model_as_it_was(data):
    model = small_model().train()
    wb.evaluate(model, data.val)
    assert model.training and all(p.requires_grad for p in model.parameters())


def test_training_learns_and_the_same_seed_gives_the_same_weights(data):
    first, second = small_model(), small_model()
    before = wb.evaluate(first, data.val)
    losses = [step.loss for step in wb.fit(first, data, epochs=5, batch_size=32, seed=1)]
    list(wb.fit(second, data, epochs=5, batch_size=32, seed=1))
    assert losses[-1] < losses[0] and wb.evaluate(first, data.val).value > before.value
    assert equal(first, second)


def test_the_best_weights_are_kept_when_the_iterator_is_closed(data):
    model = small_model()
    best, kept = -1, None
    steps = wb.fit(model, data, epochs=4, learning_rate=0.02, validations=2)
    for step in steps:
        if step.accuracy and step.accuracy.value >= best:
            best, kept = step.accuracy.value, copy.deepcopy(model.state_dict())
        if step.epoch == 2:
            steps.close()
    assert kept and all(torch.equal(kept[k], v) for k, v in model.state_dict().items())
    assert wb.evaluate(model, data.val).value == best and not model.training


def test_an_interrupted_training_goes_on_to_the_same_result(data, tmp_path):
    whole, parts = small_model(), small_model()
    list(wb.fit(whole, data, epochs=3, seed=5))
    checkpoint = tmp_path / "run.safetensors"
    steps = wb.fit(parts, data, epochs=3, seed=5, checkpoint=checkpoint)
    for step in steps:
        if step.epoch == 1:  # in the middle of the second epoch, which is lost; the first is saved
            steps.close()
    resumed = small_model(seed=9)
    numbers = [s.step for s in wb.fit(resumed, data, epochs=3, seed=5, checkpoint=checkpoint)]
    assert numbers[0] == 6 and numbers[-1] == 15
    assert equal(resumed, whole)


def test_jitter_keeps_shape_and_range_and_follows_its_generator(data):
    images, _ = data.train.batch(slice(0, 16))
    twice = [jitter(images, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*twice) and twice[0].shape == images.shape
    assert twice[0].min() >= images.min() - 1e-5 and twice[0].max() <= images.max() + 1e-5
    assert not torch.equal(twice[0], images)


def test_a_teacher_is_followed_and_never_trained(data):
    teacher = wb.load_model("glyphs-cnn")
    before = copy.deepcopy(teacher)
    student = small_model()
    list(islice(wb.fit(student, data, epochs=1, teacher=teacher), 2))
    assert equal(teacher, before) and not teacher.training


def test_a_callback_hears_every_step_when_gradients_are_there(data):
    model, heard = small_model(), []
    list(
        wb.fit(model, data, epochs=2, each_step=lambda *numbers: heard.append((*numbers, model.classifier.weight.grad)))
    )
    assert [number for number, _, _ in heard] == list(range(1, 11)) and {total for _, total, _ in heard} == {10}
    assert all(gradient is not None for _, _, gradient in heard)


def test_a_callback_can_make_the_best_so_far_forgotten(data):
    model = small_model()

    def ruin(number, _):
        if number == 10:  # the last step: what was better before must not come back
            with torch.no_grad():
                model.classifier.weight.zero_()
        return number == 10

    list(wb.fit(model, data, epochs=2, learning_rate=1e-4, each_step=ruin))
    assert model.classifier.weight.abs().max() < 1e-3


@pytest.mark.parametrize("batches", [1, 2, 3, 4, 5])
def test_the_shortest_trainings_run(data, batches):
    short = replace(data, train=data.train.take(8 * batches))
    assert [step.steps for step in wb.fit(small_model(), short, epochs=1, batch_size=8)][-1] == batches
