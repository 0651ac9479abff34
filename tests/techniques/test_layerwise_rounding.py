"""GPTQ against a slow reference of its formula; all three against rounding to nearest, by the error of the outputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import workbench as wb
from workbench.surgery import clone
from workbench.techniques.moments import input_rows, moment_root, second_moments
from workbench.techniques.quantization.adaround import adaround
from workbench.techniques.quantization.awq import Energy, awq_factors
from workbench.techniques.quantization.gptq import BLOCK, gptq, inverse_factor
from workbench.techniques.quantization.layerwise import output_errors
from workbench.techniques.quantization.post_training import weight_quantizer
from workbench.weights import Codebook, Mask, describe, parametrize_weight, sparsity

KINDS = {"GPTQ": wb.GPTQ, "AWQ": wb.AWQ, "AdaRound": partial(wb.AdaRound, iterations=100)}


def layer_of(m=12, n=150, seed=0):
    """Return a weight (m, n) and the second moment of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(400, n // 3, generator=generator) @ torch.randn(n // 3, n, generator=generator)
    inputs = inputs.relu() * torch.logspace(-1, 1, n)[torch.randperm(n, generator=generator)]
    return torch.randn(m, n, generator=generator), (inputs.T @ inputs / len(inputs)).double()


def slow_gptq(weight, moment, quantizer, damping=0.01):
    """Algorithm 1 as formulas (2) and (3) of the paper say it: the inverse is updated after every column."""
    weight, m = weight.double().clone(), moment.double().clone()
    m += damping * m.diagonal().mean() * torch.eye(len(m))
    inverse = torch.linalg.inv(m)
    scale = quantizer.along_weight(quantizer.scale, weight.shape).double().expand(weight.shape)
    codes = torch.zeros_like(weight)
    for q in range(weight.shape[1]):
        codes[:, q] = (weight[:, q] / scale[:, q]).round().clamp(quantizer.quant_min, quantizer.quant_max)
        error = (weight[:, q] - codes[:, q] * scale[:, q]) / inverse[q, q]
        weight -= error[:, None] * inverse[q]
        inverse -= torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
    return codes


@pytest.mark.parametrize(("bits", "granularity"), [(2, "channel"), (4, "channel"), (3, "group")])
def test_gptq_equals_the_slow_reference(bits, granularity):
    weight, moment = layer_of(n=2 * BLOCK + 7)
    quantizer = weight_quantizer(weight, bits, granularity, "symmetric", "mse", 32)
    (codes,) = gptq(weight, inverse_factor(moment), [quantizer])
    same = (codes == slow_gptq(weight, moment, quantizer)).float().mean()
    assert same > 0.995  # single precision may tip a tie


def test_gptq_serves_several_quantizers_in_one_pass():
    weight, moment = layer_of()
    quantizers = [weight_quantizer(weight, bits) for bits in (2, 4, 8)]
    factor = inverse_factor(moment)
    for together, quantizer in zip(gptq(weight, factor, quantizers), quantizers, strict=True):
        assert (together == gptq(weight, factor, [quantizer])[0]).float().mean() > 0.999


@pytest.mark.parametrize("bits", [3, 4])
def test_learned_and_compensated_rounding_beat_the_nearest(bits):
    weight, moment = layer_of()
    quantizer = weight_quantizer(weight, bits, calibration="mse")
    error = lambda values: float(output_errors(values - weight, moment).sum())
    nearest = error(quantizer(weight))
    learned = adaround(weight, moment_root(moment).float(), quantizer, iterations=200)
    compensated = gptq(weight, inverse_factor(moment), [quantizer])[0] * quantizer.scale[:, None]
    assert torch.equal(quantizer(learned), learned)
    assert ((learned - weight).abs() <= quantizer.scale[:, None] * 1.001)[
        learned.abs() < quantizer.scale[:, None]
    ].all()
    assert error(learned) < 0.6 * nearest and error(compensated) < 0.6 * nearest


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_scaling_by_activations_is_never_worse_than_the_nearest(granularity):
    weight, moment = layer_of(n=160)
    grid = {"granularity": granularity, "group_size": 32}
    sizes = moment.diagonal().sqrt().float()
    factors = awq_factors(weight, sizes, Energy.of(moment), 3, grid)
    near = lambda w: weight_quantizer(w, 3, calibration="mse", **grid)(w)
    error = lambda values: float(output_errors(values - weight, moment).sum())
    assert error(near(weight * factors) / factors) <= error(near(weight))
    assert granularity == "group" or len(factors.unique()) > 1


@pytest.mark.parametrize("exact", [10_000, 100], ids=["exact", "random projections"])
def test_main_directions_and_the_rest_tell_the_error_of_the_outputs(exact, monkeypatch):
    monkeypatch.setattr("workbench.techniques.quantization.awq.EXACT", exact)
    weight, moment = layer_of(n=400)
    change = 0.1 * weight * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    energy = Energy.of(moment)
    assert energy.error(change) == pytest.approx(float(output_errors(change, moment).sum()), rel=0.05)
    assert torch.equal(energy.directions, Energy.of(moment).directions)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3, groups=12), nn.ReLU(), nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 4)),
    )
    with torch.no_grad():
        for _ in range(30):
            model(torch.randn(64, 2, 8, 8))
    return model.eval()


X = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_a_layer_s_outputs_are_nearer_than_with_rounding_to_nearest(kind, granularity):
    model = network()
    settings = {"weight_bits": 3, "granularity": granularity, "group_size": 16}
    small = kind(**settings).compress(model, X)
    nearest = wb.Quantization(activation_bits=32, **settings).compress(model)
    with torch.no_grad():
        exact = model(X)
        assert (small(X) - exact).square().mean() < (nearest(X) - exact).square().mean()
    assert describe(small[3]).kind == "quantized" and len(describe(small[3]).symbols.unique()) <= 7


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_pruned_weights_stay_zero(kind):
    model = wb.MagnitudePruning(sparsity=0.6).compress(network())
    small = kind(weight_bits=4).compress(model, X)
    for before, after in zip(model, small, strict=True):
        if hasattr(before, "parametrizations"):
            assert (after.weight[before.weight == 0] == 0).all()
    assert sparsity(small) >= sparsity(model)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_codebook_keeps_its_number_of_levels(kind):
    model = network()
    parametrize_weight(model[3], Codebook(torch.tensor([-0.2, 0.0, 0.1, 0.3]), torch.randint(0, 4, (12, 8, 3, 3))))
    small = kind(weight_bits=8).compress(model, X)
    assert len(small[3].weight.unique()) <= 4


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_layers_that_share_a_weight_get_the_same(kind):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    parametrize_weight(model[0], Mask(torch.ones(6, 6, dtype=torch.bool)))
    small = kind().compress(nn.Sequential(*clone(model)), torch.randn(40, 6))
    assert torch.equal(small[0].weight, small[2].weight)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_bad_input_is_answered_in_words(kind):
    with pytest.raises(ValueError, match=f"{type(kind()).__name__} looks at the inputs of layers: pass data"):
        kind().compress(network())
    broken = network()
    broken[3].weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '3' holds NaN"):
        kind().compress(broken, X)


def test_stopping_rounds_the_rest_to_nearest_and_tells_the_error_of_each_layer():
    steps, all_steps, model = [], [], network()
    wb.AdaRound(weight_bits=3, iterations=50).compress(model, X, all_steps.append)
    small = wb.AdaRound(weight_bits=3, iterations=50).compress(model, X, lambda step: steps.append(step) or False)
    nearest = wb.Quantization(weight_bits=3, activation_bits=32).compress(model)
    assert len(all_steps) == 5 and 0 < steps[0].loss < 1 and steps[0].steps == 5
    assert len(steps) == 1 and steps[0].loss == all_steps[0].loss
    assert torch.equal(small[10].weight, nearest[10].weight)


def test_the_moment_is_that_of_the_layer_s_rows():
    model = network()
    rows = input_rows(model[0], X)
    error = output_errors(torch.ones(1, 18), second_moments(model, [X])["0"])
    assert float(error) == pytest.approx(float(rows.sum(1).square().mean()), rel=1e-4)
