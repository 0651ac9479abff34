"""By what channels are ranked, and pruning in several rounds."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import toy
from torch import nn

from workbench import ChannelPruning, encode
from workbench.techniques.pruning import criteria
from workbench.weights import FakeQuantize, parametrize_weight

torch.set_num_threads(1)
MISSING = "torch-pruning is not installed; `pip install -e '.[test]'` adds it."
x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Two convolutions whose channels are tied by a sum, BatchNorm on both, and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.second, self.norm2 = nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 8)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        x = x + self.norm2(self.second(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    model = Residual().eval()
    for norm in (model.norm, model.norm2):
        nn.init.uniform_(norm.weight, -1, 1)
        nn.init.uniform_(norm.bias, -1, 1)
        norm.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def data():
    return toy.data(val=120, test=60)


def only_group(model):
    (group,) = ChannelPruning.trace(model, x).groups
    return group


def peer(model, importance):
    tp = pytest.importorskip("torch_pruning", reason=MISSING)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    group = graph.get_pruning_group(model.first, tp.prune_conv_out_channels, idxs=list(range(12)))
    return importance(tp.importance)(group)


def same_up_to_a_factor(ours, theirs):
    return torch.allclose(ours / ours.sum(), theirs / theirs.sum(), rtol=1e-4)


def test_batchnorm_scales_equal_those_of_torch_pruning(residual):
    ours = criteria.batchnorm_scores(only_group(residual), residual)
    assert torch.allclose(ours, residual.norm.weight.abs() + residual.norm2.weight.abs())
    assert same_up_to_a_factor(ours, peer(copy.deepcopy(residual), lambda tp: tp.BNScaleImportance(normalizer=None)))


def test_norms_equal_those_of_torch_pruning(residual):
    weights = {name: residual.get_submodule(name).weight.detach() for name in ("first", "second", "head")}
    kinds = [nn.modules.conv._ConvNd, nn.Linear]
    for power in (1, 2):
        ours = criteria.norm_scores(only_group(residual), weights, power)
        make = lambda tp, p=power: tp.GroupMagnitudeImportance(p=p, normalizer=None, target_types=kinds)
        assert same_up_to_a_factor(ours, peer(copy.deepcopy(residual), make))


def test_taylor_scores_equal_those_of_torch_pruning(data):
    """Torch-Pruning gives |Σ w g| of the filter in a layer that makes the channel; ours is squared."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 12, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 196, 8)).eval()
    tp = pytest.importorskip("torch_pruning", reason=MISSING)
    products = criteria.taylor_products(model, data)
    theirs = []
    for images, labels in data.train.take(128, seed=0).batches(16):
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
        group = graph.get_pruning_group(model[0], tp.prune_conv_out_channels, idxs=list(range(12)))
        kinds = [nn.modules.conv._ConvNd]
        taylor = tp.importance.GroupTaylorImportance(multivariable=True, normalizer=None, target_types=kinds)
        theirs.append(taylor(group).square())
    ours = criteria.taylor_scores(only_group(model), {"0": model[0].weight}, products)
    assert torch.allclose(ours, torch.stack(theirs).mean(0), rtol=1e-3)


def test_taylor_looks_at_frozen_networks_too(data):
    nets = toy.model(), toy.model().requires_grad_(False)
    exact, frozen = (criteria.taylor_products(one, data)[0] for one in nets)
    assert all(torch.equal(value, frozen[key]) for key, value in exact.items())


def test_taylor_predicts_what_a_slightly_smaller_channel_costs(data):
    """The oracle is a difference quotient: scale one filter and bias by 1 - 1e-3 and look at the loss."""
    model = toy.model().double()
    images, labels = data.train.take(128, seed=0).batch(slice(0, 16))
    (products, *_) = criteria.taylor_products(model.float(), data)
    with torch.no_grad():
        model = model.double()
        loss = F.cross_entropy(model(images.double()), labels)
        for channel in (0, 5):
            other = copy.deepcopy(model)
            other[3].weight[channel] *= 1 - 1e-3
            other[3].bias[channel] *= 1 - 1e-3
            change = (F.cross_entropy(other(images.double()), labels) - loss) / 1e-3
            found = products["3", "weight"][channel].sum() + products["3", "bias"][channel]
            assert float(-change) == pytest.approx(float(found), rel=0.02, abs=1e-6)


def test_the_filter_nearest_to_all_others_goes_first():
    filters = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0], [0.4, 0.4]])
    by_hand = torch.stack([sum((a - b).norm() for b in filters) for a in filters])
    assert torch.allclose(criteria.median_distances(filters), by_hand)
    model = nn.Sequential(nn.Linear(2, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)).eval()
    model[0].weight.data = filters
    small = ChannelPruning(sparsity=0.2, criterion="geometric median").compress(model, torch.zeros(1, 2))
    assert torch.equal(small[0].weight, filters[:4])


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("criterion", criteria.CRITERIA)
def test_every_criterion_works_along_the_slider(criterion, scope, residual, data):
    sizes = []
    for part in (0.0, 0.5, 0.9):
        small = ChannelPruning(sparsity=part, criterion=criterion, scope=scope).compress(residual, data)
        assert torch.isfinite(small(x)).all()
        sizes.append(len(encode(small)))
    assert sizes[0] > sizes[1] > sizes[2]


def test_criteria_say_what_they_need(residual, data):
    with pytest.raises(ValueError, match=r"Sequential has no BatchNorm .* choose criterion"):
        ChannelPruning(criterion="batchnorm").compress(toy.model(), x)
    with pytest.raises(ValueError, match="needs images with labels"):
        ChannelPruning(criterion="taylor").compress(residual, x)


def test_taylor_sees_weights_as_they_are_used(data):
    model = toy.model()
    scale = model[3].weight.detach().abs().amax((1, 2, 3)) / 7
    parametrize_weight(model[3], FakeQuantize(scale, torch.zeros(32), 4, 0))
    small = ChannelPruning(criterion="taylor").compress(model, data)
    assert small[3].out_channels == 16 and len(small[3].weight.unique()) <= 16 * 15


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_rounds_end_at_the_same_counts_as_one_cut(rounds, scope, data):
    once = ChannelPruning(sparsity=0.6, scope=scope).compress(toy.model(), data)
    often = ChannelPruning(sparsity=0.6, scope=scope, rounds=rounds).compress(toy.model(), data)
    counts = [[m.weight.shape[0] for m in small if hasattr(m, "weight")] for small in (once, often)]
    if scope == "layer":
        assert counts[0] == counts[1] == [13, 13, 40, 8]
    else:
        assert sum(counts[0]) == pytest.approx(sum(counts[1]), abs=2)


def test_rounds_are_one_training_that_can_be_stopped(data):
    steps, stopped = [], []
    ChannelPruning(sparsity=0.6, rounds=3, finetune=1).compress(toy.model(), data, steps.append)
    numbers = [step.step for step in steps]
    assert numbers == sorted(set(numbers)) and {s.steps for s in steps} == {12} and numbers[-1] == 12
    assert [s.epoch for s in steps if s.accuracy] == [0, 1, 2]
    technique = ChannelPruning(sparsity=0.6, rounds=3, finetune=2)
    small = technique.compress(toy.model(), data, lambda step: stopped.append(step) or False)
    assert len(stopped) == 1 and small[3].out_channels == 13 and not small.training
