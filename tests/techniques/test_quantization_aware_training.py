"""Learned scales: their gradient, what training keeps of earlier stages, and the int8 kernels at the end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toy
from torch import nn
from torch.nn.utils import parametrize

import workbench as wb
from workbench.runtimes import RUNTIMES
from workbench.techniques.quantization.training_aware import LearnedInput, learn_scale, make_trainable, settle
from workbench.weights import Codebook, FakeQuantize, InputQuantizer, Mask, parametrize_weight, weight_parametrizations


@pytest.fixture(scope="module")
def data():
    return replace(toy.data(200, 200), train=toy.images(1024, 0))


@pytest.fixture(scope="module")
def model():
    return toy.model()


@pytest.fixture(scope="module")
def small(model, data):
    return wb.QuantizationAwareTraining(weight_bits=2).compress(model, data)


def test_training_beats_rounding_alone(model, data, small):
    alone = wb.Quantization(weight_bits=2).compress(model, data)
    loss = lambda m: float(nn.functional.cross_entropy(m(data.val.batch(slice(None))[0]), data.val.labels))
    with torch.no_grad():
        assert loss(small) < loss(alone)


def test_the_scales_are_learned_positive_and_end_as_plain_buffers(model, data, small):
    start = wb.Quantization(weight_bits=2).compress(model, data)
    for place in (0, 3, 7, 9):
        (quantizer,) = weight_parametrizations(small[place])
        assert type(quantizer) is FakeQuantize and "scale" in dict(quantizer.named_buffers())
        assert type(small[place].input_quantizer) is InputQuantizer
        assert (quantizer.scale > 0).all() and small[place].input_quantizer.scale > 0
        assert not torch.equal(quantizer.scale, weight_parametrizations(start[place])[0].scale)
        assert small[place].input_quantizer.scale != start[place].input_quantizer.scale
        assert len(quantizer.symbols(small[place].weight).unique()) <= 3
    names = [name for name, _ in small.named_parameters()]
    assert not any("scale" in name or "input" in name for name in names)


def test_openvino_runs_int8_kernels_with_the_same_answers(model, data):
    small = wb.QuantizationAwareTraining(weight_bits=8).compress(model, data)
    images = data.example(32)
    prepared = next(r for r in RUNTIMES if r.name == "openvino").prepare(small, images, 1)
    assert "int8" in prepared.precision and sum(k.precision == "int8" for k in prepared.kernels) >= 3
    with torch.no_grad():
        assert (prepared(images).argmax(1) == small(images).argmax(1)).float().mean() > 0.95


def test_zeros_and_codebooks_of_earlier_stages_stay(model, data):
    early = wb.MagnitudePruning(sparsity=0.7).compress(model)
    weight = early[7].weight.detach()
    levels = torch.tensor([-0.08, -0.03, 0.0, 0.03, 0.08])
    parametrize_weight(early[7], Codebook(levels, (weight[..., None] - levels).abs().argmin(-1)))
    small = wb.QuantizationAwareTraining(weight_bits=4).compress(early, data)
    for place in (0, 3, 7, 9):
        assert (small[place].weight[early[place].weight == 0] == 0).all()
        assert isinstance(weight_parametrizations(small[place])[0], Mask)
    assert len(small[7].weight.unique()) <= 5


def test_the_gradient_of_a_scale_is_that_of_the_paper():
    """Equation 3 of LSQ, times its weight 1 / sqrt(n · levels): written out for a whole layer."""
    weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    scale, top = torch.tensor([0.2, 0.3, 0.4]), 7
    quantizer = FakeQuantize(nn.Parameter(scale.clone()), torch.zeros(3), 4, 0)
    quantizer(weight).sum().backward()
    ratio = weight / scale[:, None]
    inside = ratio.round().abs() <= top
    each = torch.where(inside, ratio.round() - ratio, ratio.sign() * top)
    expected = each.sum(1) / (50 * top) ** 0.5
    assert torch.allclose(quantizer.scale.grad, expected, rtol=1e-3, atol=1e-4)


def test_an_input_scale_learns_in_bfloat16_too():
    quantizer = LearnedInput(torch.tensor(0.02), torch.tensor(10))
    before = quantizer(torch.ones(4, 8))
    learn_scale(quantizer)
    x = torch.rand(4, 8, requires_grad=True)
    quantizer(x.bfloat16()).sum().backward()
    (ratio,) = quantizer.parameters()
    assert ratio.grad.abs() > 0 and x.grad.abs().sum() > 0
    assert torch.allclose(quantizer(torch.ones(4, 8)), before, atol=1e-6)


def test_settling_changes_no_output(model, data):
    images = data.example(8)
    start = wb.Quantization(weight_bits=4).compress(model, data)
    expected = start(images)
    learning = make_trainable(start, True)
    assert parametrize.is_parametrized(weight_parametrizations(learning[0])[0], "scale")
    assert torch.allclose(settle(learning)(images), expected, atol=1e-5)


def test_a_fixed_input_scale_stays_as_calibrated(model, data):
    start = wb.Quantization(weight_bits=4).compress(model, data)
    small = wb.QuantizationAwareTraining(input_scale="fixed").compress(model, data)
    assert all(torch.equal(small[i].input_quantizer.scale, start[i].input_quantizer.scale) for i in (0, 3, 7, 9))


def test_stopping_keeps_the_best_so_far_and_settles_it(model, data):
    seen = []
    small = wb.QuantizationAwareTraining(epochs=3).compress(model, data, lambda step: seen.append(step) or False)
    assert len(seen) == 1 and type(weight_parametrizations(small[0])[0]) is FakeQuantize and not small.training


def test_no_training_images_says_what_to_pass(model, data):
    with pytest.raises(ValueError, match="needs training images: pass a data set"):
        wb.QuantizationAwareTraining().compress(model, data.example(8))


def test_a_model_in_half_precision_is_refused_in_words(data):
    with pytest.raises(ValueError, match=r"trains fp32 weights: use model\.float\(\)"):
        wb.QuantizationAwareTraining().compress(toy.model().half(), data)


def test_the_seed_decides(model, data):
    few = replace(data, train=data.train.take(256))
    one, same, other = (wb.QuantizationAwareTraining(seed=s).compress(model, few)(data.example(8)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
