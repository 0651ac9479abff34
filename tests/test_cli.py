"""The command line: quick, complete, and clear when it is used wrongly."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from workbench.cli import main
from workbench.cli.choosing import command_name, value_of
from workbench.cli.progress import Progress
from workbench.cli.serving import writable_copy
from workbench.dashboard.server import environment, free_port
from workbench.surgery import clone
from workbench.technique import setting
from workbench.techniques import TECHNIQUES, LowRank, Quantization
from workbench.training import Accuracy, Step

COMMANDS = ["dashboard", "lab", "train", "compress", "profile", "sweep", "doctor", "export"]


def run(*argv, **kwargs):
    return subprocess.run([sys.executable, "-m", "workbench", *argv], capture_output=True, text=True, **kwargs)


def refused(capsys, *argv, code):
    """Run the command here; return the sentence that it refuses with."""
    try:
        returned = main(list(argv))
    except SystemExit as leaving:
        returned = leaving.code
    out, err = capsys.readouterr()
    assert returned == code and "Traceback" not in err and out == ""
    return err


def test_help_names_every_command_without_importing_torch():
    code = "import sys; from workbench.cli.main import parser; parser([]).format_help(); print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
    done = run("--help")
    assert done.returncode == 0
    assert all(re.search(rf"^ +{command} ", done.stdout, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("cls", TECHNIQUES, ids=command_name)
def test_every_setting_is_a_flag(cls, capsys):
    with pytest.raises(SystemExit):
        main(["compress", "glyphs-cnn", command_name(cls), "--help"])
    shown = capsys.readouterr().out
    for knob in cls.settings():
        assert f"--{knob.name.replace('_', '-')} " in shown and str(knob.default) in shown


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "COMMAND"),
        (["shrink"], "invalid choice: 'shrink'"),
        (["compress", "glyphs-cnn", "low-rang", "-o", "x.wb"], "did you mean 'low-rank'?"),
        (["compress", "glyphs-cnn", "low-rank"], "-o/--output"),
        (["compress", "glyphs-cnn", "low-rank", "--rank", "7", "-o", "x.wb"], "it goes from 0.05 to 1.0"),
        (["compress", "glyphs-cnn", "low-rank", "--rank", "much", "-o", "x.wb"], "it takes a number"),
        (["compress", "glyphs-cnn", "quantization", "--weight-bits", "2.5", "-o", "x.wb"], "a whole number"),
        (["compress", "glyphs-cnn", "quantization", "--scheme", "odd", "-o", "x.wb"], "choose one of 'symmetric'"),
        (["compress", "glyphs-cnn", "low-rank", "--weight-bits", "8", "-o", "x.wb"], "--weight-bits"),
        (["profile", "glyphs-cnn", "--batch", "0"], "at least 1"),
        (["doctor", "glyphs-cnn", "--input", "wide"], "is not a shape"),
        (["export", "glyphs-cnn", "--to", "tflite", "-o", "x"], "invalid choice: 'tflite'"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(argv, says, capsys):
    assert says in refused(capsys, *argv, code=2)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["profile", "glyphs-cn"], "did you mean 'glyphs-cnn'?"),
        (["profile", "missing.wb"], "missing.wb"),
        (["train", "glyphs"], "no model called 'glyphs'"),
        (["sweep", "glyphs-cnn", "low-rank", "--values", "rang=1"], "--values takes SETTING=A,B,…"),
        (["sweep", "glyphs-cnn", "low-rank", "--values", "rank=0.1,9"], "it goes from 0.05 to 1.0"),
        (["doctor", "nowhere:build"], "cannot be imported"),
        (["doctor", "torch:nothing_of_this_name"], "has no 'nothing_of_this_name'"),
        (["doctor", "torch.nn:Identity"], "--input 1,3,224,224"),
        (["dashboard", "--notebooks", "nowhere"], "There is no folder of notebooks at"),
    ],
)
def test_failures_are_one_sentence_and_exit_code_1(argv, says, capsys):
    err = refused(capsys, *argv, code=1)
    assert says in err and len(err.strip().splitlines()) == 1


def test_a_damaged_file_is_refused(tmp_path, capsys):
    path = tmp_path / "broken.wb"
    path.write_bytes(b"not a model" * 20)
    assert "broken.wb" in refused(capsys, "profile", str(path), code=1)


def test_words_become_values_of_the_settings_own_type():
    knobs = {knob.name: knob for knob in Quantization.settings()}
    assert value_of(knobs["weight_bits"], "4") == 4 and isinstance(value_of(knobs["weight_bits"], "4"), int)
    assert value_of(knobs["weight_bits"], "32") == 32  # outside the slider, and changes nothing
    assert value_of(knobs["activation_bits"], "8") == 8
    truth = setting(True, choices=(True, False)).metadata["setting"]
    assert value_of(truth, "false") is False and value_of(truth, "True") is True


def test_compress_then_profile_the_file(tmp_path, capsys):
    """The whole path: a file is written, smaller, and its profile compares it with the model it was made from."""
    small = tmp_path / "small.wb"
    assert main(["compress", "glyphs-cnn", "quantization", "-o", str(small)]) == 0
    said = capsys.readouterr().out
    before, after = (int(number.replace(",", "")) for number in re.search(r"([\d,]+) → ([\d,]+) bytes", said).groups())
    assert small.stat().st_size == after < before / 3
    figures = tmp_path / "profile.json"
    assert main(["profile", str(small), "--runtime", "eager", "--json", str(figures)]) == 0
    said = capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert found["model"]["size_bytes"] == after and found["baseline"] is not None
    assert "eager" in said and "smaller" in said


def test_sweep_prints_one_line_a_value_and_keeps_records(tmp_path, capsys):
    path = tmp_path / "ranks.json"
    argv = ["sweep", "glyphs-cnn", "low-rank", "--values", "rank=0.1,0.5", "--records", str(path)]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:3]] == ["0.1", "0.5"]
    records = json.loads(path.read_text())
    assert [record["settings"]["rank"] for record in records] == [0.1, 0.5]
    assert records[0]["size_bytes"] < records[1]["size_bytes"]


def test_an_interrupted_training_keeps_its_best_and_goes_on(tmp_path):
    """Ctrl-C after the first epoch: the best weights are kept, and the command says where and how to go on."""
    folder = tmp_path / "images"
    write_images(folder)
    command = ["train", "lenet-300-100", "--data", f"folder:{folder}", "--epochs", "200"]
    started = subprocess.Popen(
        [sys.executable, "-m", "workbench", *command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoint = tmp_path / "runs" / "lenet-300-100.checkpoint.safetensors"
    while not checkpoint.exists() and started.poll() is None:
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=120)
    assert started.returncode == 0, err
    assert "--resume" in out and (tmp_path / "runs" / "lenet-300-100.safetensors").is_file() and checkpoint.is_file()


def write_images(folder, count=12, classes=10):
    """Write a folder of tiny grey images, one shade for each class."""
    from PIL import Image

    for split in ("train", "test"):
        for label in range(classes):
            place = folder / split / f"class-{label}"
            place.mkdir(parents=True)
            for i in range(count):
                Image.new("L", (28, 28), 20 * label + i).save(place / f"{i}.png")


STEP = Step(1, 2, 0, 0.5, Accuracy(9, 10), 0.1)


def test_progress_stops_at_the_first_interrupt_and_leaves_the_handler_as_it_was(capfd):
    before = signal.getsignal(signal.SIGINT)
    with Progress("test") as watch:
        interrupt = signal.getsignal(signal.SIGINT)  # called, not raised: a real Ctrl-C is sent to a process above
        with pytest.raises(KeyboardInterrupt):
            interrupt(signal.SIGINT, None)  # before the first step nothing was learned that could be kept
        assert watch(STEP) is True
        interrupt(signal.SIGINT, None)
        assert "Stopping after this step" in capfd.readouterr().err and not watch.ended
        assert watch(STEP) is False and watch.ended
        with pytest.raises(KeyboardInterrupt):
            interrupt(signal.SIGINT, None)
    assert signal.getsignal(signal.SIGINT) is before


def stopped(self, model, data=None, watch=None):
    """Compress as a technique does whose training Ctrl-C ends after the first step."""
    assert watch(STEP) is True
    signal.getsignal(signal.SIGINT)(signal.SIGINT, None)  # called, as above
    assert watch(STEP) is False
    return clone(model)


def test_a_file_whose_training_was_stopped_is_said_to_be_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Quantization, "compress", stopped)
    assert main(["compress", "glyphs-cnn", "quantization", "-o", str(tmp_path / "a.wb")]) == 0
    assert "Stopped early" in capsys.readouterr().out


def test_a_stopped_sweep_keeps_its_records(tmp_path, capsys, monkeypatch):
    def compress(self, model, data=None, watch=None):
        if self.rank == 0.5:
            raise KeyboardInterrupt
        return clone(model)

    monkeypatch.setattr(LowRank, "compress", compress)
    path = tmp_path / "ranks.json"
    argv = ["sweep", "glyphs-cnn", "low-rank", "--records", str(path), "--values"]
    assert main([*argv, "rank=0.1,0.5,1.0"]) == 0
    assert "Stopped early, with 1 of 3 values" in capsys.readouterr().out
    assert [record["settings"]["rank"] for record in json.loads(path.read_text())] == [0.1]
    assert main([*argv, "rank=0.5,1.0"]) == 130


def test_lab_works_on_a_copy_that_keeps_the_learners_changes(tmp_path):
    source, target = tmp_path / "shipped", tmp_path / "mine"
    (source / "images").mkdir(parents=True)
    (source / "00.ipynb").write_text("shipped")
    (source / "images" / "a.svg").write_text("<svg/>")
    writable_copy(source, target)
    (target / "00.ipynb").write_text("changed")
    (source / "01.ipynb").write_text("new")
    writable_copy(source, target)
    assert (target / "00.ipynb").read_text() == "changed"
    assert (target / "01.ipynb").is_file() and (target / "images" / "a.svg").is_file()


def test_a_taken_port_is_passed_over_or_refused(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert free_port("127.0.0.1", port) > port
        assert f"Port {port}" in refused(capsys, "dashboard", "--no-browser", "--port", str(port), code=1)


def test_voila_is_told_where_the_pages_are():
    found = environment()
    assert os.path.isfile(os.path.join(found["JUPYTER_CONFIG_PATH"], "voila.py"))
    template = os.path.join(found["JUPYTER_PATH"].split(os.pathsep)[0], "voila", "templates", "workbench")
    assert os.path.isfile(os.path.join(template, "index.html.j2"))
