"""The shipped headlines: each file loads in a fresh process, meets its aim, and answers as its record says."""

from __future__ import annotations

import subprocess
import sys

import pytest

import workbench as wb
from workbench.paths import shipped

RECORDS = {record.settings["file"]: record for record in wb.read_records("headlines")}
LOAD = """
import sys, torch, workbench as wb
for path in sys.argv[1:]:
    print(*wb.load(path)(torch.zeros(2, 1, 28, 28)).shape)
"""


def path_of(name):
    return shipped("data", "headlines", name)


def test_every_file_has_its_record():
    assert sorted(RECORDS) == sorted(path.name for path in path_of("").glob("lenet-*.wb"))


@pytest.mark.parametrize("name", RECORDS)
def test_a_file_is_as_small_as_its_record_says_and_meets_its_aim(name):
    record, aim = RECORDS[name], RECORDS[name].settings["aim"]
    assert path_of(name).stat().st_size == record.size_bytes
    assert record.fp32_bytes == 4 * sum(p.numel() for p in wb.build(record.model).parameters())
    assert record.compression >= aim["at_least_times"]
    assert record.split == "test" and record.total == 10_000
    assert 100 * (record.total - record.correct) / record.total <= aim["at_most_percent"]


def test_files_load_in_a_fresh_process():
    paths = [str(path_of(name)) for name in RECORDS]
    done = subprocess.run([sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:-1] == ["2 10"] * len(paths), done.stderr


@pytest.mark.parametrize("name", RECORDS)
def test_a_file_answers_as_its_record_says(name):
    try:
        data = wb.load_data("mnist")
    except wb.DataError as error:
        pytest.skip(str(error))
    counted = wb.evaluate(wb.load(path_of(name)), data.test)
    assert (
        abs(counted.correct - RECORDS[name].correct) <= 2
    )  # another processor may round a borderline image differently


def test_the_smallest_glyphs_cnn_is_as_small_and_as_right_as_its_record_says():
    """One file, that of the smallest network of combinations.json whose test images were counted."""
    tested = [record for record in wb.read_records("combinations") if record.split == "test"]
    chosen = min(tested, key=lambda record: record.size_bytes)
    (path,) = path_of("").glob("glyphs-cnn-*.wb")
    assert path.name == f"glyphs-cnn-{int(tested[0].fp32_bytes / chosen.size_bytes)}x.wb"
    assert path.stat().st_size == chosen.size_bytes
    counted = wb.evaluate(wb.load(path), wb.load_data("glyphs").test)
    assert counted.total == chosen.total
    assert abs(counted.correct - chosen.correct) <= 2  # another processor may round a borderline image differently
