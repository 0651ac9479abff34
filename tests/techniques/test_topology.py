"""Separable and pointwise convolutions: exact where they can be, the best fit where they cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import workbench as wb
from workbench.techniques.moments import second_moments
from workbench.techniques.topology.depthwise import separated
from workbench.techniques.topology.pointwise import pointwise_fit, squeeze_factors


def kernel(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def patches(*shape):
    """Return images whose neighbours are alike, as those of a trained network are."""
    return torch.nn.functional.avg_pool2d(kernel(*shape), 3, 1) + 0.2


def built(filters, mixture):
    """Return the kernel (outputs, inputs, places) that filters and their mixture make."""
    return torch.einsum("oim,imt->oit", mixture, filters[:, : mixture.shape[2]])


@pytest.mark.parametrize("multiplier", [1, 2, 4])
def test_filters_of_the_weight_are_the_best_for_each_input_channel(multiplier):
    weight = kernel(16, 5, 3, 3)
    filters, mixtures = separated(weight, None)
    error = (weight.flatten(2) - built(filters, mixtures[multiplier - 1])).square().sum((0, 2))
    values = torch.linalg.svdvals(weight.flatten(2).transpose(0, 1))
    assert torch.allclose(error, values[:, multiplier:].square().sum(1), rtol=1e-4)  # Eckart and Young


def test_mixtures_fit_the_outputs_as_torch_would_fit_them():
    x, layer = patches(6, 5, 14, 14), nn.Conv2d(5, 16, 3, bias=False)
    moment = second_moments(nn.Sequential(layer), [x])["0"]
    filters, mixtures = separated(layer.weight.detach(), moment)
    rows = nn.functional.unfold(x, 3).transpose(1, 2).flatten(0, 1).double()
    exact = rows @ layer.weight.detach().flatten(1).double().T
    seen = torch.einsum("nit,imt->nim", rows.view(-1, 5, 9), filters.double())
    for multiplier, mixture in enumerate(mixtures, 1):
        part = seen[:, :, :multiplier].flatten(1)
        best = torch.linalg.lstsq(part, exact).solution
        ours = rows @ built(filters, mixture).flatten(1).double().T
        assert (exact - ours).square().sum() < 1.02 * (exact - part @ best).square().sum() + 1e-4


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [{"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}], ids=str)
def test_a_separable_kernel_computes_the_same(shape, bias):
    layer = nn.Conv2d(8, 12, 3, bias=bias, **shape)
    with torch.no_grad():
        layer.weight.copy_(kernel(12, 8, 1, 1) * kernel(1, 8, 3, 3, seed=1))
    small = wb.DepthwiseSeparable(multiplier=1).compress(nn.Sequential(layer))
    assert [part.groups for part in small[0]] == [8, 1]
    x = kernel(2, 8, 9, 10)
    assert torch.allclose(small(x), layer(x), atol=1e-4)


def test_outputs_are_closer_with_each_filter_more_and_closer_than_without_images():
    x, layer = patches(8, 6, 12, 12), nn.Conv2d(6, 20, 3, bias=False)
    moment = second_moments(nn.Sequential(layer), [x])["0"]
    weight = layer.weight.detach()

    def error(moment_seen, multiplier):
        filters, mixtures = separated(weight, moment_seen)
        change = (weight.flatten(2) - built(filters, mixtures[multiplier - 1])).flatten(1).double()
        return float((change @ moment * change).sum())

    fitted = [error(moment, multiplier) for multiplier in (1, 2, 3, 4)]
    assert fitted == sorted(fitted, reverse=True) and len(set(fitted)) == 4
    assert fitted[0] < 0.9 * error(None, 1)


def test_a_layer_that_would_grow_and_a_grouped_one_are_left_alone():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1))
    small = wb.DepthwiseSeparable(multiplier=4).compress(model)
    assert [type(layer) for layer in small] == [nn.Conv2d] * 3


LAYERS = [
    nn.Conv2d(6, 8, 3, padding=1),
    nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False),
    nn.Conv2d(6, 8, 5),
    nn.Conv2d(6, 8, 3, padding="same", dilation=2),
    nn.Conv2d(6, 8, (3, 1), padding=2, stride=(1, 2)),
    nn.Conv2d(6, 8, 3, padding="valid"),
    nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    nn.Conv1d(6, 8, 3, padding=1, stride=2),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_kernel_that_reads_only_its_middle_is_replaced_exactly(layer):
    with torch.no_grad():
        middle = tuple(size // 2 for size in layer.kernel_size)
        taps = layer.weight[(..., *middle)].clone()
        layer.weight.zero_()
        layer.weight[(..., *middle)] = taps
    small = wb.PointwiseConvolution(replaced=1.0).compress(nn.Sequential(layer))
    x = kernel(2, 6, 11) if isinstance(layer, nn.Conv1d) else kernel(2, 6, 11, 12)
    assert small(x).shape == layer(x).shape and torch.allclose(small(x), layer(x), atol=1e-5)
    assert sum(p.numel() for p in small.parameters() if p.dim() > 1) == 6 * 8


@pytest.mark.parametrize("layer", [nn.Conv2d(6, 8, 2), nn.Conv1d(6, 8, 3)], ids=str)
def test_a_layer_that_no_pointwise_one_can_stand_in_for_stays(layer):
    small = wb.PointwiseConvolution(replaced=1.0, squeeze=1.0).compress(nn.Sequential(layer))
    assert torch.equal(small[0].weight, layer.weight)


def test_the_pointwise_weight_is_the_one_that_torch_would_fit():
    x, layer = patches(6, 5, 14, 14), nn.Conv2d(5, 16, 3, bias=False)
    weight = layer.weight.detach().flatten(2)
    fit, lost = pointwise_fit(weight, second_moments(nn.Sequential(layer), [x])["0"])
    rows = nn.functional.unfold(x, 3).transpose(1, 2).flatten(0, 1).double()
    exact, middle = rows @ weight.flatten(1).double().T, rows.view(-1, 5, 9)[:, :, 4]
    best = middle @ torch.linalg.lstsq(middle, exact).solution
    ours = middle @ fit.double().T
    assert (exact - ours).square().sum() < 1.01 * (exact - best).square().sum()
    assert lost == pytest.approx(float((exact - ours).square().sum() / exact.square().sum()), abs=2e-3)
    assert torch.equal(pointwise_fit(weight, None)[0], weight[:, :, 4])
    assert pointwise_fit(torch.zeros(3, 5, 9), None)[1] == 0  # of nothing, nothing is lost


def test_the_convolution_that_loses_least_is_replaced_first():
    model = nn.Sequential(*(nn.Conv2d(6, 6, 3, padding=1) for _ in range(4)))
    for layer, part in zip(model, (0.9, 0.1, 0.5, 0.7), strict=True):
        with torch.no_grad():  # what is around the middle of the kernel
            around = torch.full((3, 3), part)
            around[1, 1] = 1
            layer.weight *= around
    kinds = lambda replaced: [
        layer.kernel_size[0] for layer in wb.PointwiseConvolution(replaced=replaced, squeeze=1.0).compress(model)
    ]
    assert kinds(0.25) == [3, 1, 3, 3] and kinds(0.5) == [3, 1, 1, 3] and kinds(1.0) == [1, 1, 1, 1]


def test_the_squeeze_is_the_best_for_its_width():
    weight = kernel(10, 8, 9)
    u, s, v = squeeze_factors(weight, None)
    squeezed = ((u[:, :3] * s[:3]) @ v[:3]).view(10, 9, 8).transpose(1, 2)
    tail = torch.linalg.svdvals(weight.transpose(0, 1).flatten(1))[3:].square().sum()
    assert torch.isclose((weight - squeezed).square().sum(), tail, rtol=1e-4)
    layer = nn.Conv2d(8, 10, 3, padding=1)
    parts = wb.PointwiseConvolution(replaced=0.0, squeeze=0.5).compress(nn.Sequential(layer))[0]
    assert [(p.kernel_size, p.in_channels, p.out_channels) for p in parts] == [((1, 1), 8, 4), ((3, 3), 4, 10)]
