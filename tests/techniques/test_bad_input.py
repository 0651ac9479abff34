"""Bad input, technique by technique: a clear refusal, or the documented fallback with a right answer.

A refusal is clear when the package itself raises it, as ValueError or TypeError, in a sentence.
"""

from __future__ import annotations

import math
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import toy
from torch import nn

import workbench as wb
from workbench.data import Split
from workbench.surgery import clone, weighted_layers
from workbench.techniques import KEEP_SIZE, TECHNIQUES
from workbench.techniques.low_rank.svd import truncated_svd
from workbench.techniques.pruning.semi_structured import n_m_mask

EVERY = (*TECHNIQUES, *KEEP_SIZE)
IDS = [kind.__name__ for kind in EVERY]
PACKAGE = str(Path(wb.__file__).parent)
SHORT = {"epochs": 1, "iterations": 50, "sweeps": 2}  # of settings that decide how long it takes
OWN_STUDENT = {wb.Distillation, wb.DistillationFeatures, wb.DistillationRelational}
HALVES = [torch.float16, torch.bfloat16]
EXAMPLE = toy.data(val=8, test=8).example(4)


def student():
    """Return an untrained network for the toy's images."""
    torch.manual_seed(1)
    first, second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    pooled = (nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(first, *pooled, second, *pooled, nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))


def quick(kind, **settings):
    """Return a technique at its defaults, but short."""
    names = {knob.name for knob in kind.settings()}
    own = {"student": student()} if kind in OWN_STUDENT else {}
    return kind(**{name: value for name, value in SHORT.items() if name in names}, **own, **settings)


def training(kind):
    """Return a technique with settings that train, or None."""
    if kind.trains:
        return quick(kind)
    return quick(kind, finetune=1) if "finetune" in {knob.name for knob in kind.settings()} else None


TRAINING = [kind for kind in EVERY if training(kind)]


@pytest.fixture(scope="module")
def data():
    whole = toy.data(val=64, test=8)
    return replace(whole, train=whole.train.take(96))


@pytest.fixture(scope="module")
def model():
    return clone(toy.model()).requires_grad_()


