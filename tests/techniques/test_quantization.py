"""Quantization against torch's own operators, and what each setting must do."""

from __future__ import annotations

from itertools import pairwise, product

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from torch import nn

import workbench as wb
from workbench.techniques.quantization import calibration as calibration_module
from workbench.techniques.quantization import weight_quantizer
from workbench.techniques.quantization.calibration import METHODS, entropy_threshold, input_range, input_samples
from workbench.weights import Codebook, FakeQuantize, InputQuantizer, describe, parametrize_weight

CHOICES = list(product((2, 3, 4, 8), ("channel", "tensor", "group"), ("symmetric", "asymmetric"), METHODS))


def weight_of(seed=0, shape=(6, 5, 3, 3)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 2, shape[0]).view(
        -1, *[1] * (len(shape) - 1)
    )


@pytest.mark.parametrize(("bits", "granularity", "scheme", "calibration"), CHOICES)
def test_codes_stand_for_exactly_what_torch_computes(bits, granularity, scheme, calibration):
    weight = weight_of()
    quantizer = weight_quantizer(weight, bits, granularity, scheme, calibration)
    symbols = quantizer.symbols(weight)
    assert symbols.min() >= quantizer.quant_min and symbols.max() <= quantizer.quant_max
    assert len(symbols.unique()) <= 2**bits
    assert torch.equal(quantizer.values(symbols), quantizer(weight))


@pytest.mark.parametrize(("bits", "granularity", "scheme", "calibration"), CHOICES)
def test_zero_stays_exactly_zero_so_that_pruned_weights_stay_pruned(bits, granularity, scheme, calibration):
    weight = weight_of() + 0.3
    weight[:, 1] = 0
    assert (weight_quantizer(weight, bits, granularity, scheme, calibration)(weight)[:, 1] == 0).all()


def test_symmetric_min_max_equals_torch_quantize_per_channel():
    weight = weight_of()
    quantizer = weight_quantizer(weight, 8)
    theirs = torch.quantize_per_channel(weight, quantizer.scale, quantizer.zero_point, 0, torch.qint8)
    assert torch.equal(theirs.int_repr().int(), quantizer.symbols(weight))


@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.7, 5.0])
def test_the_range_of_an_input_is_that_of_torch_s_observer(shift):
    from torch.ao.quantization.observer import MinMaxObserver

    x = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) + shift
    theirs = MinMaxObserver(dtype=torch.quint8, quant_min=0, quant_max=255)
    theirs(x)
    scale, zero = theirs.calculate_qparams()
    model = nn.Sequential(nn.Linear(30, 2)).eval()
    ours = wb.Quantization(calibration="min-max").compress(model, x)[0].input_quantizer
    assert torch.allclose(ours.scale, scale) and int(ours.zero_point) == int(zero)
    wanted = torch.fake_quantize_per_tensor_affine(x, float(ours.scale), int(zero), 0, 255)
    assert torch.equal(ours(x), wanted)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_least_error_calibration_is_never_worse_than_the_extremes(bits):
    weight = weight_of(shape=(4, 2000))
    errors = {m: (weight_quantizer(weight, bits, calibration=m)(weight) - weight).square().mean() for m in METHODS}
    assert errors["mse"] <= errors["min-max"] * 1.0001 and errors["mse"] <= errors["percentile"] * 1.0001


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_error_falls_with_every_bit(granularity):
    weight = weight_of()
    errors = [(weight_quantizer(weight, b, granularity)(weight) - weight).square().mean() for b in range(2, 9)]
    assert all(more > less for more, less in pairwise(errors))


def test_one_scale_a_channel_beats_one_a_layer():
    weight = weight_of()
    error = {g: (weight_quantizer(weight, 4, g)(weight) - weight).square().mean() for g in ("channel", "tensor")}
    assert error["channel"] < error["tensor"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=40), st.sampled_from(CHOICES))
def test_any_finite_weight_gets_finite_levels(values, choice):
    weight = torch.tensor(values)[None]
    quantizer = weight_quantizer(weight, *choice)
    assert torch.isfinite(quantizer(weight)).all() and (quantizer.scale > 0).all()


def test_a_channel_of_zeros_stays_zero():
    assert (weight_quantizer(torch.zeros(2, 4), 4)(torch.zeros(2, 4)) == 0).all()


