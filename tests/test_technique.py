"""A setting is declared once: its checks, positions and labels follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

import workbench as wb
from workbench.surgery import clone
from workbench.technique import Technique, setting


@dataclass(frozen=True)
class Shrink(Technique):
    family: ClassVar[str] = "test"
    part: float = setting(0.5, low=0.1, high=0.9, step=0.1, unit="of it", neutral=1.0)
    bits: int = setting(8, low=2, high=8, step=2, neutral=32)
    mode: str = setting("plain", choices=("plain", "odd"))

    def compress(self, model, data=None, watch=None):
        small = clone(model)
        with torch.no_grad():
            for parameter in small.parameters():
                parameter.mul_(self.part)
        return small


def test_settings_are_read_from_the_fields_in_order():
    assert [knob.name for knob in Shrink.settings()] == ["part", "bits", "mode"]
    assert Shrink(part=0.2).values() == {"part": 0.2, "bits": 8, "mode": "plain"}
    assert str(Shrink(part=0.2)) == "Shrink(part=0.2, bits=8, mode='plain')"


def test_positions_reach_both_ends_without_rounding_dust():
    part, bits, mode = Shrink.settings()
    assert part.positions() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert bits.positions() == [2, 4, 6, 8] and all(type(b) is int for b in bits.positions())
    assert mode.positions() == ["plain", "odd"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"part": 0.05}, "part is 0.05; it goes from 0.1 to 0.9 (or 1.0, which changes nothing)"),
        ({"part": "half"}, "part is 'half'; it takes a number from 0.1 to 0.9"),
        ({"part": float("nan")}, "part is nan"),
        ({"bits": 2.5}, "bits is 2.5; it takes a whole number from 2 to 8"),
        ({"bits": True}, "bits is True"),
        ({"mode": "even"}, "mode is 'even'; choose one of 'plain', 'odd'"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_one_sentence(wrong, words):
    with pytest.raises(ValueError, match=r"^Shrink: ") as caught:
        Shrink(**wrong)
    assert words in str(caught.value)


def test_values_take_the_settings_own_type():
    assert type(Shrink(bits=4.0).bits) is int
    assert Shrink(bits=32).bits == 32


def test_neutral_puts_every_setting_that_has_one_at_it():
    assert Shrink.neutral().values() == {"part": 1.0, "bits": 32, "mode": "plain"}
    assert Shrink.neutral().is_neutral and not Shrink().is_neutral


def test_title_is_the_class_name_in_words():
    assert wb.LowRank.title() == "Low rank" and wb.MagnitudePruning.title() == "Magnitude pruning"
    assert wb.CPDecomposition.title() == "CP decomposition" and wb.LoRA.title() == "LoRA"


def test_a_pipeline_applies_its_stages_in_order_and_leaves_the_model_alone():
    model = nn.Linear(2, 2, bias=False)
    before = model.weight.clone()
    small = wb.Pipeline([Shrink(part=0.5), Shrink(part=0.2)]).compress(model)
    assert torch.allclose(small.weight, before * 0.1)
    assert torch.equal(model.weight, before)
    assert wb.Pipeline([Shrink.neutral()]).is_neutral and not wb.Pipeline([Shrink()]).is_neutral


def test_a_technique_must_train_if_a_stage_or_a_setting_says_so():
    prune, mended, train = wb.MagnitudePruning(), wb.MagnitudePruning(finetune=1), wb.FineTune()
    assert [one.must_train for one in (prune, mended, train)] == [False, True, True]
    assert wb.Pipeline([prune, mended]).must_train and not wb.Pipeline([prune]).must_train


def test_an_empty_pipeline_returns_an_untouched_copy():
    model = nn.Linear(2, 2)
    copy = wb.Pipeline([]).compress(model)
    assert copy is not model and torch.equal(copy.weight, model.weight)


def test_a_pipeline_of_something_else_says_what_to_pass():
    with pytest.raises(ValueError, match="pass instances such as LowRank"):
        wb.Pipeline([wb.LowRank])
