"""Figures: what is drawn is what was given, every figure has its sentence, and nothing needs a screen."""

from types import SimpleNamespace

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from workbench import plots
from workbench.training import Accuracy, Step


def record(technique, size_bytes, correct):
    return SimpleNamespace(
        technique=technique, settings={"rank": 0.5}, size_bytes=size_bytes, accuracy=Accuracy(correct, 100)
    )


RECORDS = [record("LowRank", 400_000, 90), record("LowRank", 100_000, 60), record("Quantization", 300_000, 91)]
STEPS = [Step(i, 4, 0, 1 / i, Accuracy(20 * i, 100) if i % 2 == 0 else None, 0.1) for i in range(1, 5)]
FIGURES = {
    "tradeoff": lambda: plots.tradeoff(RECORDS, yours=RECORDS[:1], front=RECORDS[1:]),
    "layer_bars": lambda: plots.layer_bars({"conv1": (1000, 500), "fc": (4000, 100)}),
    "latency_distribution": lambda: plots.latency_distribution({"fp32": [1.0, 1.2, 1.1], "int8": [0.4, 0.5, 0.4]}),
    "latency_vs_batch": lambda: plots.latency_vs_batch({"eager": {1: 1.0, 8: 4.0}, "openvino": {1: 0.5, 8: 3.0}}),
    "learning_curve": lambda: plots.learning_curve(STEPS),
    "matrix": lambda: plots.matrix({"before": np.eye(3), "after": torch.eye(3) / 2}),
    "singular_values": lambda: plots.singular_values(
        {"fc": torch.randn(8, 5), "conv": torch.randn(4, 2, 3, 3)}, kept=0.5
    ),
    "weight_histogram": lambda: plots.weight_histogram(torch.randn(500), torch.randn(500).round(), levels=[-1, 0, 1]),
    "mask_picture": lambda: plots.mask_picture(torch.rand(6, 2, 3, 3) > 0.5),
    "sparsity_by_layer": lambda: plots.sparsity_by_layer({"conv1": 0.1, "fc": 0.95}),
    "soft_targets": lambda: plots.soft_targets(torch.randn(5), "ABCDE", (1, 4)),
    "panel_figure": lambda: plots.panel_figure(["conv1", "fc"], RECORDS[:2], trains=True),
}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_whole_and_has_its_sentence(name):
    figure = FIGURES[name]()
    assert isinstance(figure, go.Figure) and len(figure.data) > 0
    assert plots.summary(figure).endswith(".")
    assert figure.to_json()


def test_tradeoff_draws_the_records():
    figure = plots.tradeoff(RECORDS)
    low_rank = next(trace for trace in figure.data if trace.name == "LowRank")
    assert list(low_rank.x) == [100_000, 400_000] and list(low_rank.y) == [60, 90]


def test_techniques_differ_by_symbol_as_well_as_by_color():
    figure = plots.tradeoff(RECORDS)
    assert len({trace.marker.symbol for trace in figure.data}) == len(figure.data)


def test_roles_of_the_panel_have_symbols_of_their_own():
    assert len({role["symbol"] for role in plots.ROLE.values()}) == len(plots.ROLE)


def test_soft_targets_are_probabilities():
    figure = plots.soft_targets([2.0, 1.0, 0.0], "ABC", (1, 4))
    assert all(sum(bars.y) == pytest.approx(100) for bars in figure.data)
    assert figure.data[1].y[0] < figure.data[0].y[0]  # a higher temperature flattens


def test_singular_values_start_at_one_and_fall():
    line = plots.singular_values({"w": torch.randn(6, 9)}).data[0]
    assert line.y[0] == pytest.approx(1) and all(a >= b for a, b in zip(line.y, line.y[1:], strict=False))


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 B"), (1234, "1.23 kB"), (412_345, "412 kB"), (2_140_000, "2.14 MB")]
)
def test_sizes_read_well(size, text):
    assert plots.size_text(size) == text


def test_accuracy_range_holds_every_value():
    assert plots.accuracy_range([]) == [79.5, 100.5]
    assert plots.accuracy_range([43.0])[0] < 43
    assert plots.accuracy_range([0.0])[0] == -0.5
