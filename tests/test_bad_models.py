"""Models that cannot be profiled are refused with one sentence that says what is wrong, before anything is timed."""

import pytest
import torch
from torch import nn

from workbench.profiler import profile, room
from workbench.runtimes import RuntimeFailed
from workbench.subjects import opened

IMAGES = torch.zeros(1, 3, 8, 8)


class Raises(nn.Module):
    def forward(self, x):
        raise ZeroDivisionError("the third layer divides by zero")


class Shifts(nn.Module):
    """Gives one class more at every call."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return torch.zeros(len(x), self.calls)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Greedy(nn.Module):
    """Takes memory that no machine has."""

    def forward(self, x):
        return torch.zeros(len(x), 1 << 50)


class Fixed(nn.Module):
    """Takes one image at a time."""

    def forward(self, x):
        return x.reshape(1, 192)[:, :5]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Raises(), "fails on an input of shape .*ZeroDivisionError, the third layer divides by zero"),
        (Shifts(), r"outputs of changing shape, \(1, 1\) and \(1, 2\)"),
        (Pair(), "returns a tuple; wrap it"),
        (nn.Module(), 'missing the required "forward"'),
        (Greedy(), "fails on an input of shape"),
        (nn.Linear(7, 2), "fails on an input of shape .*cannot be multiplied"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_model_that_does_not_run_is_refused(model, says):
    with pytest.raises(RuntimeFailed, match=says) as refused:
        profile(model, IMAGES, runtimes=["eager", "openvino"], calls=6)
    assert len(str(refused.value).splitlines()) == 1


def test_a_batch_without_room_is_refused_before_it_is_made():
    with pytest.raises(RuntimeFailed, match=r"A batch of 10,000,000,000 would take about .* take a smaller batch"):
        profile(nn.Flatten(), IMAGES, batch=10_000_000_000, runtimes=["eager"])


def test_the_large_batch_shrinks_to_the_room_there_is(monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda: 20 * IMAGES.nbytes)
    found = profile(nn.Flatten(), IMAGES, runtimes=["eager"], calls=6)
    assert found.runs[0].throughput.batch == 8  # of 64: inputs alone take 16 of the 16 images that have room


def test_a_model_of_one_image_is_measured_one_at_a_time():
    found = profile(Fixed(), IMAGES, runtimes=["eager"], calls=6)
    assert found.runs[0].latency.batch == found.runs[0].throughput.batch == 1


def test_free_memory_is_known_here():
    free = room.free_bytes()
    assert free is None or free > 1 << 20
    assert room.room_for(1, 64) == 64 and room.room_for(1 << 60, 64) == 1


def test_a_refusal_tells_the_share_that_a_batch_may_take(monkeypatch):
    monkeypatch.setattr(room, "free_bytes", lambda: 4500)
    room.require_room(100, 35)
    with pytest.raises(RuntimeFailed, match=r"take about 4\.00 kB, .* may take 80 % of the 4\.50 kB that are free"):
        room.require_room(100, 40)


def test_copies_of_files_that_are_given_back_count_as_free(monkeypatch, tmp_path):
    for name, text in {"max": "1000", "current": "900", "stat": "anon 500\ninactive_file 300\nactive_file 100"}.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    monkeypatch.setattr(room, "GROUP", tmp_path)
    assert room.free_bytes() == 1000 - (900 - 300)
    (tmp_path / "memory.max").write_text("400\n")
    assert room.free_bytes() == 0  # and not less, where the limit was set below what was taken already
    (tmp_path / "memory.max").write_text("max\n")
    assert room.free_bytes() is None or room.free_bytes() > 1000


@pytest.mark.parametrize(
    ("word", "shape", "says"),
    [
        ("bad_models:nothing", (1, 3), "has no 'nothing'"),
        ("bad_models:raises", (1, 3), r"raises\(\) fails: KeyError: 'weights'; it is called without arguments"),
        ("bad_models:number", (1, 3), "gives a int, not a torch.nn.Module"),
        ("bad_models:whole", None, "--input 1,3,224,224"),
        ("broken_module:build", (1, 3), "fails while it is imported: RuntimeError: no licence"),
        ("glyphs-cn", None, "did you mean 'glyphs-cnn'"),
        ("nothing.onnx", None, "no model file"),
        ("nothing.wb", None, "nothing.wb"),
    ],
)
def test_words_that_mean_no_model_are_refused(tmp_path, monkeypatch, word, shape, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad_models.py").write_text(
        "from torch import nn\nnumber = lambda: 3\nwhole = nn.Flatten()\ndef raises(): raise KeyError('weights')\n"
    )
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('no licence')\n")
    with pytest.raises((ValueError, RuntimeFailed, OSError), match=says) as refused:
        opened(word, shape)
    assert len(str(refused.value).splitlines()) == 1


def test_a_model_by_a_word_takes_a_batch_of_its_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_models.py").write_text("from torch import nn\nhalf = lambda: nn.Linear(6, 2).half()\n")
    subject = opened("my_models:half", (4, 6))
    assert subject.name == "half" and subject.example.shape == (4, 6) and subject.example.dtype == torch.float16
    assert subject.images is subject.example and not subject.model.training
