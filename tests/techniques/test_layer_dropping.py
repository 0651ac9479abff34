"""Dropping blocks: which ones can go, which go first, and what is left."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import workbench as wb
from workbench import LayerDropping
from workbench.techniques.pruning.layer_dropping import drop_changes, droppable, output_change

torch.set_num_threads(1)
images = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """x + strength · relu(linear(x))."""

    def __init__(self, strength):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.strength = strength

    def forward(self, x):
        return x + self.strength * self.body(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    blocks = [Block(strength) for strength in (0.3, 0.01, 1.0, 0.1)]
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(*blocks), nn.LayerNorm(8), nn.Linear(8, 5)).eval()


def test_the_block_that_changes_least_goes_first(model):
    order = LayerDropping().order(model, images)
    assert [name for name in order if name.startswith("1.")] == ["1.1", "1.3", "1.0", "1.2"]
    small = LayerDropping(sparsity=0.4).compress(model, images)
    dropped = [name for name, m in small.named_modules() if isinstance(m, nn.Identity)]
    assert set(dropped) == set(order[:2]) == {"1.1", "1.3"}
    by_hand = copy.deepcopy(model)
    by_hand[1] = nn.Sequential(model[1][0], model[1][2])
    assert torch.equal(small(images), by_hand(images))


def test_blocks_are_outermost_but_rows_are_opened(model):
    assert droppable(model, [images]) == ["0", "1.0", "1.1", "1.2", "1.3"]  # neither the row nor what is in a block
    net = nn.Sequential(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU()), nn.Conv2d(2, 3, 1))
    assert droppable(net.eval(), [torch.randn(1, 2, 5, 5)]) == ["0"]


def test_the_change_is_measured_on_the_images(model):
    changes = drop_changes(model, ["1.2"], [images[:3], images[3:]])
    without = copy.deepcopy(model)
    without[1][2] = nn.Identity()
    error = (without(images) - model(images)).norm() ** 2 / model(images).norm() ** 2
    assert changes["1.2"] == pytest.approx(error.item(), rel=1e-4)
    assert output_change(images, images) == 0 and output_change(torch.zeros(2), torch.zeros(2)) == 0


def test_blocks_in_a_module_list_and_blocks_that_code_reaches_into():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(0.1), Block(0.5), Block(0.2)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x * self.blocks[0].strength

    torch.manual_seed(0)
    net = Listed().eval()
    assert LayerDropping().order(net, images) == ["blocks.2", "blocks.1"]
    assert LayerDropping(sparsity=1.0).compress(net, images).blocks[0].strength == 0.1


def test_a_block_at_two_places_stays():
    block = Block(0.1)
    net = nn.Sequential(block, nn.Linear(8, 8), block, nn.Linear(8, 3)).eval()
    assert droppable(net, [images]) == ["1"]


def test_residual_networks_of_torchvision_lose_whole_blocks_and_load_again(tmp_path):
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(num_classes=4).eval()
    photos = torch.randn(2, 3, 48, 48)
    assert droppable(net, [photos]) == ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]
    small = LayerDropping(sparsity=0.6).compress(net, photos)
    assert sum(isinstance(m, nn.Identity) for m in small.modules()) == 3
    wb.save(small, tmp_path / "small.wb")
    again = wb.load(tmp_path / "small.wb", like=resnet18(num_classes=4))
    assert torch.equal(again(photos), small(photos))
    assert (tmp_path / "small.wb").stat().st_size < len(wb.encode(net))


def test_networks_with_nothing_to_drop_say_so():
    for name in ("lenet-5", "lenet-300-100"):
        with pytest.raises(ValueError, match="found no block to drop in Sequential: no child"):
            LayerDropping().compress(wb.build(name, seed=0).eval(), torch.randn(2, 1, 28, 28))


def test_dropping_says_what_it_needs(model):
    with pytest.raises(ValueError, match="needs images: pass a data set"):
        LayerDropping().compress(model)
    model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '0' holds NaN"):
        LayerDropping().compress(model, images)


def test_glyphs_cnn_keeps_its_shape_in_two_places():
    net = wb.build("glyphs-cnn", seed=0).eval()
    assert droppable(net, [torch.randn(1, 1, 28, 28)]) == ["features.4", "features.5"]
