import itertools
import json
import os
import random
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from test_profiler import small_data
from test_runtimes import vgg

from workbench.records import Record, RecordError, find, pareto, read_records, record_names, sweep, write_records
from workbench.surgery import clone, weighted_layers
from workbench.technique import Technique, setting
from workbench.weights import Mask, parametrize_weight


@dataclass(frozen=True)
class Zeroing(Technique):
    """Zero a random part of all weights."""

    family: ClassVar[str] = "test"
    source: ClassVar[str] = "made up"
    sparsity: float = setting(0.5, low=0.0, high=1.0, step=0.25, neutral=0.0)

    def compress(self, model, data=None, watch=None):
        model = clone(model)
        for _, layer in weighted_layers(model):
            parametrize_weight(layer, Mask(torch.rand(layer.weight.shape) >= self.sparsity))
        return model


def record(size=100, correct=90, **changes):
    base = Record("net", "noise", "Zeroing", {"sparsity": 0.5}, "val", correct, 100, size, 400, 100, 1000)
    return replace(base, **changes)


@pytest.fixture(scope="module")
def swept():
    techniques = [Zeroing(sparsity=s) for s in (0.0, 0.5, 1.0)]
    return sweep(techniques, vgg(), small_data(), latency=True)


def test_a_sweep_records_every_technique_in_order(swept):
    assert [one.settings["sparsity"] for one in swept] == [0.0, 0.5, 1.0]
    assert swept[0].size_bytes > swept[1].size_bytes > swept[2].size_bytes
    assert swept[0].total == 60 and swept[0].data == "noise" and swept[0].split == "val"
    assert {"eager", "openvino"} <= set(swept[0].latency)
    assert swept[0].median_ms("openvino") > 0
    assert swept[0].versions["torch"] and swept[0].machine and swept[0].date


def test_the_same_sweep_gives_the_same_and_does_not_touch_the_model():
    model, messages = vgg(), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    watch = lambda message, fraction: messages.append(message)
    first, second = (sweep([Zeroing(sparsity=0.5)], model, small_data(), watch=watch) for _ in range(2))
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert messages[0] == "Zeroing(sparsity=0.5)"
    assert sweep([], model, small_data()) == []


def test_pareto_equals_brute_force():
    rng = random.Random(0)
    for _ in range(100):
        records = [record(rng.randint(1, 12), rng.randint(1, 12)) for _ in range(rng.randint(0, 20))]
        better = lambda a, b: (
            a.size_bytes <= b.size_bytes
            and a.correct >= b.correct
            and (a.size_bytes, a.correct) != (b.size_bytes, b.correct)
        )
        undominated = {(b.size_bytes, b.correct) for b in records if not any(better(a, b) for a in records)}
        front = pareto(records)
        assert [(one.size_bytes, one.correct) for one in front] == sorted(undominated)
        assert all(a.correct < b.correct for a, b in itertools.pairwise(front))


def test_pareto_by_latency_and_by_a_name_that_is_no_figure():
    records = [record(latency={"eager": {"median_ms": ms}}, correct=c) for ms, c in ((2, 90), (1, 80), (3, 85))]
    assert [one.median_ms("eager") for one in pareto(records, x="latency:eager")] == [1, 2]
    with pytest.raises(ValueError, match=r"not a figure.*latency:eager"):
        pareto(records, x="weight")


def test_records_are_read_as_they_were_written(tmp_path, swept):
    path = write_records("zeroing", swept, tmp_path)
    assert read_records("zeroing", tmp_path) == swept
    once = path.read_bytes()
    write_records("zeroing", read_records("zeroing", tmp_path), tmp_path)
    assert path.read_bytes() == once
    assert len(json.loads(once)) == once.count(b"\n") - 2 == 3  # one record a line, so that a change reads as one
    assert record_names(tmp_path) == ["zeroing"] and os.listdir(tmp_path) == ["zeroing.json"]


def test_a_full_disk_leaves_the_old_records(tmp_path, monkeypatch):
    write_records("kept", [record()], tmp_path)

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(RecordError, match="No space left on device"):
        write_records("kept", [], tmp_path)
    monkeypatch.undo()
    assert read_records("kept", tmp_path) == [record()]


def test_missing_and_damaged_records_are_named(tmp_path):
    write_records("there", [], tmp_path)
    with pytest.raises(RecordError, match="no records called 'gone'; there are: there"):
        read_records("gone", tmp_path)
    for text in ("[{", '[{"model": 1}]', '{"a": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(RecordError, match=r"bad.json does not hold records"):
            read_records("bad", tmp_path)
    with pytest.raises(ValueError, match="not a name for records"):
        read_records("../secrets", tmp_path)


def test_a_text_finds_the_one_record_it_quotes(swept):
    assert find(swept, "Zeroing", sparsity=0.5) is swept[1]
    with pytest.raises(KeyError, match="0 records match"):
        find(swept, "Zeroing", sparsity=0.3)
    with pytest.raises(KeyError, match="3 records match"):
        find(swept)
    assert find(swept, sparsity=1.0).compression > 1
    assert find(swept, sparsity=1.0).error == 1 - swept[2].accuracy.value
