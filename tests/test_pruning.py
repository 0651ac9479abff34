"""Pruning: exact counts, both slider ends, nothing else touched, and training that keeps what was removed."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from workbench.techniques.pruning import ChannelPruning, MagnitudePruning, magnitude_mask
from workbench.techniques.pruning.channel import global_sparsities, kept_count, strongest
from workbench.techniques.pruning.criteria import channel_importance
from workbench.techniques.pruning.magnitude import global_magnitude_mask
from workbench.techniques.repair import recalibrate
from workbench.weights import FakeQuantize, Mask, parametrize_weight, sparsity, weight_parametrizations

torch.set_num_threads(1)
TECHNIQUES = (MagnitudePruning, ChannelPruning)


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(96, 40), nn.ReLU(), nn.Linear(40, 5),
    )  # fmt: skip


@pytest.fixture
def model():
    return small_net().eval()


@pytest.fixture
def x():
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def toy_data(count=64):
    """Five classes of noisy bars."""
    from workbench.data import Data, Split

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 5
    images = torch.randint(0, 80, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), 0, labels] += 150
    split = Split(images, labels, (0.3,), (0.3,))
    return Data(name="bars", title="Bars", train=split, val=split, test=split, classes=tuple("abcde"))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------- both techniques


@pytest.mark.parametrize("kind", TECHNIQUES)
def test_neutral_gives_equal_outputs(kind, model, x):
    technique = kind.neutral()
    same = technique.compress(model, x)
    assert technique.is_neutral and torch.equal(same(x), model(x))
    assert not any(weight_parametrizations(m) for m in same.modules()) and parameters(same) == parameters(model)


@pytest.mark.parametrize("kind", TECHNIQUES)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_every_slider_position_works(kind, scope, model, x):
    knob = kind.settings()[0]
    sizes = []
    for position in knob.positions():
        small = kind(sparsity=position, scope=scope).compress(model, x)
        assert torch.isfinite(small(x)).all() and small(x).shape == (4, 5) and not small.training
        sizes.append(parameters(small) if kind is ChannelPruning else 1 - sparsity(small))
    assert sizes[0] == (parameters(model) if kind is ChannelPruning else 1.0)
    assert sizes[-1] < 0.1 * sizes[0]
    if scope == "layer" or kind is MagnitudePruning:
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("kind", TECHNIQUES)
def test_the_given_model_is_left_alone(kind, model, x):
    model.train()
    before = copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    small = kind(sparsity=0.5).compress(model, x)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert {name: set(vars(m)) for name, m in model.named_modules()} == attributes and model.training
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}


@pytest.mark.parametrize("kind", TECHNIQUES)
def test_pruning_what_is_pruned_already(kind, model, x):
    once = kind(sparsity=0.5).compress(model, x)
    twice = kind(sparsity=0.5).compress(once, x)
    assert torch.isfinite(twice(x)).all()
    if kind is ChannelPruning:
        assert parameters(twice) < parameters(once)
    else:
        assert sparsity(twice) == sparsity(once)  # the zeros are the smallest weights
        assert all(len(weight_parametrizations(m)) <= 1 for m in twice.modules())


@pytest.mark.parametrize("first", TECHNIQUES)
@pytest.mark.parametrize("second", TECHNIQUES)
def test_one_after_the_other(first, second, model, x):
    small = second(sparsity=0.5).compress(first(sparsity=0.5).compress(model, x), x)
    assert torch.isfinite(small(x)).all()
    if MagnitudePruning in (first, second):
        assert sparsity(small) > 0.2


@pytest.mark.parametrize("kind", TECHNIQUES)
def test_new_weights_are_seen_though_results_are_remembered(kind, model, x):
    kind(sparsity=0.5).compress(model, x)
    with torch.no_grad():
        model[0].weight[:8] *= 100
        model[0].weight[8:] /= 100
    small = kind(sparsity=0.5, scope="layer").compress(model, x)
    expected = model[0].weight[:8] if kind is ChannelPruning else model[0].weight[8:]
    assert torch.equal(small[0].weight, expected) if kind is ChannelPruning else not small[0].weight[8:].any()


@pytest.mark.parametrize("kind", TECHNIQUES)
def test_nan_and_emptiness_are_refused(kind, model, x):
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '3' holds NaN"):
        kind(sparsity=0.5).compress(model, x)
    with pytest.raises(ValueError, match=f"{kind.__name__} found no .* in Sequential"):
        kind(sparsity=0.5).compress(nn.Sequential(nn.ReLU()), x)


@pytest.mark.parametrize("kind", TECHNIQUES)
@pytest.mark.parametrize("settings", [{"sparsity": 1.0}, {"sparsity": -0.1}, {"sparsity": "half"}, {"scope": "some"}])
def test_settings_out_of_range_are_refused(kind, settings):
    with pytest.raises(ValueError, match=kind.__name__):
        kind(**settings)


@pytest.mark.parametrize("kind", TECHNIQUES)
def test_fine_tuning_brings_accuracy_back_and_can_be_stopped(kind):
    from workbench.training import evaluate, fit

    data, model = toy_data(320), small_net()
    for _ in fit(model, data, epochs=4, learning_rate=1e-2, seed=0, augment=False):
        pass
    assert evaluate(model, data.val).value > 0.9
    steps = []
    plain = kind(sparsity=0.8).compress(model, data)
    tuned = kind(sparsity=0.8, finetune=4).compress(model, data, steps.append)
    assert steps and evaluate(tuned, data.val).value >= evaluate(plain, data.val).value
    assert not tuned.training and torch.isfinite(tuned(data.example())).all()
    if kind is MagnitudePruning:
        assert sparsity(tuned) == pytest.approx(sparsity(plain), abs=1e-3)
    stopped = []
    kind(sparsity=0.8, finetune=10).compress(model, data, lambda step: stopped.append(step) or False)
    assert len(stopped) == 1


@pytest.mark.parametrize("kind", TECHNIQUES)
def test_fine_tuning_needs_images(kind, model, x):
    with pytest.raises(ValueError, match="Fine-tuning needs training images"):
        kind(sparsity=0.5, finetune=1).compress(model, x)


# ---------------------------------------------------------------------- magnitude


@pytest.mark.parametrize("part", [0.0, 0.003, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("weight", [torch.randn(7, 11), torch.ones(5, 5), torch.zeros(1), torch.randn(4, 3).half()])
def test_masks_remove_the_exact_count(weight, part):
    mask = magnitude_mask(weight, part)
    assert mask.shape == weight.shape and int((~mask).sum()) == round(part * weight.numel())
    if mask.any() and not mask.all():
        assert weight[~mask].abs().max() <= weight[mask].abs().min()


def test_masks_equal_those_of_torch():
    weight = torch.randn(40, 30)
    layer = nn.Linear(30, 40)
    layer.weight.data = weight.clone()
    prune.l1_unstructured(layer, "weight", 0.37)
    assert torch.equal(layer.weight_mask.bool(), magnitude_mask(weight, 0.37))


def test_global_masks_compare_all_weights():
    small, large = torch.randn(50) * 0.01, torch.randn(50)
    masks = global_magnitude_mask([small, large], 0.5)
    assert int((~masks[0]).sum()) > 45 and sum(int((~m).sum()) for m in masks) == 50


def test_global_and_layer_scope_count_differently(model):
    everywhere = MagnitudePruning(sparsity=0.9, scope="layer").compress(model)
    parts = [float((m.weight == 0).float().mean()) for m in everywhere if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert all(part == pytest.approx(0.9, abs=0.01) for part in parts)
    together = MagnitudePruning(sparsity=0.9, scope="global").compress(model)
    assert sparsity(together) == pytest.approx(0.9, abs=1e-3)


def test_no_layer_is_emptied():
    model = nn.Sequential(nn.Linear(4, 50), nn.Linear(50, 50), nn.Linear(50, 2)).eval()
    with torch.no_grad():
        model[2].weight *= 1e-6
    for scope in ("global", "layer"):
        small = MagnitudePruning(sparsity=0.98, scope=scope).compress(model)
        assert all(layer.weight.any() for layer in small)
        assert sparsity(small) == pytest.approx(0.98, abs=0.005)


def test_tied_weights_get_one_mask():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    model[1].weight = model[0].weight
    small = MagnitudePruning(sparsity=0.5).compress(model)
    assert torch.equal(small[0].weight, small[1].weight) and sparsity(small) == 0.5


def test_a_mask_lies_on_a_quantizer(model):
    scale = model[7].weight.detach().abs().max() / 127
    parametrize_weight(model[7], FakeQuantize(scale, torch.tensor(0), 8, None))
    small = MagnitudePruning(sparsity=0.9).compress(model)
    assert [type(p) for p in weight_parametrizations(small[7])] == [FakeQuantize, Mask]


# ---------------------------------------------------------------------- channels


def test_counts_of_channels_are_exact(model, x):
    small = ChannelPruning(sparsity=0.25).compress(model, x)
    assert (small[0].out_channels, small[3].out_channels, small[7].out_features) == (12, 18, 30)
    assert (small[1].num_features, small[3].in_channels, small[7].in_features) == (12, 12, 72)
    assert small[9].out_features == 5


def test_counts_are_rounded_to_what_kernels_like(model, x):
    small = ChannelPruning(sparsity=0.6, round_to=8).compress(model, x)
    assert (small[0].out_channels, small[3].out_channels, small[7].out_features) == (8, 8, 16)
    assert kept_count(5, 0.9, 8) == 5 and kept_count(64, 0.9, 8) == 8 and kept_count(10, 0.9) == 1


def test_the_weakest_channels_go(model, x):
    with torch.no_grad():
        model[3].weight[::2] *= 0.01
        model[7].weight.view(40, 24, 4)[:, ::2] *= 0.01
    for criterion in ("l1", "l2"):
        small = ChannelPruning(sparsity=0.5, criterion=criterion).compress(model, x)
        keep = ChannelPruning(sparsity=0.5, criterion=criterion).cuts(model, x)[0][1]
        assert torch.equal(small[3].weight, model[3].weight[1::2][:, keep])


def test_importance_is_the_norm_over_all_slices():
    maker, reader = torch.randn(6, 3), torch.randn(5, 12)
    places = torch.arange(12).view(6, 2)
    score = channel_importance([(maker.pow(2).sum(1), torch.arange(6)[:, None]), (reader.pow(2).sum(0), places)])
    expected = [maker[c].norm() ** 2 + reader[:, 2 * c : 2 * c + 2].norm() ** 2 for c in range(6)]
    assert torch.allclose(score, torch.stack(expected))


def test_ties_and_constant_scores_keep_the_exact_count():
    assert int(strongest(torch.ones(7), 3).sum()) == 3
    parts = global_sparsities([torch.zeros(4), torch.ones(4)], 0.5)
    assert sum(parts) == pytest.approx(1.0)


def test_the_whole_module_runs_without_the_original_code(model, x):
    small = ChannelPruning(sparsity=0.5).compress(model, x)
    plain = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 5),
    ).eval()  # fmt: skip
    plain.load_state_dict(small.state_dict())
    assert torch.equal(plain(x), small(x))


def test_channel_pruning_asks_for_an_example(model):
    for missing in (None, "glyphs", ()):
        with pytest.raises(ValueError, match="pass a data set from load_data, or one example batch"):
            ChannelPruning(sparsity=0.5).compress(model, missing)


def test_skipped_layers_say_why(model, x):
    assert ChannelPruning.trace(model, x).skipped == {"9": "these are the model's outputs"}
    with pytest.raises(ValueError, match=r"no channels to remove in Sequential .*these are the model's outputs"):
        ChannelPruning(sparsity=0.5).compress(nn.Sequential(nn.Linear(4, 3)), torch.zeros(1, 4))


def test_recalibration_gives_the_statistics_of_the_images():
    data, model = toy_data(), small_net()
    batch = data.train.batch(slice(0, 64))[0]
    model.train()(torch.randn(8, 1, 8, 8))  # leaves older statistics behind
    same = recalibrate(copy.deepcopy(model), [batch])
    made = model[0](batch)
    assert torch.allclose(same[1].running_mean, made.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(same[1].running_var, made.var((0, 2, 3)), atol=1e-4)
    assert same[1].momentum == model[1].momentum and not any(m.training for m in same.modules())
    assert torch.equal(same[0].weight, model[0].weight) and same[0].weight.is_contiguous()


def test_recalibration_can_be_switched_off():
    data, model = toy_data(), small_net().eval()
    assert torch.equal(ChannelPruning(recalibrate=False).compress(model, data)[1].running_mean, torch.zeros(8))
    assert ChannelPruning(recalibrate=True).compress(model, data)[1].running_mean.any()


def test_no_training_images_leave_the_statistics_alone(model, x):
    empty = SimpleNamespace(example=lambda: x, train=toy_data().train.take(1))
    small = ChannelPruning().compress(model, empty)
    assert torch.equal(small[1].running_mean, torch.zeros(8)) and torch.isfinite(small(x)).all()
