"""Truncated SVD against torch's own answer, and its use on linear and convolution layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import workbench as wb
from workbench.techniques.low_rank.svd import budget_ranks, cut, energy_rank, factors_for, truncated_svd
from workbench.techniques.moments import second_moments


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_truncated_svd_is_the_best_approximation_in_the_frobenius_norm(rank):
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    left, right = truncated_svd(weight, rank)
    assert left.shape == (8, rank) and right.shape == (rank, 12)
    error = torch.linalg.matrix_norm(weight - left @ right)
    tail = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt()  # Eckart and Young: the least error there is
    assert torch.allclose(error, tail, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 9])
def test_a_rank_that_cannot_be_is_refused(rank):
    with pytest.raises(ValueError, match="a weight of 8×12 has ranks 1 to 8"):
        truncated_svd(torch.randn(8, 12), rank)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(40, 30),
        nn.Linear(40, 30, bias=False),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Conv2d(8, 16, (5, 3), padding="same", dilation=2, padding_mode="reflect", bias=False),
        nn.Conv1d(8, 16, 5),
    ],
    ids=str,
)
def test_factors_of_a_low_rank_layer_compute_the_same(layer):
    with torch.no_grad():  # make the weight exactly of rank 3, so that a fifth of full rank loses nothing
        flat = layer.weight.flatten(1)
        left, right = truncated_svd(flat, 3)
        layer.weight.copy_((left @ right).view_as(layer.weight))
    images = {nn.Linear: (4, 40), nn.Conv2d: (4, 8, 13, 11), nn.Conv1d: (4, 8, 21)}[type(layer)]
    x = torch.randn(images)
    small = wb.LowRank(rank=0.2).compress(nn.Sequential(layer))
    assert isinstance(small[0], nn.Sequential) and len(small[0]) == 2
    assert torch.allclose(small(x), layer(x), atol=1e-4)


def test_the_spatial_kernel_stays_in_one_factor():
    small = wb.LowRank(rank=0.25).compress(nn.Sequential(nn.Conv2d(16, 32, 3)))
    assert [f.kernel_size for f in small[0]] == [(3, 3), (1, 1)]
    assert [f.out_channels for f in small[0]] == [8, 32]


def test_a_layer_that_would_grow_is_left_alone():
    model = nn.Sequential(nn.Linear(10, 10), nn.Conv2d(8, 8, 3, groups=8))
    small = wb.LowRank(rank=0.9).compress(model)
    assert isinstance(small[0], nn.Linear) and isinstance(small[1], nn.Conv2d)


def test_a_weight_with_nan_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '0' holds NaN"):
        wb.LowRank(rank=0.25).compress(model)


def test_a_trained_weight_that_changes_is_decomposed_anew():
    model = nn.Sequential(nn.Linear(20, 20))
    first = wb.LowRank(rank=0.1).compress(model)
    with torch.no_grad():
        model[0].weight.mul_(2)
    second = wb.LowRank(rank=0.1).compress(model)
    x = torch.randn(2, 20)
    assert torch.allclose(second(x) - model[0].bias, 2 * (first(x) - model[0].bias), atol=1e-4)


@pytest.mark.parametrize("rank", [0.1, 0.4])
def test_objective_outputs_reaches_the_least_error_of_outputs_that_there_is(rank):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(20, 16, bias=False).double()
    x = torch.randn(400, 20, generator=generator).double() @ torch.diag(torch.logspace(0, -2, 20).double())
    kept = round(16 * rank)
    exact = layer.weight.detach() @ x.T
    least = torch.linalg.svdvals(exact)[kept:].square().sum()  # Eckart and Young, for the outputs themselves

    def error(moment):
        left, right = cut(factors_for(layer.weight.detach(), moment), kept)
        return (exact - left.double() @ right.double() @ x.T).square().sum()

    assert torch.isclose(error(x.T @ x / 400), least, rtol=0.02)
    assert error(None) > 1.5 * least


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(12, 8), nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(3, 8, (3, 2), dilation=2, bias=False)],
    ids=str,
)
def test_second_moments_see_exactly_what_the_weight_is_multiplied_with(layer):
    x = torch.randn((6, 12) if isinstance(layer, nn.Linear) else (6, 3, 9, 10))
    moment = second_moments(nn.Sequential(layer), [x])["0"]
    weight = layer.weight.detach().double().flatten(1)
    output = layer(x).detach().double()
    output = output if layer.bias is None else output - layer.bias.double().view(1, -1, *[1] * (output.dim() - 2))
    values = output.movedim(1, 0).flatten(1)
    assert torch.allclose(weight @ moment @ weight.T, values @ values.T / values.shape[1], atol=1e-4)


def test_factors_of_a_trained_network_keep_more_when_they_fit_its_outputs():
    glyphs, model = wb.load_data("glyphs"), wb.load_model("glyphs-cnn")
    right = {
        objective: wb.evaluate(
            wb.LowRank(rank=0.5, objective=objective, recalibrate=False).compress(model, glyphs), glyphs.val
        ).value
        for objective in ("outputs", "weights")
    }
    assert right["outputs"] > right["weights"] + 0.2


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9, 0.999])
def test_energy_keeps_the_fewest_singular_values_that_hold_it(kept):
    values = torch.linalg.svdvals(torch.randn(30, 40, generator=torch.Generator().manual_seed(0)))
    rank = energy_rank(values, kept)
    held = values.square().cumsum(0) / values.square().sum()
    assert held[rank - 1] >= kept and (rank == 1 or held[rank - 2] < kept)
    assert energy_rank(torch.tensor([2.0, 0.0]), 1.0) == 1 and energy_rank(torch.zeros(3), 0.5) == 1


def cost(ranks, shapes):
    return sum(min(r * (m + n), m * n) for r, (m, n) in zip(ranks, shapes, strict=True))


@pytest.mark.parametrize("budget", [60, 100, 160, 240])
def test_a_budget_is_spent_as_well_as_any_choice_of_ranks_could(budget):
    shapes = [(12, 8), (10, 10), (8, 12)]
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    values = [torch.linalg.svdvals(w * torch.logspace(0, -i, w.shape[1])) for i, w in enumerate(weights)]
    held = lambda ranks: sum(
        float(v[:r].square().sum() / v.square().sum()) if r * (m + n) < m * n else 1.0
        for r, v, (m, n) in zip(ranks, values, shapes, strict=True)
    )
    ranks = budget_ranks(values, shapes, budget)
    affordable = [r for r in itertools.product(range(1, 5), repeat=3) if cost(r, shapes) <= budget]  # 5 · 20 is m · n
    assert cost(ranks, shapes) <= budget
    assert held(ranks) >= max(map(held, affordable)) - 1e-9


def test_a_larger_budget_never_lowers_a_rank_and_the_whole_one_keeps_all():
    shapes = [(30, 20), (64, 9), (10, 40)]
    values = [torch.linalg.svdvals(torch.randn(shape)) for shape in shapes]
    whole = sum(m * n for m, n in shapes)
    found = [budget_ranks(values, shapes, round(part * whole)) for part in (0.0, 0.1, 0.3, 0.5, 0.8, 1.0)]
    assert found[0] == [1, 1, 1]
    assert all(a <= b for low, high in itertools.pairwise(found) for a, b in zip(low, high, strict=True))
    assert cost(found[-1], shapes) == whole


@pytest.mark.parametrize("kept", [0.3, 0.6])
def test_a_budget_holds_for_the_weights_of_the_model(kept):
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Linear(60, 90), nn.Linear(90, 30))
    small = wb.LowRank(choose="budget", kept=kept).compress(model)
    count = lambda net: sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert 0.8 * kept * count(model) < count(small) <= kept * count(model)


@pytest.mark.parametrize("choose", ["energy", "budget"])
def test_all_kept_changes_nothing(choose):
    technique = wb.LowRank(choose=choose, kept=1.0)
    model = nn.Sequential(nn.Linear(20, 20))
    assert technique.is_neutral and not wb.LowRank(choose=choose).is_neutral
    assert torch.equal(technique.compress(model)[0].weight, model[0].weight)


def test_at_the_same_size_a_budget_keeps_more_answers_right_than_one_fraction():
    glyphs, model = wb.load_data("glyphs"), wb.load_model("glyphs-cnn")
    images = glyphs.val.take(500)
    fraction = wb.LowRank(rank=0.25).compress(model, glyphs)
    budget = wb.LowRank(choose="budget", kept=0.28).compress(model, glyphs)
    assert len(wb.encode(budget)) <= len(wb.encode(fraction))
    assert wb.evaluate(budget, images).value > wb.evaluate(fraction, images).value + 0.05
