"""Masks and quantizers stack on a weight, keep their promises in training, and describe themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from workbench.surgery import clone, remembered, replace_layer, weighted_layers
from workbench.weights import (
    NF4,
    Cast,
    Codebook,
    FakeQuantize,
    InputQuantizer,
    Mask,
    NormalFloat,
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
    assert torch.equal(code.coder.values(code.symbols), layer.weight)


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


# --- group-wise and learned rounding, against torch's operators -----------------------------------------------------


def grouped_quantizer(weight, group_size, bits=4, symmetric=True, learned=False):
    """Return a quantizer whose every group covers its largest magnitude."""
    rows = weight.detach().flatten(1)
    largest = torch.stack([part.abs().amax(1) for part in rows.split(group_size, 1)], 1)
    scale = (largest / (2 ** (bits - 1) - 1)).clamp(min=1e-8)
    zero = torch.zeros_like(scale) if symmetric else torch.randint(-2, 3, scale.shape)
    return FakeQuantize(nn.Parameter(scale) if learned else scale, zero, bits, 0, symmetric, group_size)


@pytest.mark.parametrize("shape", [(6, 32), (4, 3, 5, 5), (1, 7), (5, 1)])
@pytest.mark.parametrize("group_size", [1, 4, 8, 100])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_in_groups_is_torch_on_each_group(shape, group_size, symmetric):
    torch.manual_seed(1)
    weight = torch.randn(shape)
    quantizer = grouped_quantizer(weight, group_size, symmetric=symmetric)
    expected = torch.cat(
        [
            torch.fake_quantize_per_channel_affine(
                part, quantizer.scale[:, i], quantizer.zero_point[:, i], 0, quantizer.quant_min, quantizer.quant_max
            )
            for i, part in enumerate(weight.flatten(1).split(group_size, 1))
        ],
        1,
    ).reshape(shape)
    assert torch.equal(quantizer(weight), expected)
    assert torch.equal(quantizer.values(quantizer.symbols(weight)), expected)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_learned_scale_rounds_the_same_and_gets_the_gradient_of_lsq(axis, symmetric):
    torch.manual_seed(2)
    weight = (3 * torch.randn(5, 40)).requires_grad_()
    scale = torch.rand(5 if axis == 0 else ()) / 2 + 0.1
    zero = torch.zeros_like(scale) if symmetric else torch.full_like(scale, 2)
    fixed = FakeQuantize(scale, zero, 4, axis, symmetric)
    learned = FakeQuantize(nn.Parameter(scale), zero, 4, axis, symmetric)
    assert torch.equal(fixed(weight), learned(weight))
    gradient = torch.randn(5, 40)
    learned(weight).backward(gradient)
    wide, offset = (v.reshape(-1, 1) if axis == 0 else v for v in (scale, zero))
    codes = torch.round(weight.detach() / wide) + offset
    inside = (codes >= fixed.quant_min) & (codes <= fixed.quant_max)
    by_scale = torch.where(
        inside,
        torch.round(weight.detach() / wide) - weight.detach() / wide,
        codes.clamp(fixed.quant_min, fixed.quant_max) - offset,
    )
    slope = by_scale * gradient / (weight.numel() / scale.numel() * fixed.quant_max) ** 0.5
    expected = slope.sum(1) if axis == 0 else slope.sum()
    assert torch.allclose(learned.scale.grad, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(weight.grad, torch.where(inside, gradient, torch.zeros(())))


def test_learned_scales_of_groups_train_and_stay_above_zero():
    layer = layer_of()
    parametrize_weight(layer, grouped_quantizer(layer.weight, 4, learned=True))
    quantizer = weight_parametrizations(layer)[0]
    before = quantizer.scale.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(torch.randn(8, 6)).square().sum().backward()
    optimizer.step()
    assert (quantizer.scale != before).any() and describe(layer).kind == "quantized"
    quantizer.scale.data.fill_(-1)
    assert (
        torch.isfinite(layer.weight).all() and torch.isfinite(quantizer.values(quantizer.symbols(layer.weight))).all()
    )


@pytest.mark.parametrize(("axis", "shape", "size"), [(None, (), 4), (0, (4,), 4), (0, (4, 2), 0)])
def test_groups_that_cannot_be_are_refused(axis, shape, size):
    with pytest.raises(ValueError, match=f"Groups of {size} need axis=0"):
        FakeQuantize(torch.ones(shape), torch.zeros(shape), 4, axis, group_size=size)


# --- codebooks ------------------------------------------------------------------------------------------------------


def codebook_of(weight, levels=(-0.3, 0.0, 0.2, 0.35)):
    levels = torch.tensor(levels)
    return Codebook(levels, (weight.detach()[..., None] - levels).abs().argmin(-1))


def test_levels_get_the_summed_gradient_of_their_weights_and_zero_stays():
    layer = layer_of()
    book = codebook_of(layer.weight)
    parametrize_weight(layer, book)
    gradient = torch.randn(4, 6)
    layer.weight.backward(gradient)
    sums = torch.stack([gradient[book.assigned == k].sum() for k in range(4)])
    sums[1] = 0
    assert torch.allclose(book.levels.grad, sums, atol=1e-6)
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    assert len(layer.weight.unique()) <= 4 and book.levels[1] == 0
    assert (layer.weight[book.assigned == 1] == 0).all()


def test_a_codebook_without_a_zero_still_keeps_pruned_weights_at_zero():
    layer = layer_of()
    parametrize_weight(layer, codebook_of(layer.weight, (-0.3, 0.3)))
    parametrize_weight(layer, Mask(torch.eye(4, 6).bool()))
    code = describe(layer)
    assert code.kind == "clustered" and (code.symbols[~code.mask] == code.coder.zero_symbol).all()
    assert torch.equal(code.coder.values(code.symbols), layer.weight) and int((layer.weight != 0).sum()) == 4


@pytest.mark.parametrize(("levels", "symbols"), [(torch.ones(0), [0]), (torch.ones(258), [0]), (torch.ones(2), [2])])
def test_codebooks_that_cannot_be_are_refused(levels, symbols):
    with pytest.raises(ValueError, match="codebook"):
        Codebook(levels, torch.tensor(symbols))


# --- short floating-point types and normal floats -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.01), torch.tensor([0.5, 2.0, 0.01])])
def test_a_cast_is_torch_there_and_back(dtype, scale):
    torch.manual_seed(3)
    weight, cast = torch.randn(3, 50, requires_grad=True), Cast(dtype, scale)
    wide = 1 if scale is None else scale.reshape(-1, 1) if scale.dim() else scale
    most = torch.finfo(dtype).max
    expected = (weight / wide).clamp(-most, most).to(dtype).float() * wide
    assert torch.equal(cast(weight), expected)
    assert torch.equal(cast.values(cast.symbols(weight)), expected)
    assert torch.equal(cast.values(cast.symbols(expected)), expected)
    cast(weight).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_what_is_too_large_for_a_cast_saturates(dtype):
    weight = torch.tensor([1e6, -1e6, float("inf")], requires_grad=True)
    most = torch.finfo(dtype).max
    assert Cast(dtype)(weight).tolist() == [most, -most, most]
    Cast(dtype)(weight).sum().backward()
    assert weight.grad.tolist() == [0, 0, 0]


def test_a_cast_to_another_type_is_refused():
    with pytest.raises(ValueError, match=r"not to torch\.int8"):
        Cast(torch.int8)


def test_the_levels_of_nf4_are_those_published():
    published = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
    -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634
    0.33791524171829224 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
    assert NF4.tolist() == torch.tensor(list(map(float, published.split()))).tolist()


@pytest.mark.parametrize("group_size", [4, 7, 64])
def test_normal_floats_are_the_nearest_levels_of_their_group(group_size):
    torch.manual_seed(4)
    weight = torch.randn(6, 10)
    weight[0] = 0
    absmax = torch.stack([part.abs().max() for part in weight.flatten().split(group_size)])
    rounded = NormalFloat(absmax, group_size)(weight)
    for part, given, largest in zip(
        weight.flatten().split(group_size), rounded.flatten().split(group_size), absmax, strict=True
    ):
        distance = (part[:, None] - NF4 * largest).abs()
        assert torch.allclose((part - given).abs(), distance.amin(1), atol=1e-7)
        assert torch.isin(given, NF4 * largest).all()


# --- all of them together -------------------------------------------------------------------------------------------

CODERS = {
    "quantized": quantizer_of,
    "grouped": lambda weight: grouped_quantizer(weight, 4),
    "learned": lambda weight: grouped_quantizer(weight, 4, learned=True),
    "clustered": codebook_of,
    "cast": lambda weight: Cast(torch.float8_e4m3fn, torch.tensor(0.003)),
    "normal-float": lambda weight: NormalFloat(weight.detach().abs().flatten().split(8, 0)[0].max().repeat(3), 8),
}


@pytest.mark.parametrize("mask_first", [True, False])
@pytest.mark.parametrize("coder", CODERS)
def test_a_mask_and_any_coder_stack_in_either_order_and_describe_themselves(coder, mask_first):
    layer = layer_of()
    mask, part = Mask(torch.rand(4, 6) > 0.5), CODERS[coder](layer.weight)
    for one in (mask, part) if mask_first else (part, mask):
        parametrize_weight(layer, one)
    code = describe(layer)
    assert code.kind == part.kind and torch.equal(code.mask, mask.mask)
    assert (layer.weight[~mask.mask] == 0).all()
    assert torch.equal(code.coder.values(code.symbols), layer.weight)
    assert len(code.symbols[~mask.mask].unique()) == 1


def test_of_two_coders_the_shorter_one_that_is_exact_is_described():
    layer = layer_of()
    parametrize_weight(layer, codebook_of(layer.weight))
    parametrize_weight(layer, Cast(torch.float16))
    assert describe(layer).kind == "cast"
    other = layer_of()
    parametrize_weight(other, codebook_of(other.weight, (-0.25, 0.0, 0.5)))
    parametrize_weight(other, Cast(torch.float16))
    assert describe(other).kind == "clustered"


def test_a_weight_that_no_coder_gives_is_dense():
    layer = layer_of()
    parametrize_weight(layer, quantizer_of(layer.weight))
    parametrize_weight(layer, nn.Tanh())
    assert describe(layer).kind == "dense" and describe(layer).coder is None


def test_a_bias_is_parametrized_and_described_like_a_weight():
    layer = layer_of()
    parametrize_weight(layer, Codebook(torch.tensor([0.0, 0.5]), torch.tensor([0, 1, 1, 0])), "bias")
    assert describe(layer, "bias").kind == "clustered" and describe(layer).kind == "dense"
    assert layer.bias.tolist() == [0, 0.5, 0.5, 0] and len(weight_parametrizations(layer, "bias")) == 1


def test_baking_may_leave_what_runtimes_have_kernels_for():
    model = nn.Sequential(layer_of(), nn.Linear(4, 4))
    parametrize_weight(model[0], quantizer_of(model[0].weight))
    parametrize_weight(model[1], codebook_of(model[1].weight))
    expected = model(torch.ones(1, 6))
    baked = bake_weights(clone(model), keep_quantizers=True)
    assert weight_parametrizations(baked[0]) and not weight_parametrizations(baked[1])
    assert torch.equal(baked(torch.ones(1, 6)), expected)
