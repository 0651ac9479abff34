"""Which layers others may stand in for, and that what stands in is put everywhere and computes alike."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import workbench as wb
from workbench.surgery import clone
from workbench.techniques.replacing import replaceable_layers
from workbench.weights import bake_weights

ONE_SHOT = [
    wb.LowRank(rank=0.25),
    wb.Tucker(rank=0.25),
    wb.CPDecomposition(rank=0.25, sweeps=2),
    wb.DepthwiseSeparable(multiplier=1),
    wb.PointwiseConvolution(replaced=1.0),
]
NAMES = [type(technique).__name__ for technique in ONE_SHOT]


def net(*more):
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2)]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(24 * 9, 40), *more).eval()


def names(model):
    return [name for name, _ in replaceable_layers(model)]


class Reads(nn.Module):
    """A layer that reads the weight of one part of it, as attention does, and calls the other."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(40, 40), nn.Linear(40, 40)
        nn.init.zeros_(self.called.bias)

    def forward(self, x):
        return F.linear(self.called(x), self.read.weight)


def test_a_layer_whose_weight_is_read_by_other_code_stays():
    model = net(Reads())
    assert names(model) == ["0", "3", "5", "6.called"]
    assert torch.isfinite(wb.LowRank(rank=0.1).compress(model)(torch.randn(2, 3, 8, 8))).all()


class ReadsDeeper(nn.Module):
    """A layer that reads the weight of a part of its part."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential()
        self.inner.read = nn.Linear(40, 40)

    def forward(self, x):
        return F.linear(x, self.inner.read.weight)


def test_a_layer_whose_weight_is_read_from_further_up_stays():
    model = net(ReadsDeeper())
    assert names(model) == ["0", "3", "5"]
    assert torch.isfinite(wb.LowRank(rank=0.1).compress(model)(torch.randn(2, 3, 8, 8))).all()


def test_attention_and_transformer_layers_still_run():
    model = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    assert names(model) == []
    x = torch.randn(2, 5, 16)
    assert torch.equal(wb.LowRank(rank=0.1).compress(model)(x), model(x))


def test_a_layer_with_a_forward_of_its_own_stays():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert names(net(Scaled(40, 40))) == ["0", "3", "5"]


def test_shared_tensors_stay_shared_and_a_layer_used_twice_is_replaced_twice():
    twice, tied = nn.Linear(40, 40), nn.Linear(40, 40)
    model = net(twice, nn.ReLU(), twice, tied, nn.Linear(40, 40))
    model[-1].weight = tied.weight
    assert names(model) == ["0", "3", "5", "6"]
    small = wb.LowRank(rank=0.1).compress(model)
    assert small[6] is small[8] and isinstance(small[6], nn.Sequential)
    assert small[-1].weight is small[-2].weight
    assert torch.isfinite(small(torch.randn(2, 3, 8, 8))).all()


@pytest.mark.parametrize("technique", ONE_SHOT, ids=NAMES)
@pytest.mark.parametrize("stage", [wb.MagnitudePruning(sparsity=0.5), wb.NormalFloat4()], ids=["masked", "coded"])
def test_weights_that_an_earlier_stage_holds_are_taken_as_they_are_used(technique, stage):
    held = stage.compress(net())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(technique.compress(held)(x), technique.compress(bake_weights(clone(held)))(x))


def test_tied_weights_are_seen_under_a_mask():
    model = net(nn.Linear(40, 40), nn.Linear(40, 40))
    model[7].weight = model[6].weight
    assert names(wb.MagnitudePruning(sparsity=0.5).compress(model)) == ["0", "3", "5"]


@pytest.mark.parametrize("technique", ONE_SHOT, ids=NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half_precision(technique, dtype):
    small = technique.compress(net().to(dtype))
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert torch.isfinite(small(torch.randn(2, 3, 8, 8).to(dtype))).all()


@pytest.mark.parametrize("technique", ONE_SHOT, ids=NAMES)
def test_a_weight_with_nan_is_named(technique):
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '3' holds NaN"):
        technique.compress(model)


@pytest.mark.parametrize("technique", ONE_SHOT, ids=NAMES)
def test_a_model_of_one_layer_and_one_of_none(technique):
    alone = nn.Conv2d(16, 32, 3, padding=1).eval()
    small = technique.compress(alone)
    assert small(torch.randn(1, 16, 6, 6)).shape == (1, 32, 6, 6)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in alone.parameters())
    with pytest.raises(ValueError, match="no linear or convolution layer in ReLU"):
        technique.compress(nn.ReLU())


@pytest.mark.parametrize("technique", ONE_SHOT, ids=NAMES)
@pytest.mark.parametrize("size", ["1-D", "3-D"])
def test_sequences_and_volumes_keep_their_shape(technique, size):
    kind, x = (nn.Conv1d, torch.randn(2, 12, 11)) if size == "1-D" else (nn.Conv3d, torch.randn(1, 12, 5, 7, 6))
    model = nn.Sequential(kind(12, 20, 3, padding=1, stride=2)).eval()
    small = technique.compress(model)
    assert small(x).shape == model(x).shape
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("technique", ONE_SHOT, ids=NAMES)
def test_new_layers_share_no_memory_with_the_given_model_or_with_one_another(technique):
    model = net()
    x = torch.randn(2, 3, 8, 8)
    first, second = technique.compress(model), technique.compress(model)
    answers = copy.deepcopy(second)(x)
    with torch.no_grad():
        for parameter in (*first.parameters(), *model.parameters()):
            parameter.zero_()
    assert torch.equal(second(x), answers)
