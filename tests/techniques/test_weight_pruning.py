"""Pruning of single weights beyond plain magnitude: budgets, schedules, scores, patterns, and what training keeps."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import toy
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from workbench import (
    GradualPruning,
    MagnitudePruning,
    MovementPruning,
    SemiStructuredPruning,
    WandaPruning,
    WeightDecayPruning,
    encode,
    evaluate,
)
from workbench.techniques.pruning import n_m_mask
from workbench.techniques.pruning.masks import cubic_sparsity, erk_sparsities, kept, ramp_end, ramp_part, scoped_ranks
from workbench.techniques.pruning.movement import ScoredMask, choose
from workbench.techniques.pruning.wanda import all_input_squares, row_masks, row_ranks, wanda_scores
from workbench.weights import Codebook, Mask, parametrize_weight, sparsity, weight_parametrizations

TRAINING = (GradualPruning, MovementPruning, WeightDecayPruning)
ALL = (*TRAINING, WandaPruning, SemiStructuredPruning)


@pytest.fixture(scope="module")
def data():
    full = toy.data(val=240, test=60)
    return SimpleNamespace(train=toy.images(1024, 0), val=full.val, test=full.test, example=full.example)


@pytest.fixture(scope="module")
def model():
    return toy.model()


def weights(model):
    return {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


# ---------------------------------------------------------------------- budgets and schedules


def test_global_masks_equal_those_of_torch(model):
    theirs, ours = copy.deepcopy(model), MagnitudePruning(sparsity=0.62).compress(model)
    places = [(m, "weight") for m in theirs if hasattr(m, "weight")]
    prune.global_unstructured(places, prune.L1Unstructured, amount=0.62)
    for name, weight in weights(ours).items():
        assert torch.equal(weight != 0, theirs.get_submodule(name).weight_mask.bool())


def test_uniform_is_another_name_for_layer(model):
    assert MagnitudePruning(scope="uniform") == MagnitudePruning(scope="layer")
    assert GradualPruning(scope="uniform").values()["scope"] == "layer"
    theirs = copy.deepcopy(model[0])
    prune.l1_unstructured(theirs, "weight", 0.5)
    small = MagnitudePruning(sparsity=0.5, scope="uniform").compress(model)
    assert torch.equal(small[0].weight != 0, theirs.weight_mask.bool())


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4), min_size=1, max_size=6),
    st.floats(0, 1, allow_subnormal=False),
)
def test_erk_spends_the_budget_in_proportion_to_sides_over_size(shapes, part):
    sizes = [torch.Size(shape).numel() for shape in shapes]
    gone = erk_sparsities([tuple(shape) for shape in shapes], part)
    assert all(-1e-9 <= g <= 1 + 1e-9 for g in gone)
    assert sum(g * n for g, n in zip(gone, sizes, strict=True)) == pytest.approx(
        part * sum(sizes), abs=1e-6 * sum(sizes)
    )
    ratios = [(1 - g) * n / sum(s) for g, n, s in zip(gone, sizes, shapes, strict=True)]  # one factor for all …
    most = max(ratios)
    assert all(r == pytest.approx(most, rel=1e-5, abs=1e-9) or g < 1e-9 for r, g in zip(ratios, gone, strict=True))


def test_erk_spares_small_layers(model):
    small = MagnitudePruning(sparsity=0.9, scope="erk").compress(model)
    zeros = {name: float((w == 0).float().mean()) for name, w in weights(small).items()}
    assert zeros["0"] == 0 and zeros["3"] > zeros["7"] > zeros["9"]
    assert sparsity(small) == pytest.approx(0.9, abs=1e-3)


def test_the_cubic_schedule_has_the_values_of_the_paper():
    assert [cubic_sparsity(t, 0.8) for t in (0, 0.5, 1, 2)] == pytest.approx([0, 0.8 * 7 / 8, 0.8, 0.8])


@pytest.mark.parametrize("steps", [1, 2, 5, 16, 100, 247])
def test_the_ramp_ends_within_the_training(steps):
    parts = [ramp_part(number, steps) for number in range(1, steps + 1)]
    known = [part for part in parts if part is not None]
    assert known == sorted(known) and known[-1] == 1 and parts.index(1) + 1 == ramp_end(steps) <= steps
    assert steps < 16 or ramp_end(steps) <= 0.5 * steps


# ---------------------------------------------------------------------- techniques that train


@pytest.mark.parametrize("kind", TRAINING)
@pytest.mark.parametrize("scope", ["global", "erk"])
def test_training_ends_at_the_sparsity_and_beats_the_cut_alone(kind, scope, model, data):
    steps = []
    small = kind(sparsity=0.8, scope=scope, epochs=2).compress(model, data, steps.append)
    assert sparsity(small) == pytest.approx(0.8, abs=2e-3) and not small.training
    if kind is not MovementPruning:  # its scores need far more steps than these to beat anything
        cut = kind(sparsity=0.8, scope=scope).compress(model, data, lambda step: False)
        assert evaluate(small, data.val).value > evaluate(cut, data.val).value
    numbers = [step.step for step in steps]
    assert numbers == sorted(set(numbers)) and numbers[-1] == steps[-1].steps
    assert len(encode(small)) < 0.3 * len(encode(model))


@pytest.mark.parametrize("kind", TRAINING)
def test_a_stop_cuts_the_rest_at_once(kind, model, data):
    seen = []
    small = kind(sparsity=0.7, epochs=3).compress(model, data, lambda step: seen.append(step) or False)
    assert len(seen) == 1 and sparsity(small) == pytest.approx(0.7, abs=2e-3) and not small.training
    kinds = [[type(p) for p in weight_parametrizations(m)] for m in small if hasattr(m, "weight")]
    assert kinds == [[Mask]] * 4


@pytest.mark.parametrize("kind", TRAINING)
def test_the_seed_decides_the_result(kind, model, data):
    first, same, other = (kind(sparsity=0.8, epochs=1, seed=s).compress(model, data) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(same).values(), strict=True))
    assert not torch.equal(first[7].weight, other[7].weight)


@pytest.mark.parametrize("kind", TRAINING)
def test_what_earlier_stages_did_stays(kind, model, data):
    before = MagnitudePruning(sparsity=0.5).compress(model)
    levels = torch.tensor([-0.05, 0.05])
    parametrize_weight(before[7], Codebook(levels, (before[7].weight > 0).int()))
    small = kind(sparsity=0.7, epochs=1).compress(before, data)
    for name, weight in weights(small).items():
        assert not weight[weights(before)[name] == 0].any()
    assert len(small[7].weight.unique()) <= 3 and sparsity(small) == pytest.approx(0.7, abs=5e-3)


@pytest.mark.parametrize("kind", TRAINING)
def test_tied_weights_stay_tied_through_training(kind, data):
    torch.manual_seed(0)
    tied = nn.Sequential(
        nn.Flatten(), nn.Linear(256, 24), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24), nn.Linear(24, 8)
    )
    tied[4].weight = tied[2].weight
    small = kind(sparsity=0.8, epochs=1).compress(tied.eval(), data)
    assert torch.equal(small[2].weight, small[4].weight) and (small[2].weight == 0).any()


@pytest.mark.parametrize("kind", TRAINING)
def test_training_says_what_it_needs(kind, model, data):
    with pytest.raises(ValueError, match="needs training images"):
        kind().compress(model, data.example(4))
    with pytest.raises(ValueError, match=r"float16: call model.float\(\)"):
        kind().compress(copy.deepcopy(model).half(), data)
    assert kind.neutral().recall(model) is not model and kind().recall(model) is None


def test_masks_of_gradual_pruning_only_grow(model, data, monkeypatch):
    from workbench.techniques.pruning import gradual

    seen, plain = [], gradual.prune_smallest
    monkeypatch.setattr(
        gradual, "prune_smallest", lambda tied, *rest: plain(tied, *rest) or seen.append(tied[1][0][1].weight != 0)
    )
    GradualPruning(sparsity=0.9, epochs=4).compress(model, data)
    assert len(seen) > 8 and all((later <= earlier).all() for earlier, later in pairwise(seen))
    counts = [int(mask.sum()) for mask in seen]
    assert counts[0] > counts[2] > counts[-1] and counts[0] - counts[1] > counts[-4] - counts[-3]


def test_movement_scores_of_a_small_matrix():
    """y = w x with x = (1, 2), loss = sum(y · t): the gradient of w is t xᵀ, so scores are −w · t xᵀ, masked or not."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, -2.0], [3.0, 0.5]])
    scored = ScoredMask(torch.ones(2, 2, dtype=torch.bool))
    parametrize_weight(layer, scored)
    scored.mask = torch.tensor([[True, False], [True, True]])
    for _ in range(2):
        (layer(torch.tensor([1.0, 2.0])) * torch.tensor([1.0, -1.0])).sum().backward()
        scored.collect(growing=True)
    assert torch.equal(scored.scores, 2 * torch.tensor([[-1.0, 4.0], [3.0, 1.0]]))
    gradient = layer.parametrizations.weight.original.grad
    assert gradient[0, 1] == 0 and gradient[0, 0] != 0 and scored.probe.grad is None
    choose([[scored]], 0.5, "global")
    assert torch.equal(scored.mask, torch.tensor([[False, True], [True, False]]))


