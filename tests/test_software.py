import json
import shutil
import sys

import pytest
import torch
from test_runtimes import Foreign, images, vgg
from torch import nn

from workbench.profiler import Latency, Ratio, SoftwareRow, best, environment, software_first
from workbench.profiler.environment import allowed_cores
from workbench.runtimes import RuntimeFailed

MODULE = sys.modules["workbench.profiler.software"]


def last(running):
    for rows in running:  # noqa: B007
        pass
    return {row.name: row for row in rows}


@pytest.fixture(scope="module")
def rows():
    model = vgg(16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = last(software_first(model, images(2), calls=12))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return found


def test_every_way_is_in_the_table(rows):
    assert list(rows)[:8] == [
        "eager", "eager channels-last", "eager bf16", "BatchNorm fused", "frozen TorchScript", "openvino",
        "openvino bf16", "onnxruntime",
    ]  # fmt: skip
    assert all(row.ran or row.note for row in rows.values())
    assert (f"eager, {allowed_cores()} threads" in rows) == (allowed_cores() > 1)
    assert "torch.compile" not in rows
    json.dumps([row.to_dict() for row in rows.values()])


def test_each_way_gives_the_outputs_of_eager_in_its_own_precision(rows):
    for name in ("eager channels-last", "BatchNorm fused", "frozen TorchScript", "openvino"):
        assert rows[name].ran and rows[name].difference < 1e-4 and rows[name].latency.precision == "fp32"
    assert rows["eager bf16"].latency.precision == "bf16" and 1e-5 < rows["eager bf16"].difference < 0.1
    if rows["openvino bf16"].ran:
        assert rows["openvino bf16"].latency.precision == "bf16"
    else:
        assert "no instructions for bf16" in rows["openvino bf16"].note


def test_all_are_compared_with_plain_eager(rows):
    assert rows["eager"].ratio is None
    assert all(row.ratio is not None for name, row in rows.items() if row.ran and name != "eager")
    assert len({row.latency.run for row in rows.values() if row.ran}) == 1


def test_batchnorm_is_folded_wherever_it_follows_a_convolution(rows):
    assert rows["BatchNorm fused"].note == "3 of 3 BatchNorm layers folded"
    alone = nn.Sequential(nn.BatchNorm2d(1), nn.ReLU(), *vgg()).eval()
    assert last(software_first(alone, images(), calls=1))["BatchNorm fused"].note == "3 of 4 BatchNorm layers folded"


def test_a_way_that_fails_is_listed_with_its_reason():
    found = last(software_first(Foreign(), images(), calls=6))
    assert not found["openvino"].ran and "cannot run this model" in found["openvino"].note
    assert found["eager"].ran and "did not run here" in str(found["openvino"])
    with pytest.raises(RuntimeFailed, match="fails on an input of shape"):
        last(software_first(nn.Linear(3, 2), images()))


def test_the_table_fills_while_it_is_made():
    running = software_first(vgg(), images(), calls=6)
    seen = [len(next(running)) for _ in range(3)]
    running.close()
    assert seen == [1, 2, 3]


def test_a_missing_compiler_or_instruction_is_the_reason(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "needs a C++ compiler" in MODULE.SLOW_WAY[0].available()[1]
    monkeypatch.setattr(MODULE, "BF16", {"an instruction of the future"})
    assert "no instructions for bf16" in MODULE.OpenVINOBFloat16("x", "bf16").available()[1]
    monkeypatch.setattr(MODULE, "BF16", set(environment().features))
    assert MODULE.OpenVINOBFloat16("x", "bf16").available()[0] or not environment().features


def row(name, median_ms, threads=1):
    return SoftwareRow(name, "", Latency(((median_ms,),), name, "fp32", 1, threads, run=1), Ratio(1.0, (1.0, 1.0)), 0.0)


def test_the_best_is_the_quickest_on_as_many_threads():
    table = [
        row("eager", 3.0),
        row("openvino", 1.0),
        row("onnxruntime", 2.0),
        row("openvino, 8 threads", 0.5, threads=8),
    ]
    assert best([*table, SoftwareRow("absent", "", note="not here")]).name == "openvino"
    with pytest.raises(ValueError, match="run software_first to its end"):
        best([SoftwareRow("absent", "", note="not here")])


def test_rows_read_as_sentences():
    assert str(row("openvino", 1.0)).endswith("not distinguishable from plain eager")
    fast = SoftwareRow("x", "", row("x", 1.0).latency, Ratio(2.0, (1.9, 2.1)), 0.0)
    assert str(fast).endswith("2.0× faster (1.90–2.1) than plain eager")
