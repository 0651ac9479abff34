"""The distillation loss against torch's own operators, and a training that can be stopped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import toy
from torch import nn

import workbench as wb
from workbench.surgery import clone
from workbench.techniques.distillation.born_again import fresh
from workbench.techniques.distillation.features import hint_loss, regressor
from workbench.techniques.distillation.relational import cosines, relational_loss, relative_distances
from workbench.techniques.distillation.teaching import hint_layer, layers_that_run
from workbench.training import distillation_loss


@pytest.fixture(scope="module")
def data():
    glyphs = wb.load_data("glyphs")
    return replace(glyphs, train=glyphs.train.take(512), val=glyphs.val.take(128))


def test_loss_is_a_blend_of_cross_entropy_and_softened_divergence():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(8, 5, generator=generator), torch.randn(8, 5, generator=generator)
    labels = torch.arange(8) % 5
    p = F.softmax(teacher / 3, 1)
    soft = (p * (p.log() - F.softmax(student / 3, 1).log())).sum(1).mean()
    expected = 0.3 * F.cross_entropy(student, labels) + 0.7 * 9 * soft
    assert torch.allclose(distillation_loss(student, teacher, labels, 3.0, 0.7), expected, atol=1e-5)
    assert torch.allclose(distillation_loss(student, teacher, labels, 3.0, 0.0), F.cross_entropy(student, labels))
    assert distillation_loss(teacher, teacher, labels, 2.0, 1.0).abs() < 1e-6


def test_stop_after_the_first_step_returns_the_student_so_far(data):
    seen = []
    small = wb.Distillation(width=0.125, epochs=40).compress(
        wb.load_model("glyphs-cnn"), data, watch=lambda step: bool(seen.append(step))
    )
    assert len(seen) == 1 and seen[0].steps == 40 * 4
    assert torch.isfinite(small(data.example(2))).all() and not small.training


def test_a_student_of_an_unknown_kind_says_how_to_pass_one(data):
    with pytest.raises(ValueError, match=r"Distillation\(student=…\)"):
        wb.Distillation().compress(nn.Linear(2, 2), data)


def test_recall_finds_only_what_was_made_from_exactly_this_teacher():
    teacher = wb.load_model("glyphs-cnn")
    shipped = wb.Distillation(width=0.5).recall(teacher)
    assert shipped is not None and shipped.architecture["width"] == 0.5
    assert wb.Distillation(width=0.5, temperature=7.5).recall(teacher) is None
    with torch.no_grad():
        teacher.classifier.bias.add_(1)
    assert wb.Distillation(width=0.5).recall(teacher) is None


@pytest.mark.parametrize("width", wb.Distillation.settings()[0].positions())
def test_every_slider_position_has_a_student_ready(width):
    assert wb.Distillation(width=width).recall(wb.load_model("glyphs-cnn")) is not None


# --- any student ----------------------------------------------------------------------------------------------------

KINDS = (wb.Distillation, wb.DistillationFeatures, wb.DistillationRelational)


@pytest.fixture(scope="module")
def squares():
    return toy.data(val=200)


@pytest.fixture(scope="module")
def teacher():
    return toy.model()


def small_net(classes=toy.CLASSES):
    torch.manual_seed(1)
    convolution = nn.Conv2d(1, 6, 3, stride=2)
    return nn.Sequential(convolution, nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(200, classes))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (wb.Distillation, {"epochs": 12}),
        (wb.DistillationFeatures, {"epochs": 12, "depth": 1.0}),
        (wb.DistillationRelational, {"epochs": 6}),
    ],
)
def test_any_student_learns_and_is_left_as_it_was_passed(kind, settings, teacher, squares):
    net = small_net()
    before = [p.clone() for p in net.parameters()]
    student = kind(student=net, **settings).compress(teacher, squares)
    assert type(student) is nn.Sequential and [p.shape for p in student.parameters()] == [p.shape for p in before]
    assert all(torch.equal(old, now) for old, now in zip(before, net.parameters(), strict=True))
    assert wb.evaluate(student, squares.val).value > wb.evaluate(net, squares.val).value + 0.1
    assert not any(layer._forward_pre_hooks for layer in student.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_the_control_is_the_same_student_alone(kind, teacher, squares):
    net = small_net()
    control = kind(student=net, epochs=1, seed=3).control()
    assert control == wb.Distillation(student=net, epochs=1, seed=3, soft_weight=0.0)
    by_hand = small_net()
    for _ in wb.fit(by_hand, squares, epochs=1, learning_rate=4e-3, seed=3, validations=4):
        pass
    images = squares.example(4)
    assert torch.equal(control.compress(teacher, squares)(images), by_hand(images))


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_with_other_classes_or_inputs_is_refused(kind, teacher, squares):
    with pytest.raises(ValueError, match=r"student answers with shape \(2, 3\), the teacher with \(2, 8\)"):
        kind(student=small_net(classes=3)).compress(teacher, squares)
    with pytest.raises(ValueError, match="the student cannot answer images of shape"):
        kind(student=nn.Linear(5, 8)).compress(teacher, squares)
    with pytest.raises(ValueError, match="pass a data set from load_data"):
        kind(student=small_net()).compress(teacher, squares.example(4))


def test_a_teacher_in_half_precision_teaches(squares):
    student = wb.Distillation(student=small_net(), epochs=1).compress(toy.model().half(), squares)
    assert torch.isfinite(student(squares.example(2))).all()
    with pytest.raises(ValueError, match="the student cannot answer"):
        wb.Distillation(student=small_net().half()).compress(toy.model(), squares)


def test_students_of_one_layer_have_no_place_for_a_hint(teacher, squares):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(256, 8))
    with pytest.raises(ValueError, match="no layer to take a hint from in Sequential: it runs 1 weighted layers"):
        wb.DistillationFeatures(student=flat).compress(teacher, squares)


# --- hints ----------------------------------------------------------------------------------------------------------


def test_the_hint_is_what_a_layer_reads_in_the_order_in_which_layers_run(teacher, squares):
    example = squares.example(2)
    assert layers_that_run(teacher, example) == ["0", "3", "7", "9"]
    assert [hint_layer(teacher, example, depth) for depth in (0.25, 0.5, 1.0)] == ["3", "7", "9"]


def test_hint_loss_is_the_error_that_the_mean_leaves_as_one():
    maps = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    assert hint_loss(maps, maps) == 0
    assert hint_loss(maps.mean().expand_as(maps), maps) == pytest.approx(1, abs=1e-2)
    assert torch.allclose(hint_loss(3 * maps + 5, 3 * maps), hint_loss(maps + 5 / 3, maps))
    pooled = F.avg_pool2d(maps, 2)
    assert hint_loss(maps, pooled) < 1e-10 and hint_loss(pooled, maps) < 1e-10


def test_a_regressor_translates_channels_and_refuses_maps_against_vectors():
    maps, vectors = torch.zeros(2, 3, 5, 5), torch.zeros(2, 7)
    assert regressor(maps, torch.zeros(2, 9, 5, 5))(maps).shape == (2, 9, 5, 5)
    assert regressor(vectors, torch.zeros(2, 4))(vectors).shape == (2, 4)
    for other in (vectors, torch.zeros(2, 9, 3), torch.zeros(2, 1, 3)):
        with pytest.raises(ValueError, match="choose another depth"):
            regressor(maps if other is vectors else torch.zeros(2, 5, 7), other)


def test_a_hint_alone_brings_the_students_features_near_the_teachers(teacher, squares):
    """With labels and answers out of the loss's way, a linear map of the student's features finds the teacher's."""
    images = squares.val.batch(slice(0, 200))[0]

    def unexplained(student):
        with torch.no_grad():
            ours, theirs = student[:5](images).flatten(1), teacher[:9](images)
        ours = torch.cat([ours, torch.ones(len(ours), 1)], 1)
        found = torch.linalg.lstsq(ours[:, :40], theirs).solution
        return float((ours[:, :40] @ found - theirs).var() / theirs.var())

    settings = {"student": small_net(), "epochs": 6, "depth": 1.0}
    hinted = wb.DistillationFeatures(**settings, hint_weight=10.0, soft_weight=0.0).compress(teacher, squares)
    assert unexplained(hinted) < unexplained(small_net())