def test_a_score_never_brings_back_what_is_not_allowed():
    scored = ScoredMask(torch.tensor([[True, False, True]]))
    scored.scores = torch.tensor([[-3.0, 9.0, -4.0]])
    choose([[scored]], 0.0, "layer")
    assert scored.mask.tolist() == [[True, False, True]]


def test_strong_decay_shrinks_what_is_kept(model, data):
    means = []
    for decay in (0.0, 20.0):
        small = WeightDecayPruning(sparsity=0.5, decay=decay, epochs=3, finetune=0).compress(model, data)
        means.append(float(small[7].weight.detach().abs().mean()))
    assert means[1] < 0.95 * means[0]


# ---------------------------------------------------------------------- Wanda


def test_wanda_of_a_small_matrix():
    """Inputs of norm 3 and 4 (two images): |1| · 4 beats |−1.2| · 3, though magnitude alone says otherwise."""
    layer = nn.Sequential(nn.Linear(2, 2, bias=False))
    layer[0].weight.data = torch.tensor([[-1.2, 1.0], [2.0, 1.0]])
    images = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    scores = wanda_scores(layer[0].weight, all_input_squares(layer, [images])["0"])
    assert torch.allclose(scores, torch.tensor([[3.6, 4.0], [6.0, 4.0]]))
    small = WandaPruning(sparsity=0.5).compress(layer, images)
    assert torch.equal(small[0].weight, torch.tensor([[0.0, 1.0], [2.0, 0.0]]))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.Conv2d(4, 8, (3, 2), groups=2, dilation=2, padding="same"),
        nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="circular"),
        nn.Conv1d(3, 5, 3, padding=2),
    ],
)
def test_norms_of_convolutions_are_those_of_their_patches(layer):
    """The oracle: a convolution of x² with a kernel that is one at a single place sums the squares met there."""
    shape = (2, layer.in_channels, 9) if isinstance(layer, nn.Conv1d) else (2, layer.in_channels, 9, 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = all_input_squares(nn.Sequential(layer), [x, x])["0"]
    assert found.shape == layer.weight.shape
    probe = copy.deepcopy(layer)
    probe.bias = None
    for row, place in ((0, 0), (len(layer.weight) - 1, layer.weight[0].numel() - 1)):
        probe.weight.data.zero_()
        probe.weight.data[row].view(-1)[place] = 1
        assert float(found[row].reshape(-1)[place]) == pytest.approx(
            2 * probe(x.square())[:, row].sum().item(), rel=1e-4
        )


def test_every_row_loses_the_same_count():
    ranked = row_ranks(torch.randn(5, 3, 3, 3))
    for part in (0.0, 0.3, 0.98, 1.0):
        mask = row_masks(ranked, part).flatten(1)
        assert (mask.sum(1) == max(27 - round(part * 27), 1)).all()


def test_layers_that_are_not_called_are_pruned_by_magnitude():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x):
            return nn.functional.linear(x, self.inner.weight)

    model = Reads().eval()
    small = WandaPruning(sparsity=0.5).compress(model, torch.randn(4, 6))
    expected = torch.stack([row.abs() >= row.abs().sort().values[3] for row in model.inner.weight.detach()])
    assert torch.equal(small.inner.weight != 0, expected)


