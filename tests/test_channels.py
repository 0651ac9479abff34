"""Channels that are removed must leave the outputs of a network in which they are zero: the oracle of this file."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from workbench.surgery import TracingError, channel_groups, cut_channels, trace_channels
from workbench.surgery.channels import tracing
from workbench.weights import Codebook, FakeQuantize, Mask, attach_input_quantizer, parametrize_weight

torch.set_num_threads(1)


# ---------------------------------------------------------------------- models


def block(wide, out, **options):
    return nn.Sequential(nn.Conv2d(wide, out, 3, padding=1, **options), nn.BatchNorm2d(out), nn.ReLU())


def vgg_like():
    return nn.Sequential(block(3, 8), block(8, 12), nn.MaxPool2d(2), block(12, 16), nn.Flatten(), nn.Linear(256, 10))


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 16, 3)
        self.fc1, self.fc2 = nn.Linear(16, 20), nn.Linear(20, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(torch.tanh(self.fc1(x.view(x.size(0), -1))))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.middle, self.last = block(3, 8), block(8, 12), nn.Conv2d(16, 4, 1)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)

    def forward(self, x):
        skip = self.down(x)
        up = self.up(self.middle(F.avg_pool2d(skip, 2))).relu()
        return self.last(torch.cat([up, skip], 1)).mean((2, 3))


class Gated(nn.Module):
    """Splits, a stack, a transposition, a scale of its own, a shape computed from a shape."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(3, 24, 3), nn.Linear(12, 14), nn.Linear(14, 5)
        self.scale = nn.Parameter(torch.rand(14))

    def forward(self, x):
        value, gate = self.conv(x).chunk(2, dim=1)
        x = torch.stack([value * gate, value]).sum(0)
        b, c, h, w = x.shape
        x = x.reshape(b, c, h * w).transpose(1, 2)
        return self.head((self.mix(x) * self.scale).mean(1))


