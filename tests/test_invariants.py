"""Pipelines: what each stage keeps of those before, and the sentence when it does not."""

from __future__ import annotations

import pytest
import torch
import toy

import workbench as wb
from workbench.invariants import Invariants, Promises, broken
from workbench.surgery import clone
from workbench.weights import Mask, bake_weights


@pytest.fixture(scope="module")
def model():
    return toy.model()


@pytest.fixture(scope="module")
def data():
    return toy.data(val=200)


def reports(stages, model, data):
    return list(wb.Pipeline(stages).run(model, data))


class Baked(wb.Technique):
    """A naive stage: it makes plain weights of whatever lies on them."""

    def compress(self, model, data=None, watch=None):
        return bake_weights(clone(model))


PRUNE, CUT = wb.MagnitudePruning(sparsity=0.8), wb.ChannelPruning(sparsity=0.5)
BITS, TRAIN = wb.Quantization(weight_bits=4), wb.FineTune(epochs=1)
CLUSTER = wb.WeightClustering(bits=4)

ONE_SHOT = {"prune": PRUNE, "2:4": wb.SemiStructuredPruning(), "cut": CUT, "round": BITS}

GOOD = {
    "prune, train": [PRUNE, TRAIN],
    "prune, round, train": [PRUNE, BITS, TRAIN],
    "prune, cluster, train": [PRUNE, CLUSTER, TRAIN],
    "cluster, prune": [CLUSTER, PRUNE],
    "cut, prune, round, train": [CUT, PRUNE, BITS, TRAIN],
    "round coarsely, train": [wb.Quantization(weight_bits=3), wb.FineTune(epochs=1, learning_rate=3e-3)],
    "cluster, round, train": [CLUSTER, wb.Quantization(weight_bits=8), TRAIN],
    "prune, cluster, round, cut": [PRUNE, CLUSTER, wb.Quantization(weight_bits=8), CUT],
    "prune, prune harder": [PRUNE, wb.MagnitudePruning(sparsity=0.9)],
    "cut, born again": [CUT, wb.SelfDistillation(epochs=1)],
    "factor, prune, round": [wb.LowRank(rank=0.3), PRUNE, BITS],
}

NAIVE = {
    "training after baking": ([PRUNE, Baked(), TRAIN], 2, ["Fine tune filled", "undoes Magnitude pruning"]),
    "rounding each channel of clusters": (
        [CLUSTER, Baked(), wb.Quantization(weight_bits=8)],
        2,
        ["Quantization left up to", "distinct values in a weight that had 16", "undoes Weight clustering"],
    ),
    "factoring a pruned layer": ([PRUNE, wb.LowRank(rank=0.4)], 1, ["Low rank filled", "undoes Magnitude pruning"]),
    "factoring a rounded layer": (
        [BITS, wb.LowRank(rank=0.4)],
        1,
        ["Low rank left weights in 32 bits that had 4", "Low rank no longer rounds inputs to 8 bits"],
    ),
    "training after baking rounded weights": (
        [wb.Quantization(weight_bits=4, activation_bits=32), Baked(), TRAIN],
        2,
        ["Fine tune left weights in 32 bits that had 4"],
    ),
    "training after baking clusters": ([CLUSTER, Baked(), TRAIN], 2, ["that had 16", "undoes Weight clustering"]),
    "born again without the mask": (
        [PRUNE, wb.SelfDistillation(epochs=1)],
        1,
        ["Self distillation filled", "undoes Magnitude pruning"],
    ),
}


@pytest.mark.parametrize("order", GOOD)
def test_a_good_order_breaks_nothing(order, model, data):
    for report in reports(GOOD[order], model, data):
        assert report.broken == (), report.stage


@pytest.mark.parametrize("second", ONE_SHOT)
@pytest.mark.parametrize("first", ONE_SHOT)
def test_techniques_that_keep_the_layers_keep_one_another(first, second, model, data):
    *_, last = reports([ONE_SHOT[first], ONE_SHOT[second]], model, data)
    assert last.broken == () and torch.isfinite(last.model(data.example(4))).all()


@pytest.mark.parametrize("order", NAIVE)
def test_a_naive_order_says_which_stage_broke_what(order, model, data):
    stages, at, words = NAIVE[order]
    for number, report in enumerate(reports(stages, model, data)):
        assert bool(report.broken) == (number == at), report.broken
        if number == at:
            assert all(word in " ".join(report.broken) for word in words), report.broken


def test_the_zeros_that_a_sentence_counts_are_those_that_were_filled(model):
    pruned = PRUNE.compress(model)
    filled = bake_weights(clone(pruned))
    with torch.no_grad():
        places = (filled[7].weight == 0).nonzero()[:5]
        filled[7].weight[tuple(places.T)] = 1.0
    zeros = int((pruned[7].weight == 0).sum())
    (sentence,) = broken(Invariants.of(pruned), Invariants.of(filled), "The test")
    assert sentence == f"The test filled 5 weights where there were {zeros:,} zeros (7)."


def test_a_student_larger_than_what_was_cut_is_told(model, data):
    last = reports([CUT, wb.Distillation(student=model, epochs=1)], model, data)[-1]
    assert len(last.broken) == 1 and "undoes Channel pruning" in last.broken[0]


def test_what_is_broken_is_said_once(model):
    pruned = Invariants.of(PRUNE.compress(model))
    promises = Promises()
    promises.add("Pruning", Invariants.of(model), pruned)
    assert promises.broken_by("Nothing", pruned) == []
    assert len(promises.broken_by("Filling", Invariants.of(model))) == 1
    assert promises.broken_by("Later", Invariants.of(model)) == []


def test_a_report_holds_the_stage_and_what_is_true_after_it(model, data):
    first, second = reports([wb.MagnitudePruning(sparsity=0.5), BITS], model, data)
    assert isinstance(first.stage, wb.MagnitudePruning) and isinstance(second.stage, wb.Quantization)
    assert first.invariants.sparsity == pytest.approx(0.5, abs=1e-4) and first.invariants.bits is None
    assert second.invariants.sparsity >= first.invariants.sparsity and second.invariants.bits == 4
    assert str(second.invariants).endswith("% zero, at most 4 bits")


def test_a_model_without_weighted_layers_has_nothing_to_break():
    nothing = Invariants.of(torch.nn.ReLU())
    assert str(nothing) == "0 weights, 0.0 % zero" and broken(nothing, nothing) == []


def test_run_gives_the_models_of_compress_and_leaves_the_given_one_alone(model, data):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pipeline = wb.Pipeline([PRUNE, TRAIN, BITS])
    *_, last = pipeline.run(model, data)
    images = data.example(4)
    assert torch.equal(last.model(images), pipeline.compress(model, data)(images))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("rounding", [CLUSTER, BITS])
def test_channel_pruning_takes_masks_scales_and_symbols_along(rounding, model, data):
    *_, before, after = reports([PRUNE, rounding, CUT], model, data)
    for name in ("0", "3", "7"):
        old, new = (report.model.get_submodule(name) for report in (before, after))
        mask, coder = new.parametrizations.weight
        assert isinstance(mask, Mask) and mask.mask.shape == new.weight.shape != old.weight.shape
        assert torch.isin(new.weight, old.weight).all() and coder(new.weight).shape == new.weight.shape


def test_a_stopped_stage_keeps_what_it_has(model, data):
    seen = []
    stopped = wb.Pipeline([PRUNE, wb.FineTune(epochs=9)]).compress(model, data, lambda step: bool(seen.append(step)))
    assert len(seen) == 1 and Invariants.of(stopped).sparsity == pytest.approx(0.8, abs=1e-3)
