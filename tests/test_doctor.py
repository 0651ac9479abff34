"""The doctor on models that nobody here wrote: it finds what works, and says in words what does not, and where."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

import workbench as wb
from workbench.cli import main
from workbench.doctor import FAILED, NEEDS_DATA, REFUSED, WORKS, doctor
from workbench.runtimes import RuntimeFailed

SHAPES = (wb.LowRank, wb.MagnitudePruning, wb.ChannelPruning, wb.Quantization)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """Two convolutions around a sum, a depthwise one, and a classifier."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x).relu()
        x = (x + self.second(x)).relu()
        return self.head(self.depthwise(x).mean((2, 3)))


class Branching(Residual):
    """Looks at the values of its input."""

    def forward(self, x):
        if x.mean() > 100:
            return self.head(x.mean((2, 3)))
        return super().forward(x)


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.inner, self.back = nn.Linear(12, 12), nn.Linear(12, 12)
        self.back.weight = self.inner.weight
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        return self.head(self.back(self.inner(x).relu()).relu())


class Lambda(nn.Module):
    """A function as a layer, as in many a script."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def found(model, example=X, techniques=SHAPES):
    torch.manual_seed(0)
    diagnosis = doctor(model, example, techniques=techniques)
    json.dumps(diagnosis.to_dict())
    checks = {check.name: check for check in diagnosis.checks}
    return diagnosis, checks, {reach.technique: reach for reach in diagnosis.techniques}


def test_a_healthy_model():
    model = Residual().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    diagnosis, checks, reach = found(model, techniques=(*SHAPES, wb.WeightClustering, wb.LoRA))
    assert all(check.status in (WORKS, "not here") for check in checks.values())
    assert checks["loading"].detail == "with like=Residual(), since the class is your own"
    assert {name: each.status for name, each in reach.items()} == {
        **dict.fromkeys(("LowRank", "MagnitudePruning", "ChannelPruning", "Quantization", "WeightClustering"), WORKS),
        "LoRA": NEEDS_DATA,
    }
    assert diagnosis.coupled == (("first", "second"),) or set(diagnosis.coupled[0]) >= {"first", "second"}
    assert "depthwise" in reach["LowRank"].skipped and "grouped" in reach["LowRank"].skipped["depthwise"]
    assert set(reach["MagnitudePruning"].reached) == set(diagnosis.layers)
    small = wb.Quantization().compress(model, X)
    assert reach["Quantization"].size_bytes == len(wb.encode(small))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    text = str(diagnosis)
    assert "first, second" in text and "needs data: it trains" in text and "export to ONNX" in text


def test_tracing_that_stops_names_the_line_of_the_model():
    _, checks, reach = found(Branching().eval())
    assert checks["tracing"].status == FAILED
    assert "test_doctor.py, line" in checks["tracing"].detail and "if x.mean() > 100:" in checks["tracing"].detail
    assert reach["ChannelPruning"].status == REFUSED and "if x.mean() > 100:" in reach["ChannelPruning"].detail
    assert all(reach[name].status == WORKS for name in ("LowRank", "MagnitudePruning", "Quantization"))


def test_shared_weights():
    _, checks, reach = found(Tied().eval(), torch.randn(2, 12))
    assert checks["saving"].status == checks["loading"].status == WORKS
    assert "shares its weight" in reach["LowRank"].skipped["inner"]
    assert all(each.status in (WORKS, REFUSED) for each in reach.values())


def test_half_precision_is_handled_or_refused_in_words():
    _, checks, reach = found(Residual().eval().half(), X.half())
    assert checks["saving"].status == WORKS
    for each in (*reach.values(), *checks.values()):
        assert each.status in (WORKS, REFUSED, "not here") or each.detail


def test_a_function_as_a_layer():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), Lambda(torch.relu), nn.Conv2d(8, 8, 3), Lambda(lambda x: x.flatten(1)))
    net = nn.Sequential(*net, nn.Linear(128, 4)).eval()
    _, checks, reach = found(net)
    assert checks["tracing"].status == WORKS
    assert all(each.status == WORKS for each in reach.values())


def test_a_model_without_layers_and_one_that_does_not_run():
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        doctor(nn.Sequential(nn.ReLU()), X)
    with pytest.raises(RuntimeFailed, match=r"fails on an input of shape \(2, 12\)"):
        doctor(Residual(), torch.randn(2, 12))


def test_a_layer_that_is_never_called():
    model = Residual().eval()
    model.spare = nn.Linear(8, 8)
    _, _, reach = found(model)
    assert "never called" in reach["ChannelPruning"].skipped["spare"]
    assert all(each.status == WORKS for each in reach.values())


def test_a_technique_that_breaks_is_reported_and_the_rest_goes_on():
    class Broken(wb.Technique):
        def compress(self, model, data=None, watch=None):
            raise IndexError("out of range")

    _, _, reach = found(Residual().eval(), techniques=(Broken, wb.MagnitudePruning))
    assert reach["Broken"].status == FAILED and "IndexError: out of range" in reach["Broken"].detail
    assert reach["MagnitudePruning"].status == WORKS


BUILDER = "import torch\ndef net():\n    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))\n"


def test_the_command_takes_a_function_of_a_module(tmp_path, monkeypatch, capsys):
    (tmp_path / "own_nets.py").write_text(BUILDER)
    monkeypatch.chdir(tmp_path)
    argv = ["doctor", "own_nets:net", "--input", "2,6", "--technique", "low-rank", "--json", "found.json"]
    assert main(argv) == 0
    assert "Sequential: 83 parameters" in capsys.readouterr().out
    kept = json.loads((tmp_path / "found.json").read_text())
    assert kept["techniques"][0]["technique"] == "LowRank" and kept["layers"] == ["0", "1"]


@pytest.mark.parametrize(("to", "file"), [("onnx", "net.onnx"), ("openvino", "net.xml")])
def test_the_command_exports(to, file, tmp_path, monkeypatch, capsys):
    if to == "onnx":
        pytest.importorskip("onnx")
    (tmp_path / "own_nets.py").write_text(BUILDER)
    monkeypatch.chdir(tmp_path)
    assert main(["export", "own_nets:net", "--input", "2x6", "--to", to, "-o", "net"]) == 0
    assert file in capsys.readouterr().out and (tmp_path / file).stat().st_size > 0


def test_techniques_work_on_a_model_of_torchvision(tmp_path):
    """One line of scripts/coverage.py, in the same processes: one compresses, another loads and compares."""
    command = [
        sys.executable,
        "scripts/coverage.py",
        "tiny-vit",
        "--records",
        str(tmp_path / "kept.jsonl"),
    ]
    root = __file__.rsplit("/tests/", 1)[0]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Torch-Pruning succeeds and ChannelPruning does not: none" in done.stdout
    assert "5 of 5 cells green" in done.stdout
