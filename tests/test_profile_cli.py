"""`workbench profile`: any model by a word, figures as text, JSON and a page, and two of them side by side."""

import json

import pytest
from test_cli import refused, stopped

from workbench.cli import main
from workbench.cli.main import parser
from workbench.cli.profiling import SECTIONS as FLAGS
from workbench.cli.progress import Doing
from workbench.export import export_onnx
from workbench.reports import SECTIONS
from workbench.subjects import opened
from workbench.techniques import LowRank

MODULE = """
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
def raises():
    class Raises(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError("no classes")
    return Raises()
"""
QUICK = ("--runtime", "openvino", "--calls", "6")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a module of models, which the command is run in."""
    (tmp_path / "my_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_section_has_its_flag():
    assert tuple(FLAGS) == SECTIONS


def test_anyone_s_model_is_profiled_by_its_function(here, capsys):
    argv = [
        "profile",
        "my_nets:build",
        "--input",
        "2,3,8,8",
        *QUICK,
        "--layers",
        "--json",
        "a.json",
        "--html",
        "a.html",
    ]
    assert main(argv) == 0
    said, found = capsys.readouterr().out, json.loads((here / "a.json").read_text())
    assert "Layers (openvino)" in said and "Conv2d" in said and "outside layers" in said and "Page: a.html" in said
    assert found["name"] == "build" and found["runtimes"][0]["batch"] == 2
    assert found["layers"]["layers"] and not found["scenarios"]  # a section was named, so the page has no other
    page = (here / "a.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "Scenarios" not in page


def test_a_file_of_another_program_is_profiled_against_its_model(here, capsys):
    subject = opened("my_nets:build", (1, 3, 8, 8))
    export_onnx(subject.model, here / "net.onnx", subject.example)
    assert main(["profile", "net.onnx", "--baseline", "my_nets:build", "--input", "1,3,8,8", *QUICK]) == 0
    said = capsys.readouterr().out
    assert "openvino" in said and "the baseline there" in said


@pytest.mark.parametrize("words", [("--technique=low-rank",), ("--technique", "low-rank")])
def test_a_technique_is_named_with_or_without_an_equals_sign(here, words, capsys):
    assert (
        main(["profile", "my_nets:build", "--input", "1,3,8,8", *words, "--rank", "0.25", *QUICK, "--json", "a.json"])
        == 0
    )
    assert json.loads((here / "a.json").read_text())["name"] == "build, low rank (rank 0.25)"


def test_a_profile_says_that_the_training_before_it_was_stopped(here, capsys, monkeypatch):
    monkeypatch.setattr(LowRank, "compress", stopped)
    argv = ["profile", "my_nets:build", "--input", "1,3,8,8", "--technique", "low-rank", *QUICK, "--json", "a.json"]
    assert main(argv) == 0
    assert "Stopped early" in capsys.readouterr().out
    assert json.loads((here / "a.json").read_text())["name"] == "build, low rank, its training stopped early"


def test_a_file_is_written_though_nobody_reads_what_is_printed(here, monkeypatch):
    def gone(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("workbench.reports.collect.Report.__str__", gone)
    argv = ["profile", "my_nets:build", "--input", "1,3,8,8", *QUICK, "--json", "a.json"]
    args = parser(argv).parse_args(argv)
    with pytest.raises(BrokenPipeError):
        args.run(args)
    assert json.loads((here / "a.json").read_text())["name"] == "build"


def test_figures_are_printed_though_they_cannot_be_written(here, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("workbench.profiler.comparison.os.replace", full)
    assert main(["profile", "my_nets:build", "--input", "1,3,8,8", *QUICK, "--json", "a.json"]) == 1
    out, err = capsys.readouterr()
    assert "openvino" in out and "No space left" in err and not list(here.glob("a.json*"))


def test_two_profiles_stand_side_by_side(here, capsys):
    for name in ("a.json", "b.json"):
        assert main(["profile", "my_nets:build", "--input", "1,3,8,8", *QUICK, "--json", name]) == 0
    capsys.readouterr()
    assert main(["profile", "--compare", "a.json", "b.json"]) == 0
    said = capsys.readouterr().out
    assert "a.json" in said and "b.json" in said and "openvino" in said


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["my_nets:build"], "--input 1,3,224,224"),
        (["my_nets:build", "--input", "1,3,9,9"], "fails on an input of shape (1, 3, 9, 9)"),
        (["my_nets:build", "--input", "1,3,8,8", "--batch", "9000000000"], "take a smaller batch"),
        (["my_nets:build", "--input", "1,3,8,8", "--threads", "4000"], "would wait for one another"),
        (
            ["my_nets:build", "--input", "1,3,8,8", "--runtime", "tensorrt"],
            "no runtime 'tensorrt'; choose one of eager",
        ),
        (["my_nets:build", "--input", "1,3,8,8", "--html", "none/a.html"], "There is no folder none"),
        (["my_nets:build", "--input", "1,3,8,8", "--json", "."], ". is a folder; name a file in it"),
        (["my_nets:raises", "--input", "1,3,8,8"], "ZeroDivisionError, no classes"),
        (["missing.onnx"], "no model file missing.onnx"),
        (["missing.onnx", "--data", "glyphs"], "no model file missing.onnx"),
        (["--compare", "a.json", "b.json"], "a.json cannot be read"),
    ],
)
def test_failures_are_one_sentence_and_exit_code_1(here, argv, says, capsys):
    err = refused(capsys, "profile", *argv, code=1)
    assert says in err and len(err.strip().splitlines()) == 1


def test_a_file_that_is_no_profile_is_not_compared(here, capsys):
    (here / "a.json").write_text("{}")
    assert "is not a saved profile" in refused(capsys, "profile", "--compare", "a.json", "a.json", code=1)


@pytest.mark.parametrize("argv", [[], ["my_nets:build", "--calls", "0"], ["--compare", "a.json"]])
def test_wrong_use_is_exit_code_2(here, argv, capsys):
    assert "workbench profile" in refused(capsys, "profile", *argv, code=2)


def test_the_progress_bar_fills_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Doing() as watch:
        watch("timing", 0.0)
        watch("timing", 1.0)
    lines = capsys.readouterr().err.split("\r")
    assert lines[1].count("█") == 0 and lines[2].count("░") == 0 and "100%  timing" in lines[2]
    assert lines[-1] == "\x1b[K"  # and the line goes