def test_both_parts_are_attached_and_can_be_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(32, 4)
    both = wb.Quantization().compress(model, x)
    assert isinstance(both[2].input_quantizer, InputQuantizer) and describe(both[2]).kind == "quantized"
    weights = wb.Quantization(activation_bits=32).compress(model)
    assert not hasattr(weights[0], "input_quantizer") and describe(weights[0]).kind == "quantized"
    inputs = wb.Quantization(weight_bits=32).compress(model, x)
    assert hasattr(inputs[0], "input_quantizer") and describe(inputs[0]).kind == "dense"


def test_inputs_inside_the_calibrated_range_move_by_at_most_half_a_step():
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.rand(64, 4) * 3 - 1
    quantizer = wb.Quantization(calibration="min-max").compress(model, x)[0].input_quantizer
    assert ((quantizer(x) - x).abs() <= quantizer.scale * 0.501).all()


def test_activations_without_images_say_what_to_pass():
    with pytest.raises(ValueError, match="pass data, or a batch of images, or set activation_bits=32"):
        wb.Quantization().compress(nn.Linear(2, 2))


def test_gradients_pass_straight_through_inside_the_range():
    weight = torch.tensor([[0.2, -0.4, 5.0]], requires_grad=True)
    quantizer = FakeQuantize(torch.tensor(0.1), torch.tensor(0), 4, None)
    quantizer(weight).sum().backward()
    assert weight.grad.tolist() == [[1.0, 1.0, 0.0]]


def test_small_groups_have_less_error_than_channels():
    weight = weight_of(shape=(4, 256))
    error = lambda *how: (weight_quantizer(weight, 4, *how)(weight) - weight).square().mean()
    assert error("group", "symmetric", "mse", 16) < error("group", "symmetric", "mse", 64) < error("channel")


def test_a_group_as_long_as_the_channel_is_the_channel():
    weight = weight_of(shape=(4, 60))
    group, channel = weight_quantizer(weight, 4, "group", group_size=60), weight_quantizer(weight, 4, "channel")
    assert torch.equal(group(weight), channel(weight))


def slow_entropy_threshold(values, levels, bins=2048, step=256):
    """The published pseudo-code (Migacz, 2017), number by number."""
    counts, edges = numpy.histogram(values, bins, (0, values.max()))
    best, least = None, numpy.inf
    for i in range(levels, bins + 1, step):
        p = counts[:i].astype(float)
        p[-1] += counts[i:].sum()
        q = numpy.zeros(i)
        where = [[j for j in range(i) if j * levels // i == level] for level in range(levels)]
        for places in where:
            filled = [j for j in places if p[j] > 0]
            for j in filled:
                q[j] = max(counts[places].sum() / len(filled), 1e-4)
        divergence = entropy(p, q)
        if divergence <= least:
            best, least = i, divergence
    return edges[best]


def test_entropy_threshold_equals_the_slow_reference(monkeypatch):
    monkeypatch.setattr(calibration_module, "BIN_STEP", 256)
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).abs() ** 3
    assert entropy_threshold(values, 256) == pytest.approx(slow_entropy_threshold(values.numpy(), 256), rel=0.01)


def test_entropy_calibration_cuts_a_long_tail_and_keeps_a_uniform_range():
    model, generator = nn.Sequential(nn.Linear(4, 2)), torch.Generator().manual_seed(0)
    even = torch.rand(10_000, 4, generator=generator)
    tail = torch.randn(10_000, 4, generator=generator)
    tail[0, 0] = 1000.0
    high = lambda x: float(input_range(input_samples(model, x)["0"], "kl", 0, 255)[1])
    assert high(even) > 0.95 and high(tail) < 500


def test_a_codebook_keeps_its_number_of_levels():
    layer = nn.Linear(8, 6)
    parametrize_weight(layer, Codebook(torch.tensor([-0.5, 0.0, 0.3, 0.7]), torch.randint(0, 4, (6, 8))))
    small = wb.Quantization(weight_bits=8, activation_bits=32).compress(nn.Sequential(layer))
    assert len(small[0].weight.unique()) <= 4 and (small[0].weight[layer.weight == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_is_handled_or_refused_in_words(dtype):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)
    x = torch.randn(8, 4).to(dtype)
    small = wb.Quantization().compress(model, x)
    assert small(x).dtype == dtype and torch.isfinite(small(x)).all()
