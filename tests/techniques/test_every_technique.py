"""What every technique promises: neutral changes nothing, both ends work, the model stays, the file is real."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import workbench as wb
from workbench.surgery import clone
from workbench.technique import always
from workbench.techniques import KEEP_SIZE

CASES = {
    "LowRank": (wb.LowRank, {}, "rank"),
    "LowRank, energy": (wb.LowRank, {"choose": "energy"}, "kept"),
    "LowRank, budget": (wb.LowRank, {"choose": "budget"}, "kept"),
    "Tucker": (wb.Tucker, {}, "rank"),
    "CPDecomposition": (wb.CPDecomposition, {"sweeps": 2}, "rank"),
    "DepthwiseSeparable": (wb.DepthwiseSeparable, {}, "multiplier"),
    "PointwiseConvolution": (wb.PointwiseConvolution, {}, "replaced"),
    "MagnitudePruning": (wb.MagnitudePruning, {}, "sparsity"),
    "GradualPruning": (wb.GradualPruning, {"epochs": 1}, "sparsity"),
    "MovementPruning": (wb.MovementPruning, {"epochs": 1}, "sparsity"),
    "WeightDecayPruning": (wb.WeightDecayPruning, {"epochs": 1, "finetune": 0}, "sparsity"),
    "WandaPruning": (wb.WandaPruning, {}, "sparsity"),
    "SemiStructuredPruning": (wb.SemiStructuredPruning, {}, "pattern"),
    "LayerDropping": (wb.LayerDropping, {}, "sparsity"),
    "ChannelPruning": (wb.ChannelPruning, {}, "sparsity"),
    "Quantization": (wb.Quantization, {}, "weight_bits"),
    "AdaRound": (wb.AdaRound, {"iterations": 50}, "weight_bits"),
    "GPTQ": (wb.GPTQ, {}, "weight_bits"),
    "AWQ": (wb.AWQ, {}, "weight_bits"),
    "QuantizationAwareTraining": (wb.QuantizationAwareTraining, {}, "weight_bits"),
    "MixedPrecision": (wb.MixedPrecision, {}, "average_bits"),
    "Float16": (wb.Float16, {}, "part"),
    "BFloat16": (wb.BFloat16, {}, "part"),
    "Float8": (wb.Float8, {}, "part"),
    "NormalFloat4": (wb.NormalFloat4, {}, "part"),
    "WeightClustering": (wb.WeightClustering, {}, "bits"),
    "EntropyAwareTraining": (wb.EntropyAwareTraining, {"epochs": 4, "learning_rate": 0.1}, "strength"),
    "Distillation": (wb.Distillation, {"epochs": 1}, "width"),
    "DistillationFeatures": (wb.DistillationFeatures, {"epochs": 1}, "width"),
    "DistillationRelational": (wb.DistillationRelational, {"epochs": 1}, "width"),
}
SOMETIMES = [
    (kind, knob.name) for kind in (*wb.TECHNIQUES, *KEEP_SIZE) for knob in kind.settings() if knob.applies is not always
]
QUICK = {"epochs": 1, "iterations": 50}
REMOVES = {"sparsity", "replaced", "pattern", "part", "strength"}  # settings whose high end compresses most


@pytest.fixture(scope="module")
def data():
    """A few hundred glyphs: enough to calibrate, and one epoch of it is two steps."""
    glyphs = wb.load_data("glyphs")
    return replace(glyphs, train=glyphs.train.take(256), val=glyphs.val.take(128), test=glyphs.test.take(128))


@pytest.fixture(scope="module")
def model():
    return wb.load_model("glyphs-cnn")


def ordered(case):
    """Return the technique at the gentle end, in the middle and at the hard end of its main slider."""
    kind, extra, main = CASES[case]
    knob = next(k for k in kind.settings() if k.name == main)
    positions = knob.positions()
    three = [positions[0], positions[len(positions) // 2], positions[-1]]
    return [kind(**extra, **{main: value}) for value in (three if main in REMOVES else reversed(three))]


def test_every_technique_is_tested_here():
    assert {kind for kind, _, _ in CASES.values()} == set(wb.TECHNIQUES)


@pytest.mark.parametrize("case", CASES)
def test_neutral_changes_nothing(case, model, data):
    same = CASES[case][0].neutral().compress(model, data)
    images = data.example(8)
    assert same is not model
    assert torch.equal(same(images), model(images))


@pytest.mark.parametrize("case", CASES)
def test_the_input_model_is_untouched(case, model, data):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    ordered(case)[1].compress(model, data)
    assert [name for name, _ in model.named_modules()] == names
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not model.training


@pytest.mark.parametrize("case", CASES)
def test_both_ends_run_and_the_file_shrinks_along_the_slider(case, model, data):
    gentle, middle, hard = (technique.compress(model, data) for technique in ordered(case))
    for small in (gentle, middle, hard):
        assert torch.isfinite(small(data.example(4))).all()
        assert not small.training
    sizes = [len(wb.encode(m)) for m in (model, gentle, middle, hard)]
    assert sizes[0] >= sizes[1] > sizes[2] > sizes[3]


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_loads_the_file_and_answers_the_same(case, model, data, tmp_path):
    small = ordered(case)[1].compress(model, data)
    images = data.example(16)
    wb.save(small, tmp_path / "small.wb")
    torch.save({"images": images, "answers": small(images)}, tmp_path / "asked.pt")
    code = (
        "import sys, torch, workbench as wb\n"
        "asked = torch.load(sys.argv[2], weights_only=True)\n"
        "answers = wb.load(sys.argv[1])(asked['images'])\n"
        "print(torch.equal(answers, asked['answers']), float((answers - asked['answers']).abs().max()))"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "small.wb"), str(tmp_path / "asked.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("True"), done.stdout + done.stderr


@pytest.mark.parametrize("case", CASES)
def test_the_same_settings_give_the_same_model(case, model, data):
    technique = ordered(case)[1]
    images, twin = data.example(4), clone(model)  # for which nothing is remembered
    assert torch.equal(technique.compress(model, data)(images), technique.compress(twin, data)(images))


def beside(kind, name, applies):
    """Return a technique beside whose other settings the named one has an effect, or has none."""
    knobs = {knob.name: knob for knob in kind.settings()}
    short = {key: value for key, value in QUICK.items() if key in knobs}
    others = [knob for knob in knobs.values() if knob.name not in {name, *short}]
    ends = [{knob.name: value} for knob in others for value in (knob.positions()[0], knob.positions()[-1])]
    every = (kind(**short, **changed) for changed in ({}, *ends))
    return next(one for one in every if knobs[name].applies(one.values()) == applies)


@pytest.mark.parametrize(("kind", "name"), SOMETIMES)
def test_a_setting_is_called_without_effect_only_where_it_has_none(kind, name, model, data):
    positions = next(knob for knob in kind.settings() if knob.name == name).positions()

    def files(applies):
        ends = [replace(beside(kind, name, applies), **{name: value}) for value in (positions[0], positions[-1])]
        return [wb.encode(one.compress(clone(model), data)) for one in ends]

    without, used = files(applies=False), files(applies=True)
    assert without[0] == without[1]
    assert used[0] != used[1]
