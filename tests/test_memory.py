import json
import sys

import pytest
import torch
from test_profiler import Pretended, needs_gpu
from test_runtimes import images, vgg
from torch import nn

from workbench.profiler import Energy, Memory, energy, memory
from workbench.runtimes import Prepared, runtime

MODULE = sys.modules["workbench.profiler.memory"]
MEGABYTE = 1_000_000


class Hungry(Prepared):
    """Holds 80 MB while it runs, and gives them back."""

    def __init__(self):
        super().__init__(runtime("eager"), images(), 1)

    def run(self):
        torch.ones(20 * MEGABYTE)


def test_weights_and_activations_are_counted_in_bytes():
    wide = nn.Sequential(nn.Linear(100, 100_000), nn.Linear(100_000, 10)).eval()
    found = memory(wide, torch.randn(3, 100))
    assert found.weights_bytes == 4 * (100 * 100_000 + 100_000 + 100_000 * 10 + 10)
    assert found.activations_bytes == 3 * (100_000 + 10) * 4
    assert found.batch == 3 and found.cuda_bytes is None
    json.dumps(found.to_dict())


def test_the_process_is_seen_by_stage():
    found = memory(vgg(), images(8), runtime="openvino").resident_bytes
    if not found:
        pytest.skip("this system does not tell the resident size")
    assert list(found)[:2] == ["before", "prepared"]
    assert all(count > 10 * MEGABYTE for count in found.values())
    assert found.get("peak while running", found["prepared"]) > 0.9 * found["prepared"]


def test_the_peak_is_that_of_the_runs_and_not_of_what_was_before():
    if MODULE._resident_peak(Hungry()) is None:
        pytest.skip("this system does not forget the peak so far")
    torch.ones(60 * MEGABYTE)  # 240 MB, given back before the runs
    resident = MODULE._resident("VmRSS")
    grown = MODULE._resident_peak(Hungry()) - resident
    assert 60 * MEGABYTE < grown < 160 * MEGABYTE


def test_without_what_the_system_tells_nothing_is_made_up(monkeypatch, tmp_path):
    monkeypatch.setattr(MODULE, "STATUS", tmp_path / "absent")
    monkeypatch.setattr(MODULE, "CLEAR", tmp_path / "absent" / "absent")
    found = memory(vgg(), images())
    assert found.resident_bytes == {} and "not available on this machine" in str(found)
    told = Memory("cuda", 4, 2_000_000, 3_000_000, {"before": 5_000_000}, 1_500_000)
    assert str(told) == (
        "Weights take 2.00 MB, activations at most 3.00 MB at batch 4. The process: 5.00 MB before; on the GPU 1.50 MB "
        "more during a run."
    )


class Burning(Pretended):
    """Adds two joules to a counter with each run."""

    def __init__(self, counter, wraps_at=10**9):
        super().__init__()
        self.counter, self.runs, self.wraps_at = counter, 0, wraps_at

    def timed(self):
        self.run()
        return 1.0

    def run(self):
        self.runs += 1
        self.counter.write_text(f"{(int(self.counter.read_text()) + 2_000_000) % self.wraps_at}\n")


@pytest.fixture
def package(monkeypatch, tmp_path):
    for domain, title in {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core"}.items():  # the core is a part of it
        (tmp_path / domain).mkdir()
        for name, text in {"name": title, "energy_uj": 5, "max_energy_range_uj": 10**9}.items():
            (tmp_path / domain / name).write_text(f"{text}\n")
    monkeypatch.setattr(MODULE, "POWERCAP", tmp_path)
    return tmp_path / "intel-rapl:0"


def test_energy_is_what_the_counter_says(package):
    found = energy(Burning(package / "energy_uj"), seconds=0.05)
    assert found.source == "RAPL package-0" and found.idle_watts == 0
    assert found.joules == pytest.approx(2.0 * found.images) and found.joules_per_image == pytest.approx(2.0)
    assert found.watts == pytest.approx(found.joules / found.seconds) and "2e+03 mJ an image" in str(found)
    json.dumps(found.to_dict())


def test_a_counter_that_starts_again_is_read_on(package):
    counter = MODULE._rapl()[0]
    (package / "energy_uj").write_text(f"{10**9 - 3_000_000}")
    before = counter.read()
    (package / "energy_uj").write_text("1000000")
    assert counter.used(before) == pytest.approx(4.0)


def test_without_counters_the_words_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(MODULE, "POWERCAP", tmp_path)
    assert energy(Pretended(), seconds=0.01) == "not available on this machine"


def test_a_counter_that_may_not_be_read_is_none(package):
    (package / "energy_uj").unlink()
    assert energy(Pretended(), seconds=0.01) == "not available on this machine"


@needs_gpu
def test_a_gpu_tells_memory_and_energy():
    assert memory(vgg(), images(), runtime="cuda").cuda_bytes > 0
    found = energy(runtime("cuda").prepare(vgg(64), images(64)), seconds=1.0)
    assert isinstance(found, Energy) and found.joules > 0 and found.watts > found.idle_watts > 0
