"""LoRA against peft, merged against unmerged, and what is frozen."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import toy
from torch import nn

import workbench as wb
from workbench.surgery import Parallel, clone
from workbench.techniques.low_rank.lora import _Still, adapters, attach, merged, with_adapters


@pytest.fixture(scope="module")
def data():
    return toy.data(val=200, test=100)


@pytest.fixture(scope="module")
def model():
    """The toy network with a norm in it, not trained to the end, so that there is something left to learn."""
    net = toy.model()
    net.insert(1, nn.BatchNorm2d(32))
    return net.eval()


@pytest.fixture(scope="module")
def adapted(model, data):
    return wb.LoRA(rank=4, epochs=2).compress(model, data)


def images(data):
    return next(data.val.batches(16))[0]


def random_terms(model, rank=4):
    """Return a pair (up, down) for each linear and convolution layer, none of them zero."""
    generator = torch.Generator().manual_seed(1)
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    return {
        name: (
            0.1 * torch.randn(len(layer.weight), rank, generator=generator),
            0.1 * torch.randn(rank, layer.weight[0].numel(), generator=generator),
        )
        for name, layer in layers
    }


@pytest.mark.parametrize("form", [merged, with_adapters])
def test_outputs_equal_those_of_peft(form, model, data):
    peft = pytest.importorskip("peft")
    terms, alpha, rank = random_terms(model), 12, 4
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(terms))
    theirs = peft.get_peft_model(clone(model), config).eval()
    for name, (up, down) in terms.items():
        layer = theirs.base_model.model.get_submodule(name)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(down.view_as(layer.lora_A["default"].weight))
            layer.lora_B["default"].weight.copy_(up.view_as(layer.lora_B["default"].weight))
    ours = form(clone(model), {name: (alpha / rank * up, down) for name, (up, down) in terms.items()})
    x = images(data)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours(x), model(x), atol=0.1)


def test_merged_answers_as_unmerged_does_from_the_same_layers_as_before(model, data, adapted):
    together = wb.LoRA(rank=4, epochs=2, merge=True).compress(model, data)
    x = images(data)
    assert torch.allclose(together(x), adapted(x), rtol=1e-4, atol=1e-4)
    assert [type(layer) for layer in together.modules()] == [type(layer) for layer in model.modules()]
    assert len(wb.encode(adapted)) > len(wb.encode(together))


def test_training_learns_and_freezes_everything_but_the_adapters(model, data, adapted):
    assert wb.evaluate(adapted, data.val).value > wb.evaluate(model, data.val).value
    base = {name.replace(".0.", ".") if name.count(".") > 1 else name: p for name, p in adapted.state_dict().items()}
    for name, value in model.state_dict().items():
        assert torch.equal(base[name], value), name
    assert all(p.requires_grad for p in adapted.parameters())  # the next stage may train all of it


def test_norms_keep_their_statistics_while_a_term_learns(model, data):
    learner = _Still(clone(model))
    for _ in wb.fit(learner, replace(data, train=data.train.take(128)), epochs=1):
        assert not learner.model[1].training
    assert torch.equal(learner.model[1].running_mean, model[1].running_mean)


def test_the_adapters_are_a_small_file_that_the_base_takes_up_again(model, data, adapted, tmp_path):
    taken = adapters(adapted)
    assert list(taken) == ["0", "4", "8", "10"]
    assert len(wb.encode(taken)) < 0.2 * len(wb.encode(model))
    wb.save(taken, tmp_path / "adapters.wb")
    again = attach(model, wb.load(tmp_path / "adapters.wb"))
    assert torch.equal(again(images(data)), adapted(images(data)))


def test_an_unmerged_model_loads_in_a_fresh_process(adapted, data, tmp_path):
    x = images(data)
    wb.save(adapted, tmp_path / "adapted.wb")
    torch.save((x, adapted(x).detach()), tmp_path / "asked.pt")
    code = (
        "import sys, torch, workbench as wb\n"
        "x, answers = torch.load(sys.argv[2], weights_only=True)\n"
        "print(torch.equal(wb.load(sys.argv[1])(x), answers))"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "adapted.wb"), str(tmp_path / "asked.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stdout + done.stderr


def test_the_zeros_of_a_pruned_base_stay(model, data):
    pruned = wb.MagnitudePruning(sparsity=0.8).compress(model)
    adapted = wb.LoRA(rank=2, epochs=2).compress(pruned, data)
    assert isinstance(adapted[0], Parallel)
    assert torch.equal(adapted[0][0].weight, pruned[0].weight)
    assert wb.evaluate(adapted, data.val).value >= wb.evaluate(pruned, data.val).value
    decoded = wb.artifact.decode(wb.encode(adapted))
    assert torch.equal(decoded(images(data)), adapted(images(data)))
    with pytest.raises(ValueError, match="mask or codes"):
        wb.LoRA(rank=2, epochs=2, merge=True).compress(pruned, data)


def test_the_watcher_sees_steps_and_stops(model, data):
    seen = []
    wb.LoRA(epochs=5).compress(model, data, lambda step: seen.append(step) or len(seen) < 3)
    assert len(seen) == 3 and seen[0].steps == 5 * 4


def test_another_seed_gives_other_adapters(model, data):
    few = replace(data, train=data.train.take(128))
    x = images(data)
    one, same, other = (wb.LoRA(seed=seed).compress(model, few)(x) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_rank_beyond_the_layer_is_the_layer_s_own(model, data):
    few = replace(data, train=data.train.take(128))
    assert wb.LoRA(rank=64).compress(model, few)[10][1][0].out_features == toy.CLASSES


def test_what_it_needs_is_said(model):
    with pytest.raises(ValueError, match="pass a data set from load_data"):
        wb.LoRA().compress(model, torch.zeros(1, 1, 16, 16))
    with pytest.raises(ValueError, match="no linear or ungrouped convolution layer"):
        wb.LoRA().compress(nn.Sequential(nn.Flatten()), toy.data(8, 8))


def test_no_epochs_change_nothing_and_the_given_model_is_untouched(model, data, adapted):
    x = images(data)
    before = model(x)
    assert torch.equal(wb.LoRA.neutral().compress(model)(x), before)
    wb.LoRA().compress(model, replace(data, train=data.train.take(128)))
    assert torch.equal(model(x), before) and not model.training and not adapted.training
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.BatchNorm2d, *[type(layer) for layer in toy.model()][1:]]
