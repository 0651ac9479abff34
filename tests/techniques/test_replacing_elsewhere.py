"""Layer replacements on networks of torchvision: forward, file, fresh process, OpenVINO."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import workbench as wb
from workbench.runtimes import runtime
from workbench.surgery import clone
from workbench.techniques.low_rank.lora import first_terms, with_adapters
from workbench.techniques.replacing import replaceable_layers

MODELS = ("squeezenet1_1", "mobilenet_v3_small", "resnet18")
TECHNIQUES = [
    wb.LowRank(choose="budget", kept=0.5),
    wb.Tucker(rank=0.25),
    wb.CPDecomposition(rank=0.05, sweeps=1),
    wb.DepthwiseSeparable(multiplier=1),
    wb.PointwiseConvolution(replaced=0.5, squeeze=0.5),
]


def network(name):
    import torchvision

    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(num_classes=10)
    if name == "resnet18":
        net.layer3, net.layer4 = nn.Identity(), nn.Conv2d(128, 512, 1)  # the largest kernels only take longer
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return net.eval()


def lora(model):
    """Return the model with adapters that are not zero, as after a training."""
    generator = torch.Generator().manual_seed(0)
    down = {name: first_terms(layer.weight.detach(), 2, generator)[1] for name, layer in replaceable_layers(model)}
    ups = {name: torch.full((len(model.get_submodule(name).weight), len(pair)), 1e-3) for name, pair in down.items()}
    return with_adapters(clone(model), {name: (ups[name], down[name]) for name in down})


@pytest.mark.parametrize("name", MODELS)
def test_what_comes_out_runs_saves_loads_and_converts(name, tmp_path):
    model, x = network(name), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = sum(p.numel() for p in model.parameters())
    answers = []
    for number, technique in enumerate([*TECHNIQUES, None]):
        small = lora(model) if technique is None else technique.compress(model)
        answers.append(small(x).detach())
        assert torch.isfinite(answers[-1]).all() and answers[-1].shape == (2, 10), technique
        assert technique is None or sum(p.numel() for p in small.parameters()) <= before, technique
        wb.save(small, tmp_path / f"{number}.wb")
        there = runtime("openvino").prepare(small, x)(x)
        assert torch.allclose(there, answers[-1], rtol=1e-2, atol=1e-2 * float(answers[-1].abs().max())), technique
    torch.save((x, answers), tmp_path / "asked.pt")
    code = (
        "import sys, torch, workbench as wb; sys.path[:0] = sys.argv[3:]\n"
        f"torch.set_num_threads({torch.get_num_threads()})  # the order of sums depends on it\n"
        "from test_replacing_elsewhere import network\n"
        "x, answers = torch.load(sys.argv[1] + '/asked.pt', weights_only=True)\n"
        "same = [torch.equal(wb.load(f'{sys.argv[1]}/{i}.wb', like=network(sys.argv[2]))(x), a)\n"
        "        for i, a in enumerate(answers)]\n"
        "print(same)"
    )
    here = __file__.rpartition("/")[0]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), name, here], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str([True] * len(answers)), done.stdout + done.stderr
