"""Masks and quantizers stack on a weight, keep their promises in training, and describe themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from workbench.surgery import clone, remembered, replace_layer, weighted_layers
from workbench.weights import (
    FakeQuantize,
    InputQuantizer,
    Mask,
    attach_input_quantizer,
    bake_weights,
    describe,
    parametrize_weight,
    sparsity,
    weight_parametrizations,
)


def layer_of(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(6, 4)


def quantizer_of(weight, bits=4):
    return FakeQuantize(weight.detach().abs().amax(1) / (2 ** (bits - 1) - 1), torch.zeros(len(weight)), bits, 0)


def test_pruned_weights_stay_zero_while_the_others_train():
    layer = layer_of()
    mask = torch.rand(4, 6) > 0.5
    parametrize_weight(layer, Mask(mask))
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
    before = layer.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    assert (layer.weight[~mask] == 0).all()
    assert (layer.weight[mask] != before[mask]).all()


@pytest.mark.parametrize("mask_first", [True, False])
def test_mask_and_quantizer_stack_in_either_order(mask_first):
    layer = layer_of()
    mask, quantizer = Mask(torch.rand(4, 6) > 0.5), quantizer_of(layer.weight)
    for part in (mask, quantizer) if mask_first else (quantizer, mask):
        parametrize_weight(layer, part)
    code = describe(layer)
    assert code.kind == "quantized" and torch.equal(code.mask, mask.mask)
    assert (code.symbols[~mask.mask] == 0).all()
    assert torch.equal(code.quantizer.values(code.symbols), layer.weight)


def test_describe_tells_dense_and_masked_apart():
    layer = layer_of()
    assert describe(layer).kind == "dense" and describe(layer).mask is None
    parametrize_weight(layer, Mask(torch.eye(4, 6).bool()))
    assert describe(layer).kind == "masked" and int(describe(layer).mask.sum()) == 4
    assert sparsity(layer) == pytest.approx(20 / 24)


def test_a_mask_holds_exact_zero_even_over_infinity():
    layer = layer_of()
    layer.weight.data[0, 0] = float("inf")
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[0, 0] = False
    parametrize_weight(layer, Mask(mask))
    assert layer.weight[0, 0] == 0


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_that_cannot_be_are_refused(bits):
    with pytest.raises(ValueError, match=f"2 to 8 bits, not {bits}"):
        FakeQuantize(torch.tensor(1.0), torch.tensor(0), bits, None)


def test_an_input_quantizer_survives_a_copy_and_is_replaced_not_doubled():
    layer = layer_of()
    coarse, fine = (InputQuantizer(torch.tensor(s), torch.tensor(128)) for s in (0.5, 0.01))
    attach_input_quantizer(layer, coarse)
    attach_input_quantizer(layer, fine)
    x = torch.rand(3, 6)
    expected = nn.functional.linear(fine(x), layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


def test_baking_a_copy_leaves_the_original_parametrized():
    layer = layer_of()
    parametrize_weight(layer, quantizer_of(layer.weight))
    baked = bake_weights(clone(layer))
    assert not weight_parametrizations(baked) and type(baked) is nn.Linear
    assert torch.equal(baked.weight, layer.weight) and len(weight_parametrizations(layer)) == 1


def test_clone_shares_nothing_and_is_in_eval_mode():
    model = nn.Sequential(layer_of(), nn.Dropout()).train()
    copied = clone(model)
    copied[0].weight.data.zero_()
    assert model[0].weight.abs().sum() > 0 and not copied.training and model.training


def test_weighted_layers_come_in_order_and_can_be_replaced():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.Linear(2, 2)))
    assert [name for name, _ in weighted_layers(model)] == ["0", "2.0"]
    new = nn.Linear(2, 5)
    replace_layer(model, "2.0", new)
    assert model[2][0] is new
    with pytest.raises(AttributeError, match=r"no layer called '2\.1'"):
        replace_layer(model, "2.1", new)


def test_what_is_remembered_is_forgotten_when_a_weight_changes():
    layer, calls = layer_of(), []
    compute = lambda: calls.append(1) or len(calls)
    assert [remembered(layer, "k", compute) for _ in range(3)] == [1, 1, 1]
    assert remembered(layer, "other", compute) == 2
    with torch.no_grad():
        layer.weight.add_(1)
    assert remembered(layer, "k", compute) == 3
    assert remembered(layer_of(), "k", compute) == 4
