"""What calibration looks at: every place of every image, every call of a layer, and nothing that is not a number."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import workbench as wb
from workbench.surgery import clone
from workbench.techniques.moments import second_moments
from workbench.techniques.quantization.calibration import METHODS, SAMPLE, input_range, input_samples
from workbench.techniques.quantization.post_training import weight_quantizer
from workbench.techniques.repair import recalibrate

X = torch.randn(256, 6, generator=torch.Generator().manual_seed(0))


class Twice(nn.Module):
    """A layer that is called twice, the second time by keyword on much smaller numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(x) + self.layer(input=0.01 * x)


def error(small, model, images):
    with torch.no_grad():
        exact = model(images)
        return float((small(images) - exact).square().mean() / exact.square().mean())


@pytest.mark.parametrize("shape", [(512, 128, 14, 14), (2048, 256)])
def test_a_sample_holds_every_place_and_every_channel(shape):
    """Any fixed step that shares a factor with the size of an image sees a few of its places, over and over."""
    layer = nn.Conv2d(128, 1, 1) if len(shape) == 4 else nn.Linear(256, 1)
    size = torch.Size(shape[1:]).numel()
    numbers = torch.arange(size, dtype=torch.float32).view(shape[1:]).expand(shape)
    seen = input_samples(nn.Sequential(layer), numbers)["0"]
    assert len(seen.values) == SAMPLE and (seen.low, seen.high) == (0, size - 1)
    places = seen.values.long() % (196 if len(shape) == 4 else size)
    assert len(places.unique()) == min(size, 196 if len(shape) == 4 else 256)
    assert len((seen.values.long() // 196).unique()) > 0.99 * size / 196


@pytest.mark.parametrize("method", METHODS)
def test_uneven_features_are_all_seen(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    images = torch.randn(512, 256)
    images[:, 1::2] *= 20
    assert error(wb.Quantization(weight_bits=32, calibration=method).compress(model, images), model, images) < 0.02


@pytest.mark.parametrize("method", METHODS)
def test_all_calls_of_a_layer_are_seen(method):
    torch.manual_seed(0)
    model = Twice().eval()
    assert error(wb.Quantization(weight_bits=32, calibration=method).compress(model, X), model, X) < 0.02
    seen = input_samples(model, X)["layer"]
    assert (seen.low, seen.high) == (X.min(), X.max()) and len(seen.values) == 2 * X.numel()
    assert torch.allclose(second_moments(model, [X])["layer"], (1 + 1e-4) / 2 * (X.T @ X).double() / len(X), rtol=1e-4)


LOOKING = (wb.Quantization, wb.GPTQ, wb.AWQ, wb.AdaRound, wb.WandaPruning, wb.MixedPrecision)


@pytest.mark.parametrize("technique", LOOKING)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_images_that_are_not_finite_are_refused(technique, wrong):
    model, images = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), X.clone()
    images[3, 2] = wrong
    with pytest.raises(ValueError, match="'0' holds NaN or infinity"):
        technique().compress(model, images)


@pytest.mark.parametrize("technique", [wb.WandaPruning(), wb.GPTQ(weight_bits=3), wb.MixedPrecision(average_bits=3)])
def test_a_batch_that_was_changed_in_place_is_looked_at_again(technique):
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), X.clone()
    technique.compress(model, images)
    images.mul_(torch.tensor([100.0, 1, 0.01, 5, 0.1, 30]))
    again, anew = (technique.compress(one, images).state_dict() for one in (model, clone(model)))
    assert all(torch.equal(value, anew[name]) for name, value in again.items())


def test_percentile_cuts_one_in_a_thousand_at_each_end():
    for count, cut in ((999, 0), (1000, 1), (1999, 1), (2000, 2)):
        model = nn.Sequential(nn.Linear(count, 1))
        sample = input_samples(model, torch.arange(count, dtype=torch.float32)[None])["0"]
        assert input_range(sample, "percentile", 0, 255) == (cut, count - 1 - cut)


def test_the_largest_numbers_have_a_finite_range():
    weight = torch.tensor([[-3e38, 1.0, 3e38]])
    assert weight_quantizer(weight, 8, scheme="asymmetric")(weight).isfinite().all()


def test_norms_are_measured_over_all_calls_and_left_alone_where_they_do_not_run():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.often, self.never = nn.BatchNorm1d(6), nn.BatchNorm1d(6)

        def forward(self, x):
            return self.often(x) + self.often(3 * x + 1)

    model = Net()
    model.never.running_mean.fill_(5)
    recalibrate(model, [X])
    assert torch.allclose(model.often.running_mean, (X.mean(0) + 3 * X.mean(0) + 1) / 2, atol=1e-5)
    assert (model.never.running_mean == 5).all() and model.often.momentum == 0.1 and not model.training
