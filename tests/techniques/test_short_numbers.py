"""Casts against torch's own types, NF4 against bitsandbytes, and the choice of layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import workbench as wb
from workbench.techniques.quantization.casting import largest_layers
from workbench.weights import Codebook, describe, parametrize_weight

CASTS = {
    "float16": (wb.Float16(), torch.float16),
    "bfloat16": (wb.BFloat16(), torch.bfloat16),
    "e4m3": (wb.Float8(), torch.float8_e4m3fn),
    "e5m2": (wb.Float8(format="e5m2"), torch.float8_e5m2),
}
ALL = (wb.Float16, wb.BFloat16, wb.Float8, wb.NormalFloat4)


def model_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


@pytest.mark.parametrize("case", CASTS)
def test_weights_are_those_of_torch_s_type(case):
    technique, dtype = CASTS[case]
    model = model_of()
    weight = model[2].weight.detach()
    scale = weight.abs().max() / torch.finfo(dtype).max if dtype.itemsize == 1 else torch.tensor(1.0)
    small = technique.compress(model)
    assert torch.equal(small[2].weight, (weight / scale).to(dtype).float() * scale)
    assert describe(small[2]).kind == "cast" and torch.equal(small[2].bias, model[2].bias)


def test_the_largest_weight_of_a_layer_survives_eight_bits():
    model = model_of()
    model[2].weight.data *= 1e6
    for name in ("e4m3", "e5m2"):
        small = CASTS[name][0].compress(model)
        assert float(small[2].weight.abs().max()) == pytest.approx(float(model[2].weight.abs().max()), rel=1e-6)


def test_nf4_rounds_to_the_published_levels():
    """Appendix E of the paper, to four digits."""
    levels = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407]
    model = nn.Sequential(nn.Linear(64, 100, bias=False))
    model[0].weight.data = torch.linspace(-3, 3, 6400).reshape(64, 100).T.contiguous()
    small = wb.NormalFloat4(group_size=64).compress(model)[0].weight.detach()
    found = (small / small.abs().amax(1, keepdim=True)).unique()
    assert (found[:, None] - torch.tensor([*levels, 0.5626, 0.723, 1])).abs().amin(1).max() < 1e-4


@pytest.mark.parametrize("group_size", [64, 128, 256])
def test_nf4_equals_bitsandbytes(group_size):
    functional = pytest.importorskip("bitsandbytes.functional")
    model = nn.Sequential(nn.Linear(256, 48))
    weight = model[0].weight.detach()
    packed, state = functional.quantize_4bit(weight, blocksize=group_size, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    ours = wb.NormalFloat4(group_size=group_size).compress(model)[0].weight
    assert torch.allclose(ours, theirs, atol=1e-7)


@pytest.mark.parametrize("kind", ALL)
def test_zeros_stay_zero_and_a_codebook_keeps_its_number_of_levels(kind):
    model = wb.MagnitudePruning(sparsity=0.5).compress(model_of())
    levels = torch.tensor([-0.3, 0.0, 0.2])
    parametrize_weight(model[4], Codebook(levels, torch.randint(0, 3, (8, 32))))
    small = kind().compress(model)
    for place in (0, 2, 4):
        assert (small[place].weight[model[place].weight == 0] == 0).all()
    if kind is not wb.NormalFloat4:  # whose levels differ from group to group
        assert len(small[4].weight.unique()) <= 3


@pytest.mark.parametrize("kind", ALL)
def test_a_layer_of_zeros_stays_one(kind):
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.data.zero_()
    assert (kind().compress(model)[0].weight == 0).all()


def test_the_largest_layers_come_first_and_shared_ones_together():
    model = model_of()  # 36, 512 and 256 weights
    assert largest_layers(model, 0.0) == []
    assert largest_layers(model, 0.5) == ["2"] and largest_layers(model, 0.7) == ["2", "4"]
    assert largest_layers(model, 1.0) == ["2", "4", "0"]
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    assert largest_layers(tied, 0.3) == ["0", "1"]


def test_a_weight_that_does_not_fit_is_refused():
    model = model_of()
    model[2].weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"layer '2' reaches 1e\+06, and float16 ends at 65504; use BFloat16"):
        wb.Float16().compress(model)
    assert float(wb.BFloat16().compress(model)[2].weight[0, 0]) == pytest.approx(1e6, rel=0.01)


@pytest.mark.parametrize("kind", ALL)
def test_nan_is_refused(kind):
    model = model_of()
    model[4].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '4' holds NaN"):
        kind().compress(model)


@pytest.mark.parametrize("kind", ALL)
def test_a_model_in_half_precision_stays_one(kind):
    model = nn.Sequential(nn.Linear(64, 4)).half()
    small = kind().compress(model)
    assert small(torch.randn(2, 64).half()).dtype == torch.float16