def test_wanda_asks_for_images(model):
    for technique in (WandaPruning(), SemiStructuredPruning(criterion="wanda")):
        with pytest.raises(ValueError, match="needs images: pass a data set"):
            technique.compress(model)


# ---------------------------------------------------------------------- N:M


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 21))
def test_n_of_m_largest_stay(n, m, inputs):
    scores = torch.rand(3, inputs, 2, generator=torch.Generator().manual_seed(inputs))
    if n > m:
        with pytest.raises(ValueError, match="N goes from 1 to M"):
            n_m_mask(scores, n, m)
        return
    mask = n_m_mask(scores, n, m)
    for first in range(0, inputs, m):
        group, stays = scores[:, first : first + m], mask[:, first : first + m]
        count = min(n, group.shape[1])
        assert (stays.sum(1) == count).all()
        assert (
            torch.equal(torch.where(stays, group, 0.0).sum(1), group.topk(count, 1).values.flip(1).sum(1))
            or (torch.where(stays, group, 0.0).sum(1) - group.topk(count, 1).values.sum(1)).abs().max() < 1e-6
        )


def test_two_of_four_masks_equal_those_of_torch():
    from torch.ao.pruning import WeightNormSparsifier

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 24))
    ours = SemiStructuredPruning().compress(model.eval())[0].weight != 0
    theirs = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    theirs.prepare(model, [{"tensor_fqn": "0.weight"}])
    theirs.step()
    assert torch.equal(ours, model[0].parametrizations.weight[0].mask.bool())