class Shuffled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 18, 3, groups=3)
        self.norm, self.head = nn.GroupNorm(3, 12), nn.Linear(18, 4)

    def forward(self, x):
        x = self.first(x)
        b, c, h, w = x.size()
        x = x.view(b, 3, c // 3, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(self.second(x).relu().mean((2, 3)))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.twice, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head(self.twice(self.twice(x).relu()).relu().mean((2, 3)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.right.weight = self.left.weight
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.first(x).relu()
        return self.head(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


SMALL = {
    "vgg": vgg_like,
    "lenet": LeNet,
    "unet": UNet,
    "gated": Gated,
    "shuffled": Shuffled,
    "shared": Shared,
    "tied": Tied,
}
LARGE = (
    "resnet18",
    "resnext50_32x4d",
    "densenet121",
    "mobilenet_v2",
    "squeezenet1_1",
    "shufflenet_v2_x0_5",
    "efficientnet_b0",
    "regnet_y_400mf",
    "mnasnet0_5",
)
SIZES = {"lenet": 10}


def build(name):
    """Return the model in double precision, with statistics and scales of BatchNorm that are not the usual 0 and 1."""
    torch.manual_seed(0)
    if name in SMALL:
        model = SMALL[name]()
    else:
        import torchvision

        model = getattr(torchvision.models, name)(weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    size = SIZES.get(name, 64 if name in LARGE else 8)
    return model.double().eval(), torch.randn(2, 3, size, size, dtype=torch.double)


# ---------------------------------------------------------------------- the oracle


def random_cuts(groups, seed=0):
    generator = torch.Generator().manual_seed(seed)
    cuts = []
    for group in groups:
        keep = torch.rand(len(group), generator=generator) < 0.6
        keep[0] = True
        cuts.append((group, keep))
    return cuts


def zeroed(model, cuts):
    """Return a copy in which every removed channel is zero where it is made, and wherever a norm passes it on."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for group, keep in cuts:
            for member in group.members:
                for name, dim in member.tensors if member.role != "in" else ():
                    tensor = getattr(copied.get_submodule(member.layer), name, None)
                    if tensor is not None and name != "running_var":
                        tensor.index_fill_(dim, member.index[~keep].flatten(), 0.0)
    return copied


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_removed_is_the_same_as_zero(name):
    model, x = build(name)
    cuts = random_cuts(channel_groups(model, x))
    small = cut_channels(copy.deepcopy(model), cuts)
    with torch.no_grad():
        expected, found = zeroed(model, cuts)(x), small(x)
    assert expected.std() > 0
    assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))
    fewer = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    assert fewer < 0.75


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_only_what_must_stay_is_skipped(name):
    model, x = build(name)
    trace = trace_channels(model, x)
    *_, last = (n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    assert trace.skipped == {"last" if name == "unet" else last: "these are the model's outputs"}


def test_every_channel_stands_in_one_group_only():
    model, x = build("densenet121")
    seen = set()
    for group in channel_groups(model, x):
        for member in group.members:
            places = {(member.layer, member.role, place) for place in member.index.flatten().tolist()}
            assert not places & seen
            seen |= places


def test_a_residual_sum_ties_its_layers():
    model, x = build("resnet18")
    groups = [set(group.layers) for group in channel_groups(model, x)]
    assert {"conv1", "layer1.0.conv2", "layer1.1.conv2"} in groups
    assert {"layer2.0.conv2", "layer2.0.downsample.0", "layer2.1.conv2"} in groups
    assert {"layer1.0.conv1"} in groups


def test_flattening_gives_each_channel_its_features():
    model, x = build("vgg")
    (last,) = [g for g in channel_groups(model, x) if g.layers == ("3.0",)]
    (reader,) = [m for m in last.members if m.role == "in"]
    assert reader.layer == "5" and torch.equal(reader.index, torch.arange(256).view(16, 16))


def test_small_groups_go_whole_and_large_groups_are_thinned():
    many = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=8), nn.Conv2d(16, 4, 1)).eval()
    (group,) = [g for g in channel_groups(many, torch.zeros(1, 3, 8, 8)) if len(g) == 8]
    small = cut_channels(copy.deepcopy(many), [(group, torch.arange(8) < 3)])
    assert (small[1].groups, small[1].in_channels, small[1].out_channels, small[1].weight.shape[1]) == (3, 6, 6, 2)
    few = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, groups=2), nn.Conv2d(32, 4, 1)).eval()
    groups = channel_groups(few, torch.zeros(1, 3, 8, 8))
    small = cut_channels(copy.deepcopy(few), [(g, torch.arange(len(g)) < 3) for g in groups])
    assert (small[1].groups, small[1].in_channels, small[1].out_channels, small[1].weight.shape[1]) == (2, 6, 6, 3)


def test_tied_weights_stay_tied():
    model, x = build("tied")
    small = cut_channels(copy.deepcopy(model), random_cuts(channel_groups(model, x)))
    assert small.left.weight is small.right.weight and small.left.weight.shape[1] == small.first.out_channels < 8


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(12), lambda: nn.GroupNorm(3, 12), lambda: nn.GroupNorm(12, 12)])
def test_norms_over_channels_are_cut_to_size(norm):
    model = nn.Sequential(nn.Linear(5, 12), norm(), nn.GELU(), nn.Linear(12, 3)).eval()
    x = torch.randn(2, 5)
    small = cut_channels(copy.deepcopy(model), random_cuts(channel_groups(model, x)))
    assert small(x).shape == (2, 3) and small[1].weight.numel() == small[0].out_features < 12


def test_masks_and_quantizers_are_cut_with_their_weight():
    model, x = build("vgg")
    model, x = model.float(), x.float()
    for layer in [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
        parametrize_weight(layer, Mask(torch.rand_like(layer.weight) < 0.7))
        scale = layer.weight.detach().abs().flatten(1).amax(1) / 127
        parametrize_weight(layer, FakeQuantize(scale, torch.zeros_like(scale), 8, 0))
    plain = build("vgg")[0].float()
    for name, layer in plain.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.data = model.get_submodule(name).weight.detach().clone()
    cuts = random_cuts(channel_groups(model, x))
    assert len(cuts) == len(channel_groups(plain, x)) == 3
    small, expected = cut_channels(copy.deepcopy(model), cuts), cut_channels(plain, cuts)
    assert torch.equal(small(x), expected(x))
    mask, quantizer = small[1][0].parametrizations.weight
    assert mask.mask.shape == small[1][0].weight.shape and len(quantizer.scale) == small[1][0].out_channels


def test_codebooks_are_cut_with_their_weight_and_rounding_in_groups_keeps_its_channels():
    model, x = build("vgg")
    model, x = model.float(), x.float()
    layer = model[1][0]
    book = Codebook(torch.tensor([-0.1, 0.0, 0.1, 0.2]), torch.randint(0, 4, layer.weight.shape))
    parametrize_weight(layer, book)
    small = cut_channels(copy.deepcopy(model), random_cuts(channel_groups(model, x)))
    assert small(x).shape == model(x).shape and small[1][0].out_channels < layer.out_channels
    assert torch.equal(small[1][0].parametrizations.weight[0].levels, book.levels)
    scale = torch.full((layer.out_channels, layer.in_channels * 9 // 4), 0.01)
    parametrize_weight(layer, FakeQuantize(scale, torch.zeros_like(scale), 8, 0, group_size=4))
    assert "1.0" not in {member.layer for group in channel_groups(model, x) for member in group.members}


def test_an_input_quantizer_stays():
    from workbench.weights import InputQuantizer

    model, x = build("vgg")
    attach_input_quantizer(model[1][0], InputQuantizer(torch.tensor(0.02), torch.tensor(0)))
    small = cut_channels(copy.deepcopy(model).float(), random_cuts(channel_groups(model.float(), x.float())))
    assert small[1][0].input_quantizer.scale == model[1][0].input_quantizer.scale
    assert torch.isfinite(small(x.float())).all()


# ---------------------------------------------------------------------- what cannot be followed


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.free, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(256, 5)

    def forward(self, x):
        return self.head(self.conv(self.free(x)).view(-1, 256))


class Sorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.free, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(torch.sort(self.conv(self.free(x)).mean((2, 3)), dim=1)[0])


class Positioned(nn.Module):
    """Adds values of fixed size to the channels."""

    def __init__(self):
        super().__init__()
        self.free, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 5)
        self.register_buffer("offset", torch.rand(4, 1, 1))

    def forward(self, x):
        return self.head((self.conv(self.free(x)) + self.offset).mean((2, 3)))


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.free, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(2, 5)

    def forward(self, x):
        return self.head(self.conv(self.free(x))[:, :2].mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Fixed, "view(-1, 256)"), (Sorted, "torch.sort("), (Positioned, "self.offset"), (Sliced, "[:, :2]")],
)
def test_a_layer_that_cannot_be_followed_is_skipped_with_the_line(kind, words):
    model = kind().eval()
    trace = trace_channels(model, torch.randn(1, 3, 8, 8))
    assert [group.layers for group in trace.groups] == [("free",)]
    assert set(trace.skipped) == {"conv", "head"}
    assert "test_channels.py, line " in trace.skipped["conv"] and words in trace.skipped["conv"]


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        if x.sum() > 0:
            return x
        return -x


def test_an_untraceable_forward_names_its_line():
    with pytest.raises(TracingError, match=r"Branching .*test_channels.py, line \d+: `if x.sum\(\) > 0:`"):
        trace_channels(Branching(), torch.randn(1, 3, 8, 8))


def test_an_example_of_the_wrong_shape_says_so():
    with pytest.raises(TracingError, match=r"does not run on an example of shape \(2, 1, 8, 8\): Given groups=1"):
        trace_channels(vgg_like(), torch.randn(2, 1, 8, 8))


class Keyworded(nn.Module):
    """Calls a layer in a way that the rules do not foresee."""

    def __init__(self):
        super().__init__()
        self.free, self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.conv(input=self.free(x)).relu().mean((2, 3)))


def test_an_unforeseen_call_keeps_its_channels():
    model = Keyworded().eval()
    trace = trace_channels(model, torch.randn(1, 3, 8, 8))
    assert not trace.groups and {"free", "conv", "head"} == set(trace.skipped)


def test_attention_is_kept_whole_and_the_rest_is_cut():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    wrapped = nn.Sequential(nn.Linear(3, 8), model, nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 2)).eval()
    trace = trace_channels(wrapped, torch.randn(1, 4, 3))
    assert [group.layers for group in trace.groups] == [("2",)]
    assert "one piece" in trace.skipped["1.linear1"] and "not followed" in trace.skipped["0"]


def test_spectral_norm_is_skipped():
    norm = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 8, 1))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)).eval()
    trace = trace_channels(model, torch.randn(1, 3, 4, 4))
    assert [group.layers for group in trace.groups] == [("2",)] and "another shape" in trace.skipped["1"]


def test_the_model_is_left_alone():
    model, x = build("vgg")
    model.train()
    before, names = copy.deepcopy(model.state_dict()), set(vars(model))
    channel_groups(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and set(vars(model)) == names


def test_half_precision_and_several_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, a, b):
            return self.head(self.left(a) + self.right(b))

    model = Two().to(torch.bfloat16)
    (group,) = channel_groups(model, (torch.zeros(5, 3), torch.zeros(5, 4)))
    assert set(group.layers) == {"left", "right"}


def test_a_model_that_another_thread_runs_is_left_alone_while_one_is_traced():
    other, x, failed, done = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4), [], threading.Event()
    expected = other(x)

    def run():
        while not done.is_set():
            try:
                assert torch.equal(other(x), expected)
            except Exception as error:
                failed.append(error)
                return

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(30):
            tracing.trace(nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(20)]))
    finally:
        done.set()
        thread.join()
    assert not failed
