"""Figures of the profiler: what is drawn is what was measured, with words and symbols as well as colors."""

import math
from dataclasses import replace

import numpy as np
import plotly.graph_objects as go
import profiles
import pytest

from workbench import plots

FIGURES = {
    "layer_treemap": lambda: plots.layer_treemap(profiles.layer_times()),
    "layer_waterfall": lambda: plots.layer_waterfall(profiles.layer_times(), profiles.layer_times(0.6, split=True)),
    "roofline_plot": lambda: plots.roofline_plot(profiles.roofline(), profiles.roofline_points()),
    "roofline not measured": lambda: plots.roofline_plot(None),
    "win_lose_plot": lambda: plots.win_lose_plot(profiles.win_lose_map()),
    "scenario_latencies": lambda: plots.scenario_latencies(profiles.scenarios()),
    "no scenario": lambda: plots.scenario_latencies({}),
    "batch_sweep": lambda: plots.batch_sweep(profiles.sweep_points(), profiles.sweep_points()[3]),
    "no sweep": lambda: plots.batch_sweep([]),
    "software_bars": lambda: plots.software_bars(profiles.software()),
    "nothing ran": lambda: plots.software_bars(profiles.software()[3:4]),
    "memory_bars": lambda: plots.memory_bars(profiles.memories()),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_whole_and_has_its_sentence(name):
    figure = FIGURES[name]()
    assert isinstance(figure, go.Figure) and (len(figure.data) > 0 or name == "no sweep")
    assert plots.summary(figure).endswith(".") and "nan" not in plots.summary(figure)
    assert figure.to_json()


@pytest.mark.parametrize("by", ["ms", "macs", "weight_bytes", "activation_bytes"])
def test_tiles_of_a_module_add_up_to_it(by):
    tiles = plots.layer_treemap(profiles.layer_times(), by).data[0]
    value = dict(zip(tiles.ids, tiles.values, strict=True))
    inside = [one for one, parent in zip(tiles.ids, tiles.parents, strict=True) if parent == "features"]
    assert sorted(inside) == ["features › bn", "features › conv1", "features › conv2"]
    assert value["features"] == pytest.approx(sum(value[one] for one in inside))


def test_layers_of_an_onnx_file_lie_in_their_modules():
    layer = replace(profiles.layer_times().layers[0], name="/features/features.0/Conv")
    tiles = plots.layer_treemap(replace(profiles.layer_times(), layers=(layer,), outside_ms=0.0)).data[0]
    assert list(tiles.labels) == ["features", "features.0", "Conv"] and tiles.parents[0] == ""


def test_tiles_of_time_add_up_to_the_whole():
    times = profiles.layer_times()
    tiles = plots.layer_treemap(times).data[0]
    whole = sum(value for value, parent in zip(tiles.values, tiles.parents, strict=True) if parent == "")
    assert whole == pytest.approx(times.total_ms)


def test_a_layer_inside_a_layer_keeps_its_own_time():
    times = profiles.layer_times()
    inner = replace(times.layers[0], name="fc.input_quantizer", ms=0.07)
    tiles = plots.layer_treemap(replace(times, layers=(*times.layers, inner))).data[0]
    value = dict(zip(tiles.ids, tiles.values, strict=True))
    assert value["fc"] == pytest.approx(0.3 + 0.07) and len(tiles.ids) == len(set(tiles.ids))


@pytest.mark.parametrize("split", [False, True])
def test_steps_of_the_waterfall_lead_from_baseline_to_compressed(split):
    before, after = profiles.layer_times(), profiles.layer_times(0.6, split=split)
    bars = plots.layer_waterfall(before, after).data[0]
    assert sum(bars.x[:-1]) == pytest.approx(after.total_ms) and bars.x[-1] == after.total_ms
    assert "features.conv2" in bars.y and "features.conv2.0" not in bars.y  # a split layer is compared as a whole


def test_many_small_steps_are_summed():
    layers = tuple(replace(profiles.layer_times().layers[0], name=f"layer{i}", ms=0.01 * i) for i in range(40))
    before = replace(profiles.layer_times(), layers=layers, total_ms=sum(one.ms for one in layers), outside_ms=0.0)
    after = replace(before, layers=layers[:1], total_ms=layers[0].ms)
    bars = plots.layer_waterfall(before, after).data[0]
    assert len(bars.y) < 20 and "26 other layers" in bars.y
    assert sum(bars.x[:-1]) == pytest.approx(after.total_ms)


def test_layers_lie_where_they_were_measured_and_arrows_join_before_and_after():
    before, after = profiles.roofline_points(), profiles.roofline_points(2, split=True)
    figure = plots.roofline_plot(profiles.roofline(), after, before)
    trace = {one.uid: one for one in figure.data}
    assert list(trace["roofline-now"].x) == [point.intensity for point in after]
    arrows = list(zip(trace["roofline-arrows"].x, trace["roofline-arrows"].y, strict=True))
    assert len(arrows) == 3 * len(after)  # from, to, and a gap; both halves of the split layer start at the whole
    assert arrows[3] == arrows[6] == (35.0, 90.0)
    assert plots.roofline_arrows(before, before) == {"x": [], "y": []}  # nothing moved


def test_no_roof_is_drawn_above_what_was_measured():
    roof = profiles.roofline()
    lines = [one for one in plots.roofline_plot(roof).data if one.mode == "lines"]
    assert len(lines) == len(roof.peaks) + len(roof.bandwidths)
    assert max(max(one.y) for one in lines) == pytest.approx(max(roof.peaks.values()))
    slow = next(one for one in lines if one.name.startswith("memory"))
    assert np.allclose(np.divide(slow.y, slow.x), roof.bandwidths["memory"])


def test_axes_of_the_roofline_hold_every_point():
    far = replace(profiles.roofline_points()[0], intensity=3e4, gflops=0.02)
    figure = plots.roofline_plot(profiles.roofline(), [far])
    (low, high), (bottom, top) = figure.layout.xaxis.range, figure.layout.yaxis.range
    assert low < math.log10(far.intensity) < high and bottom < math.log10(far.gflops) < top


def test_a_map_claims_only_what_is_outside_the_noise():
    found = profiles.win_lose_map()
    signs = plots.win_lose_signs(found.ratio, found.low, found.high)
    assert signs[0, 0] == "▼" and signs[0, 2] == "≈" and signs[0, 3] == "·" and signs[1, 2] == "▲"
    wide = plots.win_lose_signs(found.ratio, 0.1 * found.ratio, 10 * found.ratio)
    assert "▲" not in wide[:2] and "▼" not in wide[:2]


def test_a_cell_inside_the_noise_has_no_color():
    found = profiles.win_lose_map()
    heat = plots.win_lose_plot(found).data[0]
    shade, signs = np.array(heat.z), plots.win_lose_signs(found.ratio, found.low, found.high)
    assert (shade[(signs == "≈") | (signs == "·")] == 0).all()
    assert (shade[signs == "▲"] > 0).all() and (shade[signs == "▼"] < 0).all()
    assert heat.text[1][2] == "▲ 3.2×" and heat.customdata[0][2] == "not distinguishable"


def test_percentiles_too_few_to_know_are_not_drawn():
    figure = plots.scenario_latencies(profiles.scenarios())
    drawn = {one.name: list(one.y) for one in figure.data if one.name}
    assert "offline" in drawn["median"] and "offline" not in drawn["p90"]
    assert drawn["p99"] == ["single stream", "server"] and drawn["bound"] == ["server"]
    assert "bound of 4 ms kept" in plots.summary(figure)
    slow = replace(profiles.scenarios()["server"], bound_ms=0.5)
    assert "bound of 0.5 ms broken" in plots.summary(plots.scenario_latencies({"server": slow}))


def test_the_knee_is_marked_on_both_sides():
    points = profiles.sweep_points()
    stars = [one for one in plots.batch_sweep(points, points[3]).data if one.name and one.name.startswith("knee")]
    assert [one.x[0] for one in stars] == [points[3].batch] * 2
    assert stars[1].y[0] == pytest.approx(points[3].images_per_second)


def test_what_could_not_run_has_its_reason_and_no_bar():
    figure = plots.software_bars(profiles.software())
    bars, said = figure.data[0], {note.y: note.text for note in figure.layout.annotations}
    assert bars.x[list(bars.y).index("torch.compile")] == 0
    assert "no C++ compiler" in said["torch.compile"] and said["bf16"].endswith("★ best")
    assert "not distinguishable" in said["2 threads"]


def test_memory_is_drawn_in_bytes():
    weights, activations = plots.memory_bars(profiles.memories()).data
    assert list(weights.x) == [2_180_000, 410_000] and list(activations.x) == [1_200_000, 800_000]
    assert weights.marker.pattern.shape != activations.marker.pattern.shape