def test_two_of_four_weights_survive_the_format_of_sparse_tensor_cores():
    """torch's semi-structured format holds only two of four: what comes back must be all there was."""
    from torch.sparse import _semi_structured_conversions as conversions

    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 32)).eval()
    weight = SemiStructuredPruning().compress(layer)[0].weight.detach().half()
    packed, places = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert packed.shape == (32, 32)
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(packed, places), weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="Sparse tensor cores are NVIDIA's; there is no GPU here.")
def test_two_of_four_weights_multiply_on_sparse_tensor_cores():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(256, 128, bias=False)).eval()
    weight = SemiStructuredPruning().compress(layer)[0].weight.detach().half().cuda()
    x = torch.randn(256, 64, dtype=torch.half, device="cuda")
    packed = torch.sparse.to_sparse_semi_structured(weight)
    assert torch.allclose(packed @ x, weight @ x, rtol=1e-2, atol=1e-2)


def test_patterns_of_convolutions_run_along_input_channels(model):
    small = SemiStructuredPruning(pattern="1:4").compress(model)
    groups = small[3].weight.movedim(1, -1).unflatten(-1, (-1, 4))
    assert ((groups != 0).sum(-1) == 1).all()
    assert torch.equal(small[0].weight, model[0].weight)  # one input channel: nothing to choose from


def test_patterns_that_cannot_be_are_refused():
    for pattern in ("5:4", "2-4", 4, None):
        with pytest.raises(ValueError, match=r"pattern is .*; choose one of '3:4'"):
            SemiStructuredPruning(pattern=pattern)


# ---------------------------------------------------------------------- all


@pytest.mark.parametrize("kind", ALL)
def test_nan_and_emptiness_are_refused(kind, model, data):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken[3].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer '3' holds NaN"):
        kind().compress(broken, data)
    with pytest.raises(ValueError, match=f"{kind.__name__} found no .* in Sequential"):
        kind().compress(nn.Sequential(nn.Flatten()), data)


@pytest.mark.parametrize("kind", [WandaPruning, SemiStructuredPruning])
def test_half_precision_models_stay_so(kind, model, data):
    half = copy.deepcopy(model).half()
    small = kind().compress(half, data)
    assert small[7].weight.dtype == torch.float16 and sparsity(small) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("kind", [WandaPruning, SemiStructuredPruning])
def test_pruning_again_narrows_the_mask(kind, model, data):
    once = kind().compress(model, data)
    twice = MagnitudePruning(sparsity=0.7).compress(once)
    thrice = kind().compress(twice, data)
    assert sparsity(thrice) == pytest.approx(sparsity(twice), abs=0.05)
    assert all(len(weight_parametrizations(m)) <= 1 for m in thrice)
    assert all(not w[weights(once)[name] == 0].any() for name, w in weights(thrice).items())


def test_scopes_never_empty_a_layer():
    scores = [torch.rand(4, 4) * 1e-6, torch.rand(50, 50)]
    for scope in ("global", "layer", "erk"):
        for part in (0.0, 0.5, 0.98, 1.0):
            masks = kept(scoped_ranks(scores, scope), part, scope)
            assert all(mask.any() for mask in masks) and (part or all(mask.all() for mask in masks))
