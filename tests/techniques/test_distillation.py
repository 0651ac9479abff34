"""The distillation loss against torch's own operators, and a training that can be stopped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import workbench as wb
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


def test_a_student_of_an_unknown_kind_says_how_to_train_it(data):
    with pytest.raises(ValueError, match=r"fit\(student, data"):
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