# --- relations, against loops ---------------------------------------------------------------------------------------


def test_distances_and_angles_are_those_of_a_loop():
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    pairs = [(features[i] - features[j]).norm() for i in range(5) for j in range(i + 1, 5)]
    assert torch.allclose(relative_distances(features), torch.stack(pairs) / torch.stack(pairs).mean(), atol=1e-6)
    angles = cosines(features)
    for i, j, k in [(0, 1, 2), (3, 0, 4), (2, 4, 1)]:
        a, b = features[j] - features[i], features[k] - features[i]
        assert angles[i, j, k] == pytest.approx(float(F.cosine_similarity(a, b, dim=0)), abs=1e-5)


def test_relations_do_not_see_turning_scaling_or_moving():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(9, 9, generator=generator))
    moved = 3 * F.pad(features, (0, 5)) @ turn + 2
    assert relational_loss(moved, features, 1.0, 2.0) < 1e-8
    assert relational_loss(torch.randn(6, 9, generator=generator), features, 1.0, 2.0) > 1e-2


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_equal_rows_and_tiny_batches_have_finite_gradients(rows):
    features = torch.zeros(rows, 3, requires_grad=True)
    relational_loss(features, torch.randn(rows, 5), 1.0, 2.0).backward()
    assert torch.isfinite(features.grad).all()


# --- born again -----------------------------------------------------------------------------------------------------


def test_a_twin_has_the_same_shape_fresh_weights_and_nothing_on_them(teacher):
    twin = fresh(wb.MagnitudePruning(sparsity=0.9).compress(teacher), seed=1)
    same = fresh(teacher, seed=1)
    assert all(value.shape == teacher.state_dict()[key].shape for key, value in twin.state_dict().items())
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in twin.state_dict().items())
    assert not torch.equal(twin[0].weight, teacher[0].weight)


def test_a_twin_of_a_frozen_network_can_learn(teacher):
    frozen = clone(teacher).requires_grad_(False)
    assert all(parameter.requires_grad for parameter in fresh(frozen).parameters())


def test_a_layer_that_cannot_begin_anew_is_named():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match=r"cannot start layer '1' \(Own\) anew"):
        fresh(nn.Sequential(nn.Linear(3, 3), Own()))


def test_self_distillation_trains_a_twin_and_its_control_learns_alone(teacher, squares):
    technique = wb.SelfDistillation(epochs=4, seed=5)
    twin = technique.compress(teacher, squares)
    assert wb.evaluate(twin, squares.val).value > 1.5 / toy.CLASSES
    assert technique.control() == wb.SelfDistillation(epochs=4, seed=5, soft_weight=0.0)
    same = wb.SelfDistillation.neutral().compress(teacher)
    images = squares.example(2)
    assert torch.equal(same(images), teacher(images))
