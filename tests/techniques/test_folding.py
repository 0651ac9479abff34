"""Folding, equalization and bias correction against torch's own fusion, and what each must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

import workbench as wb
from workbench.techniques.quantization.bias_correction import correct_bias, mean_inputs
from workbench.techniques.quantization.equalization import equalize_layers
from workbench.techniques.quantization.structure import Pair, fold_norms, norm_pairs, scale_pairs, tied_layers
from workbench.weights import Codebook, Mask, attach_input_quantizer, describe, parametrize_weight

CLASSES = 4


def awake(model, seed=0):
    """Give every BatchNorm statistics and every layer channels of very different sizes, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
        elif isinstance(layer, (nn.Linear, nn.Conv2d)) and len(layer.weight) != CLASSES:
            size = torch.rand(len(layer.weight), generator=generator) * 4 - 2
            layer.weight.data.mul_(10 ** size.reshape(-1, *[1] * (layer.weight.dim() - 1)))
    return model.eval()


def chain():
    """Convolutions with BatchNorm, a depthwise one, pooling, flattening and two linear layers."""
    torch.manual_seed(0)
    return awake(
        nn.Sequential(
            *(nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.LeakyReLU()),
            *(nn.Flatten(), nn.Linear(96, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, CLASSES)),
        )
    )


X = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_folding_gives_the_weights_of_torch_s_own_fusion():
    model = chain()
    folded = fold_norms(copy.deepcopy(model))
    for first, norm in ((0, 1), (3, 4), (7, 8)):
        theirs = fuse_conv_bn_eval(model[first], model[norm])
        assert torch.allclose(folded[first].weight, theirs.weight) and torch.allclose(folded[first].bias, theirs.bias)
        assert type(folded[norm]) is nn.Identity
    theirs = fuse_linear_bn_eval(model[11], model[12])
    assert torch.allclose(folded[11].weight, theirs.weight) and torch.allclose(folded[11].bias, theirs.bias)
    assert close(folded(X), model(X))


def test_equalization_keeps_the_outputs_and_evens_the_ranges():
    folded = fold_norms(chain())
    equal = equalize_layers(copy.deepcopy(folded))
    assert close(equal(X), folded(X))
    made, read = equal[0].weight.abs().flatten(1).amax(1), equal[3].weight.abs().flatten(1).amax(1)
    assert torch.allclose(made, read, rtol=0.01)
    spread = lambda layer: float(layer.weight.abs().flatten(1).amax(1).log().std())
    assert spread(equal[0]) < spread(folded[0])


def test_pairs_are_found_through_what_commutes_with_a_factor():
    pairs = scale_pairs(fold_norms(chain()))
    assert pairs == [Pair("0", "3"), Pair("3", "7"), Pair("7", "11"), Pair("11", "14")]


@pytest.mark.parametrize(
    "between", [nn.Sigmoid(), nn.GELU(), nn.ReLU6(), nn.Softmax(1), nn.LayerNorm(6)], ids=lambda m: type(m).__name__
)
def test_no_pair_across_what_does_not_commute(between):
    assert scale_pairs(nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 3))) == []


@pytest.mark.parametrize(
    "technique", [wb.Quantization(activation_bits=32, fold=True), wb.AWQ(weight_bits=8)], ids=["fold", "AWQ"]
)
def test_a_norm_over_tokens_is_not_taken_for_one_over_features(technique):
    x = torch.randn(16, 6, 6, generator=torch.Generator().manual_seed(2))
    model = awake(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES)))
    error = (technique.compress(model, x)(x) - model(x)).abs().max() / model(x).abs().max()
    assert error < 0.05
    assert norm_pairs(model) == [] and scale_pairs(model) == []


class Shared(nn.Module):
    """The first layer is read twice, and the last one is called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.a(x)
        x = x + self.b(torch.relu(x))
        return self.norm(self.c(self.c(x)))


def test_layers_that_others_read_too_are_left_alone():
    model = Shared().eval()
    assert scale_pairs(model) == [] and norm_pairs(model) == []


def test_masks_survive_and_coded_layers_are_left_alone():
    model = chain()
    parametrize_weight(model[0], Mask(torch.rand(8, 2, 3, 3) > 0.5))
    parametrize_weight(model[7], Codebook(torch.tensor([-1.0, 0.0, 1.0]), torch.randint(0, 3, (6, 8, 3, 3))))
    equal = equalize_layers(fold_norms(copy.deepcopy(model)))
    assert close(equal(X), model(X))
    assert ((equal[0].weight == 0) == (model[0].weight == 0)).all()
    assert describe(equal[7]).kind == "clustered" and isinstance(equal[8], nn.BatchNorm2d)


def test_an_input_that_is_quantized_already_keeps_its_scale():
    model = fold_norms(chain())
    quantized = wb.Quantization(weight_bits=32).compress(model, X)
    attach_input_quantizer(model[3], quantized[3].input_quantizer)
    assert Pair("0", "3") not in scale_pairs(model)


def test_bias_correction_takes_the_mean_error_away():
    model = chain()
    means = mean_inputs(model, X)
    small = wb.Quantization(weight_bits=3, activation_bits=32, granularity="tensor").compress(model)
    for name in ("0", "3", "7"):
        layer = small.get_submodule(name)
        seen = []
        handle = model.get_submodule(name).register_forward_pre_hook(lambda _l, args, seen=seen: seen.append(args[0]))
        model(X)
        handle.remove()
        exact = model.get_submodule(name)(seen[0]).mean((0, 2, 3))
        before = (layer(seen[0]).mean((0, 2, 3)) - exact).abs().max()
        correct_bias(layer, model.get_submodule(name).weight.detach(), means[name])
        after = (layer(seen[0]).mean((0, 2, 3)) - exact).abs().max()
        assert after < 1e-4 * max(1.0, float(exact.abs().max())) and after < before


def test_equalization_and_correction_make_one_scale_a_tensor_usable():
    model = chain()
    error = lambda **more: float(
        (
            wb.Quantization(weight_bits=6, activation_bits=32, granularity="tensor", **more).compress(model, X)(X)
            - model(X)
        )
        .square()
        .mean()
    )
    assert error(equalize=True) < error(fold=True)
    assert error(bias_correction=True) < error()


def test_bias_correction_without_images_says_what_to_pass():
    with pytest.raises(ValueError, match="Bias correction needs images"):
        wb.Quantization(activation_bits=32, bias_correction=True).compress(chain())


def test_a_model_that_cannot_be_followed_is_named():
    class Wild(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="channels of Wild cannot be followed"):
        wb.Quantization(activation_bits=32, fold=True).compress(Wild())


def test_layers_that_share_a_weight_come_together():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert tied_layers(model) == [["0", "2"]]
