"""Entropy-aware training: the estimate is the coder's own size, the loss pulls towards it, and zeros stay."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import workbench as wb
from workbench.artifact.coding import entropy_encode, histogram
from workbench.techniques.coding.entropy_aware import _attach, coded_bits, symbol_bits, without_unread_channels
from workbench.weights import describe, sparsity

TRAINING = wb.EntropyAwareTraining(epochs=6, learning_rate=0.06, augment=False)


@pytest.fixture(scope="module")
def data():
    return toy.data(val=200, test=8)


@pytest.fixture(scope="module")
def model():
    return toy.model()


def symbols_like(shape, chance, seed=0):
    """Symbols -3 … 3, zero but for `chance` of them, smaller ones more often."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) < chance
    sizes = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), kept.numel(), True, generator=generator).view(shape) + 1
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return kept * sizes * signs


@pytest.mark.parametrize("chance", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("shape", [(200, 300), (40, 30, 5, 5)])
def test_the_estimate_is_what_the_entropy_coder_writes(shape, chance):
    symbols = symbols_like(shape, chance)
    flat = symbols.flatten().numpy()
    written = 8 * sum(map(len, entropy_encode(flat, *histogram(flat))))
    assert float(coded_bits(symbols.float(), symbol_bits(symbols, 3))) == pytest.approx(written, rel=0.06)


def test_crowded_rows_and_columns_make_a_symbol_cheaper():
    symbols = torch.zeros(20, 30, dtype=torch.long)
    symbols[3], symbols[:, 7] = 1, 1
    bits = symbol_bits(symbols, 3)
    assert bits.one[3, 7] < bits.one[3, 0] < bits.one[0, 0]
    assert bits.zero[3, 7] > bits.zero[3, 0] > bits.zero[0, 0]


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 0.6), st.integers(1, 7), st.integers(0, 99))
def test_a_larger_symbol_never_costs_less_and_whole_ones_cost_their_price(chance, largest, seed):
    symbols = symbols_like((12, 9), chance, seed).clamp(-largest, largest)
    bits = symbol_bits(symbols, largest)
    flat = [float(coded_bits(torch.full((12, 9), size), bits)) for size in torch.arange(0, largest + 0.5, 0.25)]
    assert all(a <= b + 1e-3 for a, b in pairwise(flat))
    assert flat[0] == pytest.approx(float(bits.zero.sum()), rel=1e-5)
    if (bits.one + bits.magnitude[0] - bits.zero).min() > 0.1:
        top = float((bits.one + bits.magnitude[-1]).sum())
        assert flat[4 * largest] == pytest.approx(top, rel=1e-4)


def test_the_slope_pulls_every_level_to_zero():
    levels = torch.tensor([[-2.5, -0.4, 0.3, 1.7]], requires_grad=True)
    coded_bits(levels, symbol_bits(torch.tensor([[-2, 0, 1, 1]]), 3)).backward()
    assert torch.equal(levels.grad.sign(), levels.detach().sign())


@pytest.mark.parametrize("weight", [torch.linspace(0.99, 1.01, 40), torch.full((40,), 0.1), torch.tensor([0.3])])
def test_weights_on_one_side_of_zero_start_in_reach(weight):
    layer = nn.Linear(len(weight), 1)
    with torch.no_grad():
        layer.weight.copy_(weight[None])
    _attach(layer, "weight", 3)
    assert float((layer.weight - weight).abs().max() / weight.max()) < 0.3


def test_a_higher_price_makes_a_smaller_file_of_few_symbols(model, data):
    cheap, dear = (replace(TRAINING, strength=s) for s in (0.1, 20.0))
    first, second = cheap.compress(model, data), dear.compress(model, data)
    assert len(wb.encode(second)) < len(wb.encode(first)) < len(wb.encode(model)) / 8
    assert sparsity(second) > sparsity(first)
    for layer in (second[0], second[7]):
        code = describe(layer)
        assert code.kind == "quantized" and int(code.symbols.abs().max()) <= 3
    assert wb.evaluate(first, data.val).value > 0.7


def test_what_was_pruned_stays_pruned_and_what_it_zeroes_stays_zero(model, data):
    pruned = wb.MagnitudePruning(sparsity=0.5).compress(model, data)
    trained = wb.EntropyAwareTraining(epochs=1, augment=False).compress(pruned, data)
    if trained[0].weight.shape == pruned[0].weight.shape:
        assert not trained[0].weight[pruned[0].weight == 0].any()
    before = trained[7].weight == 0
    later = wb.Pipeline([wb.MagnitudePruning(sparsity=0.1, finetune=1)]).compress(trained, data)
    assert not later[7].weight[before].any()


def test_layers_that_are_coded_already_are_left_alone(model, data):
    quantized = wb.Quantization(weight_bits=4, activation_bits=32).compress(model, data)
    for layer in (quantized[0], quantized[3], quantized[7], quantized[9]):
        layer.bias = None
    with pytest.raises(ValueError, match="left to round"):
        TRAINING.compress(quantized, data)


def test_channels_that_nobody_reads_are_cut_out_and_answers_stay(data):
    net = copy.deepcopy(toy.model())
    with torch.no_grad():
        net[3].weight[:, [2, 5]] = 0
        net[7].weight[:, 16 * 3 : 16 * 4] = 0
        net[9].weight[:, :40] = 0
    answers = net(data.example(8))
    small = without_unread_channels(net, data.example())
    assert (small[0].out_channels, small[3].out_channels, small[7].out_features) == (30, 31, 60)
    torch.testing.assert_close(small(data.example(8)), answers)


def test_a_model_that_cannot_be_followed_keeps_its_channels():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.second(self.first(x)) if x.sum() > 0 else self.second(x)

    net = Branching()
    with torch.no_grad():
        net.second.weight[:, 0] = 0
    assert without_unread_channels(net, torch.ones(2, 4)).first.out_features == 4


def test_it_stops_when_told_and_returns_symbols(model, data):
    seen = []
    small = TRAINING.compress(model, data, lambda step: seen.append(step) or len(seen) < 3)
    assert len(seen) == 3 and describe(small[0]).kind == "quantized" and not small.training


def test_an_interrupted_training_goes_on_from_its_checkpoint(model, data, tmp_path):
    training, steps = replace(TRAINING, epochs=2, checkpoint=tmp_path / "part.safetensors"), []
    training.compress(model, data, lambda step: step.epoch == 0)
    training.compress(model, data, lambda step: steps.append(step.epoch))
    assert set(steps) == {1}


def test_bad_input_is_refused_with_a_reason(model, data):
    with pytest.raises(ValueError, match="load_data"):
        TRAINING.compress(model, data.example())
    with pytest.raises(ValueError, match="float32"):
        TRAINING.compress(copy.deepcopy(model).half(), data)
    with pytest.raises(ValueError, match="NaN"):
        broken = copy.deepcopy(model)
        broken[0].weight.data[0] = torch.nan
        TRAINING.compress(broken, data)
    tied = nn.Sequential(nn.Flatten(), nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 8))
    tied[2].weight = tied[1].weight
    with pytest.raises(ValueError, match="share one weight"):
        TRAINING.compress(tied, data)
