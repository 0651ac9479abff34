"""k-means against scikit-learn, and what clustering promises of a model."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import workbench as wb
from workbench.surgery import weighted_layers
from workbench.techniques.clustering.kmeans import (
    INITIAL,
    SortedValues,
    best_clusters,
    initial_centroids,
    kmeans,
    nearest,
)
from workbench.weights import describe, weight_parametrizations


def trained(seed=0, size=20_000):
    """Values with the heavy tails of trained weights."""
    return torch.from_numpy(np.random.default_rng(seed).standard_t(4, size) * 0.05).float()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 20), nn.Linear(20, 3)).eval()


def distinct(model):
    return [len(layer.weight.unique()) for _, layer in weighted_layers(model)]


@pytest.mark.parametrize("count", [2, 5, 16, 64])
@pytest.mark.parametrize("initial", INITIAL)
def test_inertia_is_within_two_percent_of_scikit_learn(count, initial):
    cluster = pytest.importorskip("sklearn.cluster")
    data = SortedValues.of(trained())
    start = "k-means++"
    if initial != "k-means++":
        start = initial_centroids(data, count, initial, np.random.default_rng(0))[:, None]
    theirs = cluster.KMeans(count, init=start, n_init=4 if isinstance(start, str) else 1, random_state=0)
    theirs.fit(data.values[:, None])
    assert data.inertia(kmeans(data, count, initial)) <= 1.02 * theirs.inertia_


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", [name for name, _ in weighted_layers(wb.load_model("glyphs-cnn"))])
def test_inertia_on_trained_weights_is_within_two_percent_of_scikit_learn(name, bits):
    cluster = pytest.importorskip("sklearn.cluster")
    data = SortedValues.of(wb.load_model("glyphs-cnn").get_submodule(name).weight)
    theirs = cluster.KMeans(2**bits, n_init=1, random_state=0).fit(data.values[:, None])
    assert data.inertia(kmeans(data, 2**bits)) <= 1.02 * theirs.inertia_


@given(st.lists(st.floats(-4, 4, width=16), min_size=2, max_size=9, unique=True), st.data())
def test_few_values_get_the_best_clusters_of_all(values, draw):
    data = SortedValues.of(torch.tensor([value for value in values if value]))
    size = len(data.values)
    count = draw.draw(st.integers(1, size))
    cuts = itertools.combinations(range(1, size), count - 1)
    groups = ([data.values[a:b] for a, b in itertools.pairwise((0, *cut, size))] for cut in cuts)
    least = min(sum(((group - group.mean()) ** 2).sum() for group in parts) for parts in groups)
    assert data.inertia(best_clusters(data, count)) == pytest.approx(least, abs=1e-9)


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=60), st.integers(1, 12), st.sampled_from(INITIAL))
def test_centroids_are_means_of_what_is_nearest_to_them(values, count, initial):
    data = SortedValues.of(torch.tensor(values))
    centroids = kmeans(data, count, initial)
    assert len(centroids) <= count and np.array_equal(centroids, np.sort(centroids))
    assert len(centroids) or not any(values)
    if len(data.distinct) <= count:
        assert np.array_equal(centroids, np.unique([value for value in values if value]))
    else:
        distance = np.abs(data.values[:, None] - centroids)
        assert data.inertia(centroids) == pytest.approx((distance.min(1) ** 2).sum(), abs=1e-6)


@given(st.lists(st.sampled_from([0.0, -2.0, -0.5, 0.01, 3.0]), min_size=1, max_size=20))
def test_each_weight_takes_the_nearest_level_and_zero_is_for_zeros(values):
    weight, levels = torch.tensor(values), torch.tensor([-1.0, 0.0, 0.5, 2.0])
    found = levels[nearest(SortedValues.of(weight), levels).long()]
    others = levels[levels != 0]
    expected = torch.where(weight == 0, torch.zeros(()), others[(weight[:, None] - others).abs().argmin(1)])
    assert torch.allclose((found - weight).abs(), (expected - weight).abs())
    assert torch.equal(found == 0, weight == 0)


@pytest.mark.parametrize("initial", INITIAL)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_every_layer_has_at_most_so_many_values(bits, initial):
    small = wb.WeightClustering(bits=bits, initial=initial).compress(net())
    assert all(2 <= count <= 2**bits for count in distinct(small))
    assert all(describe(layer).kind == "clustered" for _, layer in weighted_layers(small))


def test_one_set_of_values_for_all_layers_is_one_parameter():
    small = wb.WeightClustering(bits=3, scope="global").compress(net())
    together = torch.cat([layer.weight.flatten() for _, layer in weighted_layers(small)])
    assert len(together.unique()) <= 8
    assert len({id(weight_parametrizations(layer)[0].levels) for _, layer in weighted_layers(small)}) == 1


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_pruned_weights_stay_zero_and_nothing_else_becomes_zero(bits):
    pruned = wb.MagnitudePruning(sparsity=0.7).compress(net())
    small = wb.WeightClustering(bits=bits).compress(pruned)
    for (_, before), (_, after) in zip(weighted_layers(pruned), weighted_layers(small), strict=True):
        assert torch.equal(before.weight == 0, after.weight == 0) and len(after.weight.unique()) <= 2**bits


def test_pruning_after_clustering_keeps_the_codebook():
    small = wb.MagnitudePruning(sparsity=0.7).compress(wb.WeightClustering(bits=3).compress(net()))
    assert all(count <= 9 for count in distinct(small)) and wb.ledger(small).rows[1].kind == "clustered"


def test_layers_with_few_different_weights_keep_them_exactly():
    model = net()
    model[4].weight.data = torch.sign(model[4].weight.data) / 8
    model[3].weight.data.zero_()
    small = wb.WeightClustering(bits=4).compress(model)
    assert torch.equal(small[4].weight, model[4].weight) and torch.equal(small[3].weight, model[3].weight)


def test_finer_codebooks_come_closer():
    model = net()
    errors = []
    for bits in range(1, 9):
        small = wb.WeightClustering(bits=bits).compress(model)
        errors.append((small[3].weight - model[3].weight).detach().square().sum().item())
    assert errors == sorted(errors, reverse=True)


def test_k_means_plus_plus_depends_on_its_seed_alone():
    data = SortedValues.of(trained(1, 500))
    first = kmeans(data, 8, "k-means++", seed=3)
    torch.manual_seed(2)
    assert np.array_equal(first, kmeans(data, 8, "k-means++", seed=3))


def test_finetuning_moves_the_levels_and_keeps_their_number():
    glyphs = wb.load_data("glyphs")
    tiny = copy.copy(glyphs)
    object.__setattr__(tiny, "train", glyphs.train.take(256))
    object.__setattr__(tiny, "val", glyphs.val.take(64))
    model, steps = wb.load_model("glyphs-cnn"), []
    pruned = wb.MagnitudePruning(sparsity=0.5).compress(model)
    before = wb.WeightClustering(bits=2).compress(pruned)
    after = wb.WeightClustering(bits=2, finetune=1).compress(pruned, tiny, steps.append)
    assert steps and all(count <= 4 for count in distinct(after))
    for (_, first), (_, second) in zip(weighted_layers(before), weighted_layers(after), strict=True):
        assert torch.equal(first.weight == 0, second.weight == 0) and not torch.equal(first.weight, second.weight)


def test_tied_and_half_precision_weights():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).half()
    model[1].weight = model[0].weight
    small = wb.WeightClustering(bits=2).compress(model)
    books = [weight_parametrizations(layer)[0] for layer in small]
    assert small[0].weight.dtype == torch.float16 and books[0].levels is books[1].levels
    assert torch.equal(small[0].weight, small[1].weight) and len(small[0].weight.unique()) <= 4
    assert wb.ledger(small).rows[1].kind == "clustered" and wb.ledger(small).rows[3].chosen == "tied"


@given(st.lists(st.floats(0.0625, 10, width=32), min_size=1, max_size=12), st.integers(1, 3), st.booleans())
def test_values_even_about_zero_take_the_nearest_centroid_and_only_zeros_are_zero(half, bits, has_zero):
    """Their middle centroid is zero, and the level of zero belongs to zeros alone."""
    weight = torch.tensor([*half, *(-v for v in half), *([0.0] if has_zero else [])])
    model = nn.Sequential(nn.Linear(len(weight), 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight[None])
    found = wb.WeightClustering(bits=bits).compress(model)[0].weight.detach()[0]
    assert torch.equal(found == 0, weight == 0) and len(found.unique()) <= 2**bits
    ours = float((found - weight).square().sum())
    data, count = SortedValues.of(weight), 2**bits - has_zero
    assert ours <= 1.001 * data.inertia(kmeans(data, count)) + 1e-9


def test_models_that_cannot_be_clustered_say_why():
    with pytest.raises(ValueError, match="no linear or convolution layer in Sequential"):
        wb.WeightClustering().compress(nn.Sequential(nn.ReLU()))
    model = net()
    model[3].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight of layer '3' holds NaN"):
        wb.WeightClustering().compress(model)
    with pytest.raises(ValueError, match="goes from 1 to 8"):
        wb.WeightClustering(bits=9)


def test_weights_are_sorted_once_for_all_slider_moves(monkeypatch):
    model, sort, sorted_layers = wb.load_model("glyphs-cnn"), SortedValues.of, []
    monkeypatch.setattr(SortedValues, "of", lambda values: sorted_layers.append(len(values)) or sort(values))
    for bits in (3, 2, 4, 8):
        wb.WeightClustering(bits=bits, initial="linear").compress(model)
    assert sorted_layers == [layer.weight.numel() for _, layer in weighted_layers(model)]
