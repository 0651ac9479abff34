"""Reports: all that was measured is in the text, in the JSON and on the page, and the page needs nothing else."""

import json
import math
import re
import sys
from dataclasses import replace

import numpy as np
import profiles
import pytest
import torch
from torch import nn

from workbench.profiler import Ratio, SoftwareRow, compare_profiles, load_profile, save_profile
from workbench.reports import SECTIONS, collect, html_page, investigate, words
from workbench.reports.page import POLICY
from workbench.runtimes import RuntimeFailed
from workbench.subjects import Subject


def subject(name="tiny"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    return Subject(name, model, torch.randn(2, 3, 8, 8))


@pytest.fixture(scope="module")
def measured():
    """A real report of a tiny model, each section as short as it can be."""
    asked = ("layers", "memory")
    return investigate(subject(), subject("other"), asked, seconds=0.05, runtimes=["openvino"], calls=10)


def test_a_report_holds_what_was_asked_for(measured):
    assert measured.runtime == "openvino" and measured.missing == {}
    assert {"0", "3"} <= {layer.name for layer in measured.layers.layers} and measured.baseline_layers is not None
    assert set(measured.memory) == {"baseline", "now"}
    assert not measured.scenarios and not measured.software and measured.roofline is None


def test_a_report_is_saved_and_compared_as_a_profile_is(measured, tmp_path):
    path = save_profile(measured, tmp_path / "tiny.json")
    found = load_profile(path)
    assert "0" in [layer["name"] for layer in found["layers"]["layers"]]
    assert found["runtimes"][0]["runtime"] == "openvino"
    compared = compare_profiles(found, found)
    assert compared.rows[0].versus == "not distinguishable" and not compared.differences


def test_progress_only_grows_and_ends():
    seen = []
    investigate(subject(), None, ("layers",), lambda _, part: seen.append(part), runtimes=["eager"], calls=6)
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_what_cannot_be_measured_says_why(monkeypatch):
    def shows_none(model, example, runtime, threads):
        raise RuntimeFailed(f"{runtime} does not show its layers.")

    monkeypatch.setattr(collect, "layer_times", shows_none)
    found = investigate(subject(), None, ("layers",), runtimes=["eager"], calls=6)
    assert found.layers is None and "does not show its layers" in found.missing["layers"]
    assert "not measured: eager does not show its layers" in str(found)
    assert "Not measured: eager" in html_page(found)


def test_a_section_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="no section 'layer'; choose from layers, roofline"):
        investigate(subject(), None, ("layer",))


def test_every_section_has_its_block_its_part_and_its_title():
    from workbench.reports.collect import MEASURE
    from workbench.reports.page import PARTS

    assert set(SECTIONS) == set(MEASURE) == set(PARTS) == set(words.BLOCKS) == set(words.TITLES)


def test_the_text_has_every_section():
    said = str(profiles.report())
    assert all(title in said for title in words.TITLES.values())
    for figure in ("features.conv2.0", "1,100  billion", "launch-bound", "the bound of 4 ms was kept", "★ knee"):
        assert figure in said
    assert "no C++ compiler" in said and "345 MB" in said and max(map(len, said.splitlines())) < 200


def test_a_scenario_on_a_busy_machine_is_called_noisy():
    loud = replace(profiles.scenarios()["server"], service_ms=np.ones(9), busy=0.5)
    report = profiles.report(scenarios={**profiles.scenarios(), "server": loud})
    assert re.search(r"server \(noisy\)  +1", str(report)) and "noisy: the machine was not quiet" in str(report)
    assert "server (noisy)" in html_page(report) and "The machine was not quiet" in html_page(report)
    assert report.to_dict()["scenarios"]["server"]["noisy"] is True
    assert "noisy" not in str(profiles.report())


def test_the_page_loads_nothing():
    page = html_page(profiles.report())
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#)[^"']*["']""", page.replace(plotly_script(), "")) == []
    assert POLICY in page and "default-src 'none'" in POLICY
    assert page.count(plotly_script()) == 1  # plotly.js once, however many figures


def plotly_script():
    from workbench import plots

    return plots.plotly_script()


def test_the_page_carries_its_own_figures():
    report = profiles.report()
    held = re.search(r'<script type="application/json" id="report">(.*?)</script>', html_page(report), re.DOTALL)
    assert json.loads(held.group(1)) == json.loads(json.dumps(report.to_dict()))


def test_names_are_shown_and_never_run():
    page = html_page(profiles.report(name="<script>alert(1)</script>"))
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page


