import copy
import json
import sys

import pytest
from test_runtimes import images, vgg

from workbench.profiler import compare_profiles, environment, load_profile, profile, save_profile
from workbench.runtimes.cuda import FLUSHED

PLACE = sys.modules["workbench.profiler.environment"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    found = profile(vgg(), images(), runtimes=["eager", "cuda"], calls=20, throughput_batch=2)
    return load_profile(save_profile(found, tmp_path_factory.mktemp("profiles") / "a.json", notes=["by hand"]))


def changed(saved, factor=1.0, **place):
    """Return the profile as another machine might have taken it: all times `factor` as long, a steady hand."""
    other = copy.deepcopy(saved)
    other["environment"] |= {"load": 0.5} | place
    for row in other["runtimes"]:
        row |= {"noisy": False, "p25_ms": 0.99 * factor, "median_ms": factor, "p75_ms": 1.01 * factor}
    return other


def test_what_is_saved_comes_back(saved, tmp_path):
    assert saved["format"] == "workbench profile" and saved["notes"] == ["by hand"] and saved["saved"][:2] == "20"
    assert saved["runtimes"][0]["batch"] == 1 and saved["environment"]["processor"]
    assert not list(tmp_path.glob("*.part"))


def test_a_profile_beside_itself_claims_nothing(saved):
    found = compare_profiles(changed(saved), changed(saved), ("a.json", "b.json"))
    assert found.differences == () and found.notes == ()
    assert [row.versus for row in found.rows] == ["not distinguishable"]
    assert "The machines and libraries are alike." in str(found)
    json.dumps(found.to_dict())


def test_a_clear_difference_is_told_from_either_side(saved):
    slow, fast = changed(saved, 3.0), changed(saved, 1.5)
    (row,) = compare_profiles(slow, fast).rows
    assert row.distinguishable and row.versus == "2.0× faster" and row.medians_ms == (3.0, 1.5)
    assert compare_profiles(fast, slow).rows[0].versus == "2.0× slower"


def test_nothing_is_claimed_that_noise_covers(saved):
    near, wide = changed(saved, 1.08), changed(saved, 2.0)
    assert not compare_profiles(changed(saved), near).rows[0].distinguishable  # apart, but by less than a tenth
    wide["runtimes"][0]["p25_ms"] = 1.0
    found = compare_profiles(changed(saved), wide).rows[0]
    assert found.ratio == 0.5 and not found.distinguishable and found.versus == "not distinguishable"


def test_machines_are_compared_by_name(saved):
    other = changed(saved, processor="Another CPU", cores=64, virtual_machine=None, features=[])
    other["environment"]["versions"].pop("openvino")
    found = {what: sides for what, *sides in compare_profiles(changed(saved), other).differences}
    assert found["processor"][1] == "Another CPU" and found["cores of the process"][1] == "64"
    assert found["virtual machine"][1] == "none told" and found["instruction sets"][1] == "none known"
    assert found["openvino"][1] == "not installed" and len(found) <= 5


def test_unrest_and_other_models_are_noted(saved):
    other = changed(saved, load=7.5)
    other["runtimes"][0] |= {"noisy": True, "threads": 2, "batch": 8}
    other["model"]["parameters"] += 1
    other["stopped"] = True
    notes = " ".join(compare_profiles(changed(saved), other, ("a", "b")).notes)
    assert "The profile of b was stopped early" in notes
    assert "not the same model" in notes and "In b the machine was not quiet while it was measured, on eager" in notes
    assert "1 image a call on 1 thread, and 8 images a call on 2 threads" in notes
    assert "In b the machine had other work: 7.5 processes" in notes and "In a" not in notes


def test_a_flushed_cache_is_noted(saved):
    other = changed(saved)
    other["runtimes"][0]["note"] = f"all kernels are replayed as one CUDA graph; {FLUSHED}"
    (note,) = compare_profiles(changed(saved), other).notes
    assert note.endswith(
        "1 image a call on 1 thread, and 1 image a call on 1 thread, a GPU's cache flushed before each."
    )
    assert not compare_profiles(other, other).notes


def test_a_runtime_on_one_side_only_is_shown_with_the_reason(saved):
    other = changed(saved)
    other["runtimes"][0]["runtime"] = "onnxruntime"
    other["failed"] = {"eager": "eager: broken here."}
    rows = {row.runtime: row for row in compare_profiles(changed(saved), other).rows}
    assert rows["eager"].versus == "not in the second: eager: broken here."
    assert rows["onnxruntime"].versus == "not in the first: it was not asked for"
    assert rows["eager"].ratio is None and rows["eager"].medians_ms == (1.0, None)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not a saved profile"),
        ("[1]", "is not a saved profile"),
        ('{"format": "something else"}', "is not a saved profile"),
        ('{"format": "workbench profile", "version": 1, "model": {}}', "has no runtimes, environment and failed"),
        ('{"format": "workbench profile", "version": 1, "model": {}, "runtimes": []}', "it has no runtimes, env"),
        ('{"format": "workbench profile", "version": 99}', "of version 99, this program reads 1"),
    ],
)
def test_files_that_are_no_profiles_are_named(text, message, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_profile(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"absent\.json cannot be read"):
        load_profile(tmp_path / "absent.json")


def test_the_card_tells_governor_load_and_libraries(monkeypatch, tmp_path):
    (tmp_path / "governor").write_text("performance\n")
    for file, told in ((tmp_path / "governor", "performance"), (tmp_path / "absent", "not told by this system")):
        PLACE._machine.cache_clear()
        monkeypatch.setattr(PLACE, "GOVERNOR", file)
        assert environment().card()["frequency governor"] == told
    PLACE._machine.cache_clear()
    card = environment().card()
    assert all(isinstance(words, str) and words for words in card.values())
    assert "torch " in card["libraries"] and "openvino " in card["libraries"]
    monkeypatch.setattr(PLACE.os, "getloadavg", lambda: (3.25, 0, 0))
    assert environment().load == 3.25
