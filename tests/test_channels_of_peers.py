"""Which places go with a channel: our groups against those of Torch-Pruning, on torchvision's architectures."""

import pytest
import torch
from torch import nn

from workbench.surgery import clone, trace_channels

torch.set_num_threads(1)
MISSING = "torch-pruning is not installed; `pip install -e '.[test]'` adds it."
ARCHITECTURES = (
    "alexnet resnet18 resnet50 squeezenet1_1 googlenet mnasnet0_5 mobilenet_v2 mobilenet_v3_small "
    "efficientnet_b0 densenet121 inception_v3"
).split()


def built(name):
    """Return a torchvision model with random weights, without what only training uses."""
    models = pytest.importorskip("torchvision.models")
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(models, name)(weights=None, **options).eval()


def ours(group, channel):
    """Return the places of one channel of our group: layer and role -> places."""
    return {(member.layer, member.role): set(member.index[channel].tolist()) for member in group.members}


def theirs(tp, graph, names, layer, place):
    """Return the places that Torch-Pruning removes together with one output channel of a layer."""
    kind = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
    found = {}
    for dependency, places in graph.get_pruning_group(layer, kind, idxs=[place]):
        module = dependency.target.module
        if module in names:
            found.setdefault((names[module], role(graph, module, dependency)), set()).update(places)
    return found


def role(graph, module, dependency):
    depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
    if depthwise or isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "both"
    return "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_channel_s_places_are_those_of_torch_pruning(name):
    tp = pytest.importorskip("torch_pruning", reason=MISSING)
    model, example = built(name), torch.zeros(1, 3, *[80 if name == "inception_v3" else 64] * 2)
    groups = trace_channels(model, example).groups
    peer = clone(model)
    graph = tp.DependencyGraph().build_dependency(peer, example_inputs=example)
    names = {module: path for path, module in peer.named_modules()}
    assert groups
    for group in groups:
        for channel in {0, len(group) // 2, len(group) - 1}:
            places = ours(group, channel)
            first = group.layers[0]
            place = min(places[first, "out"])
            assert places == theirs(tp, graph, names, peer.get_submodule(first), place), f"{first}, channel {place}"