@pytest.mark.parametrize("baseline", [True, False])
def test_a_page_has_only_what_was_measured(baseline):
    bare = dict.fromkeys(("layers", "baseline_layers", "roofline"))
    bare |= {"verdicts": (), "scenarios": {}, "sweep": (), "software": (), "memory": {}, "energy": "", "maps": ()}
    page = html_page(profiles.report(baseline, **bare))
    assert "<h2>Runtimes, on 1 thread</h2>" in page
    assert page.count("<figure ") == 1 and "Scenarios" not in page and "Where this was measured" in page
    assert html_page(profiles.report(baseline)).count("<figure ") == (9 if baseline else 8)


def test_a_report_says_where_a_smaller_file_takes_as_much_memory():
    report = profiles.report()
    alike = replace(report, memory={**report.memory, "now": report.memory["baseline"]})
    assert report.profile.model.size_bytes < report.profile.baseline.size_bytes
    for told in (words.text, html_page):
        assert "the memory did not" not in told(report) and "the memory did not" in told(alike)
    assert not words.memory_words(replace(alike, memory={"now": report.memory["now"]}))


def test_verdicts_are_on_the_layer_times_of_the_report(monkeypatch):
    monkeypatch.setattr(sys.modules["workbench.profiler.verdicts"], "layer_times", None)  # not taken again
    found = investigate(subject(), None, ("layers", "verdicts"), runtimes=["eager"], calls=6)
    assert found.missing == {}
    assert [said.layer for said in found.verdicts] == [None, *(layer.name for layer in found.layers.layers)]


def test_the_runtimes_have_columns_of_a_baseline_only_beside_one(measured):
    heads, rows = words.runtime_table(measured)
    assert {"baseline, ms", "against it"} < set(heads) and {len(row) for row in rows} == {len(heads)}
    heads, rows = words.runtime_table(investigate(subject(), None, (), runtimes=["eager"], calls=6))
    assert not {"baseline, ms", "against it"} & set(heads) and {len(row) for row in rows} == {len(heads)}


def test_figures_that_are_no_numbers_are_none_in_json():
    rows = [SoftwareRow("bf16", "half the bits", profiles.latency(), Ratio(math.nan, (0.0, math.inf)), math.nan)]
    (row,) = json.loads(json.dumps(profiles.report(software=tuple(rows)).to_dict(), allow_nan=False))["software"]
    assert row["difference"] is None and row["ratio"]["interval"] == [0.0, None] and row["latency"]["median_ms"] > 0


def test_a_section_that_breaks_leaves_the_others(monkeypatch):
    def breaks(case, report):
        yield "breaking", {}
        raise KeyError("kernel")

    monkeypatch.setitem(collect.MEASURE, "memory", breaks)
    found = investigate(subject(), None, ("layers", "memory"), runtimes=["eager"], calls=6)
    assert found.layers is not None and found.missing == {"memory": "KeyError, 'kernel'"}


@pytest.mark.parametrize(
    "message, at, calls", [("timing single calls", 10, range(1, 60)), ("timing large batches", 1, [60])]
)
def test_a_stop_while_timing_keeps_the_calls_made_until_then(message, at, calls):
    """As Ctrl-C would: in the middle of the single calls, or before the first of the large batches."""
    seen = []

    def interrupt(doing, fraction):
        seen.append(doing)
        if doing == message and seen.count(message) == at:
            raise KeyboardInterrupt

    found = investigate(subject(), None, ("memory",), interrupt, runtimes=["eager"], calls=60, throughput_batch=2)
    assert found.profile.stopped and found.profile.runs[0].latency.calls in calls
    assert "Stopped early" in str(found) and set(found.missing) == {"memory"} and found.to_dict()["stopped"]


def test_a_stop_before_a_call_was_timed_is_raised():
    def interrupt(message, fraction):
        if message.startswith("preparing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        investigate(subject(), None, (), interrupt, runtimes=["eager"], calls=6)


def test_a_stop_keeps_what_was_measured(monkeypatch):
    def stops(case, report):
        yield "half", {"energy": "half"}
        raise KeyboardInterrupt

    monkeypatch.setitem(collect.MEASURE, "software", stops)
    found = investigate(subject(), None, ("layers", "software", "memory"), runtimes=["eager"], calls=6)
    assert found.layers is not None and found.energy == "half" and not found.memory
    assert set(found.missing) == {"software", "memory"} and "stopped" in str(found)
