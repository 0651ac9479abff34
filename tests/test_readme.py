"""What the README claims: its figures are those of the records, its list of techniques is complete."""

from __future__ import annotations

import re
from pathlib import Path

from test_project import LAYERS

import workbench as wb
from workbench.techniques import KEEP_SIZE, TECHNIQUES

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def between(name):
    """Return the lines of the README between its two marks of this name."""
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, re.DOTALL)[1]


def percent(record):
    return f"{100 * record.error:.2f} %"


def lenets():
    """Return the rows of the LeNets: published ones and ours in the order of how much smaller they are."""
    titles, rows = {"lenet-300-100": "LeNet-300-100, MNIST", "lenet-5": "LeNet-5, MNIST"}, set()
    for record in wb.read_records("headlines"):
        name = titles[record.model]
        made, times = f"**here**, a file of {record.size_bytes:,} bytes", f"**{int(record.compression):,}×**"
        rows.add((name, record.compression, f"| {name} | {made} | {times} | {percent(record)} |"))
        for one in record.settings["published"]:
            error = "–" if one["error_percent"] is None else f"{one['error_percent']:.2f} %"
            rows.add((name, one["times"], f"| {name} | {one['method']} | {one['times']:,}× | {error} |"))
    return [told for _, _, told in sorted(rows)]


def glyphs():
    full, int8, chosen = (record for record in wb.read_records("combinations") if record.split == "test")
    kinds = {"the full model, fp32": full, "plain int8": int8, "**here**": chosen}
    made = lambda name, one: f"{name}, a file of {one.size_bytes:,} bytes"
    times = lambda one: full.fp32_bytes / one.size_bytes
    said = {id(one): f"**{int(times(one))}×**" if one is chosen else f"{times(one):.1f}×" for one in kinds.values()}
    return [f"| glyphs-cnn, Glyphs | {made(n, one)} | {said[id(one)]} | {percent(one)} |" for n, one in kinds.items()]


def hinton():
    """Return the rows of the two layers of 800 units."""
    tested = {record.settings["name"]: record for record in wb.read_records("hinton") if record.split == "test"}
    words = {"alone": "as they are", "alone-moved": "moved"}
    taught = {name: tested[name.replace("alone", "taught")] for name in words}
    return [
        f"| {images} | {tested[name].total - tested[name].correct} | {taught[name].total - taught[name].correct} |"
        for name, images in words.items()
    ]


def test_the_headlines_are_those_of_the_records():
    head = "| network, images | method | smaller than in fp32 | test error |\n| --- | --- | --- | --- |"
    assert between("headlines") == "\n".join([head, *lenets(), *glyphs()])


def test_the_errors_with_and_without_a_teacher_are_those_of_the_records():
    head = "| training images | errors without a teacher | with a teacher |\n| --- | --- | --- |"
    assert between("hinton") == "\n".join([head, *hinton()])


def test_the_layout_lists_every_module_in_the_order_of_imports():
    layout = re.search(r"^    workbench/ .*\n((?:      .*\n)+)", README, re.MULTILINE)[1]
    assert [line.split()[0].rstrip("/") for line in layout.splitlines()] == LAYERS


def test_every_technique_is_in_the_readme():
    named = set(re.findall(r"`([A-Za-z0-9]+)`", README))
    assert {kind.__name__ for kind in (*TECHNIQUES, *KEEP_SIZE)} <= named