def refused(call):
    """Return what a call raises, and fail unless it is clear; None when it raises nothing."""
    try:
        call()
    except (ValueError, TypeError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        told = str(error)
        assert where.startswith(PACKAGE), f"raised in {where}: {told}"
        assert len(told.split()) >= 6 and told.rstrip("`)").endswith("."), told
        return told
    return None


def outcome(technique, model, data, tmp_path):
    """Compress; return the small model, or None after a clear refusal. The given model must stay, a file answer so."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = []
    told = refused(lambda: found.append(technique.compress(model, data)))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    if told is not None:
        return None
    small = found[0]
    like = student() if type(technique) in OWN_STUDENT else model
    inputs = EXAMPLE.to(next(small.parameters()).dtype)
    with torch.no_grad():
        answers, shape = small(inputs), model(EXAMPLE.to(next(model.parameters()).dtype)).shape
        assert answers.shape == shape and torch.isfinite(answers).all() and not small.training
        wb.save(small, tmp_path / "small.wb")
        assert torch.equal(wb.load(tmp_path / "small.wb", like=like)(inputs), answers)
    return small


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY, ids=IDS)
def test_settings_that_cannot_be_are_named(kind):
    for knob in kind.settings():
        wrong = [None, "nonsense", [1], {}, math.nan, math.inf, -math.inf]
        if knob.is_number:
            wrong += [knob.low - 10 * knob.step, knob.high + 10 * knob.step, knob.default + 1j]
            wrong += [knob.low + 0.5] if isinstance(knob.default, int) else []
        for value in wrong:
            if knob.has_neutral and value == knob.neutral:
                continue
            told = refused(partial(kind, **{knob.name: value}))
            assert told and kind.__name__ in told and knob.label in told, (knob.name, value, told)


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    assert wb.Quantization(weight_bits=numpy.int64(4)) == wb.Quantization(weight_bits=4)
    assert wb.LowRank(rank=numpy.float32(0.5)) == wb.LowRank(rank=0.5)


def test_what_the_mathematics_cannot_do_is_refused():
    weight = torch.randn(4, 6)
    for call in (
        lambda: n_m_mask(weight, 3, 2),
        lambda: wb.SemiStructuredPruning(pattern="4:2"),
        lambda: truncated_svd(weight, 0),
        lambda: truncated_svd(weight, 5),
        lambda: wb.LowRank(rank=0),
        lambda: wb.LoRA(rank=0),
        lambda: wb.Tucker(rank=0),
        lambda: wb.Pipeline(["LowRank"]),
    ):
        assert refused(call)


def test_more_values_than_weights_keep_every_weight():
    few = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(256, 2)).eval()
    with torch.no_grad():
        few[2].weight.copy_(torch.tensor([0.25, -0.5]).repeat(256).view(2, 256))
    for initial in ("linear", "density", "k-means++"):
        small = wb.WeightClustering(bits=8, initial=initial).compress(few)
        assert torch.equal(small(EXAMPLE), few(EXAMPLE))


# --- models --------------------------------------------------------------------------------------------------------


def thin():
    """One channel, one input, one output: everything as narrow as a layer can be."""
    layers = nn.Conv2d(1, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 8)
    return nn.Sequential(*layers).eval()


def one_output():
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(768, 1)
    return nn.Sequential(*layers).eval()


def odd():
    """Widths that no group size, no N:M pattern and no rounding fits."""
    layers = nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 7, 2), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(343, 3), nn.ReLU(), nn.Linear(3, 8)).eval()


def without_bias():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 9, bias=False), nn.Linear(9, 8, bias=False)).eval()


SMALL = {"thin": thin, "one output": one_output, "odd": odd, "without bias": without_bias}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("kind", EVERY, ids=IDS)
def test_small_layers(kind, name, data, tmp_path):
    torch.manual_seed(0)
    outcome(quick(kind), SMALL[name](), data, tmp_path)


@pytest.mark.parametrize("kind", TRAINING, ids=lambda kind: kind.__name__)
def test_a_model_of_one_answer_is_not_trained_on_eight_classes(kind, data):
    if kind not in (wb.AdaRound, wb.LayerDropping):  # one reads no labels, the other finds no block
        told = refused(lambda: training(kind).compress(one_output(), data))
        assert told and "answers" in told, told


class Tied(nn.Module):
    """Two layers, one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = nn.Linear(256, 24), nn.Linear(24, 24), nn.Linear(24, 8)
        self.once = nn.Linear(24, 24)
        self.again.weight = self.once.weight

    def forward(self, x):
        x = self.first(x.flatten(1)).relu()
        return self.head(self.again(self.once(x).relu()).relu())


@pytest.mark.parametrize("kind", EVERY, ids=IDS)
def test_a_weight_that_two_layers_share_stays_one(kind, data, tmp_path):
    torch.manual_seed(0)
    small = outcome(quick(kind), Tied().eval(), data, tmp_path)
    if small is not None and isinstance(small, Tied) and hasattr(small.again, "weight"):
        assert torch.equal(small.again.weight, small.once.weight)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", EVERY, ids=IDS)
def test_half_precision_stays_so_or_is_refused(kind, dtype, model, data, tmp_path):
    half = clone(model).to(dtype)
    small = outcome(quick(kind), half, data, tmp_path)
    if small is not None and kind not in OWN_STUDENT | {wb.SelfDistillation}:  # a student is a network of its own
        exact = wb.evaluate(quick(kind).compress(model, data), data.val).value
        assert abs(wb.evaluate(small, data.val).value - exact) < 0.15
        assert {layer.weight.dtype for _, layer in weighted_layers(small)} == {dtype}


@pytest.mark.parametrize("kind", EVERY, ids=IDS)
def test_a_weight_kept_in_two_tensors_is_compressed_or_refused(kind, data, tmp_path):
    model = clone(toy.model()).requires_grad_()
    nn.utils.parametrizations.weight_norm(model[3])
    outcome(quick(kind), model, data, tmp_path)


WITHOUT = {"none": nn.Flatten(), "norm": nn.Sequential(nn.Flatten(), nn.BatchNorm1d(256))}


@pytest.mark.parametrize("empty", WITHOUT.values(), ids=WITHOUT)
@pytest.mark.parametrize("kind", EVERY, ids=IDS)
def test_a_model_without_a_layer_to_compress_is_refused(kind, empty, data):
    trainable = kind in (wb.FineTune, wb.SelfDistillation) and list(empty.parameters())  # a norm can be trained
    if not trainable:
        assert refused(lambda: quick(kind).compress(empty.eval(), data))


@pytest.mark.parametrize("kind", EVERY, ids=IDS)
def test_a_weight_that_is_not_finite_is_refused_by_name(kind, model, data):
    sick = clone(model)
    with torch.no_grad():
        sick[3].weight[0, 0, 0, 0] = math.nan
    told = refused(lambda: quick(kind).compress(sick, data))
    assert told and "3" in told and "NaN" in told


# --- data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [None, "glyphs", 3], ids=str)
@pytest.mark.parametrize("kind", EVERY, ids=IDS)
def test_no_data_is_refused_where_it_is_needed(kind, wrong, model, tmp_path):
    small = outcome(quick(kind), model, wrong, tmp_path)
    assert small is None or not kind.trains
    technique = training(kind)
    if technique is not None:
        assert refused(lambda: technique.compress(model, wrong))


def nothing(split):
    return Split(split.images[:0], split.labels[:0], split.mean, split.std)


@pytest.mark.parametrize("kind", EVERY, ids=IDS)
def test_empty_data_are_refused_where_they_are_needed(kind, model, data, tmp_path):
    empty = replace(data, train=nothing(data.train))
    outcome(quick(kind), model, empty, tmp_path)
    technique = training(kind)
    if technique is not None and technique.must_train:
        assert refused(lambda: technique.compress(model, empty))


@pytest.mark.parametrize("kind", TRAINING, ids=lambda kind: kind.__name__)
def test_without_validation_images_it_trains_to_the_end_or_says_so(kind, model, data, tmp_path):
    outcome(training(kind), model, replace(data, val=nothing(data.val)), tmp_path)


# --- interruption --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRAINING, ids=lambda kind: kind.__name__)
def test_a_stop_after_the_first_step_leaves_a_valid_model(kind, model, data):
    seen = []

    def stop(step):
        seen.append(step)
        return False

    small = training(kind).compress(model, data, stop)
    images = data.example(4)
    assert len(seen) == 1 and torch.isfinite(small(images)).all() and not small.training
    assert small(images).shape == (4, 8) and wb.encode(small)


@pytest.mark.parametrize("kind", TRAINING, ids=lambda kind: kind.__name__)
def test_an_interrupt_leaves_the_model_as_it_was(kind, model, data):
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def interrupt(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training(kind).compress(model, data, interrupt)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    layers = [layer for _, layer in weighted_layers(model)]
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in layers)
    assert not model.training and all(p.requires_grad for p in model.parameters())
