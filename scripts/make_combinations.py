"""Combine techniques on glyphs-cnn: pruned, clustered and quantization-aware, alone and together; and the smallest
file that stays within a point of the full model.

    python scripts/make_combinations.py             what is missing; every trained stage is kept in runs/combinations
    python scripts/make_combinations.py --again     everything
    python scripts/make_combinations.py --latency   times too, all in turns, on every runtime here

Each row of the table trains as many epochs, after everything has been stacked; `FineTune` on the full model is the
control. Writes data/records/combinations.json and combinations_test.json, and data/headlines/glyphs-cnn-*.wb: the
candidate with the smallest file among those within a point on validation images, looked at once on test images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from tqdm import tqdm

import workbench as wb
from workbench import results
from workbench.records import Record, read_records, record_names, sweep

MODEL, DATA = "glyphs-cnn", "glyphs"
RUNS = Path("runs") / "combinations"
EPOCHS = 3
MOST_LOST = 0.01  # of the images, against the full model

PRUNE = wb.MagnitudePruning(sparsity=0.8)
CLUSTER = wb.WeightClustering(clusters=16)
ROUND = wb.Quantization(weight_bits=8, granularity="tensor")  # one scale a tensor: sixteen values stay sixteen
INT8 = wb.Quantization(weight_bits=8)
TABLE = [[], [PRUNE], [CLUSTER], [ROUND], [PRUNE, CLUSTER], [PRUNE, ROUND], [CLUSTER, ROUND], [PRUNE, CLUSTER, ROUND]]


def taught(epochs: int, learning_rate: float = 1e-3) -> wb.FineTune:
    """Fine-tuning with the full model as teacher."""
    return wb.FineTune(epochs=epochs, learning_rate=learning_rate, soft_weight=0.9)


CANDIDATES = [
    [wb.Distillation(width=width), wb.Quantization(weight_bits=bits), taught(6)]
    for width, bits in ((0.375, 4), (0.375, 3))
]


@dataclass(frozen=True)
class Recalled(wb.Pipeline):
    """A pipeline whose stages are taken from runs/combinations where they have been trained before."""

    def compress(self, model, data=None, watch=None):
        return self.after(len(self.stages), model, data)

    def after(self, count: int, model: nn.Module, data: wb.Data) -> nn.Module:
        """Return the model after the first `count` stages."""
        if count == 0:
            return model
        stage, done = self.stages[count - 1], wb.Pipeline(self.stages[:count])
        if not stage.trains:
            return stage.compress(self.after(count - 1, model, data), data)
        found = results.recall(done, model, RUNS) or (stage.recall(model) if count == 1 else None)
        if found is None:
            before = self.after(count - 1, model, data)
            with tqdm(desc=str(done), unit="step") as bar:
                found = stage.within(model).compress(before, data, lambda step: show(bar, step))
            results.keep(done, model, found, RUNS)
        return found


def show(bar: tqdm, step: wb.Step) -> None:
    bar.total, bar.n = step.steps, step.step
    bar.set_postfix_str(f"loss {step.loss:.3f}" + (f", {step.accuracy.percent:.1f} %" if step.accuracy else ""))
    bar.refresh()


def row(stages: list[wb.Technique]) -> Recalled:
    """Return the table's row of these stages: stacked one after the other, then trained."""
    return Recalled([*stages, wb.FineTune(epochs=EPOCHS)])


def measured(model: nn.Module, data: wb.Data, latency: bool) -> list[Record]:
    """Return the records of the table, of plain int8 and of the candidates, counted on validation images."""
    known = {told(r): r for r in read_records("combinations")} if "combinations" in record_names() else {}
    rows = [*(row(stages) for stages in TABLE), INT8, *(Recalled(stages) for stages in CANDIDATES)]
    found = [
        replace(r, technique="Pipeline" if "stages" in r.settings else r.technique)
        for r in sweep(rows, model, data, latency=latency)
    ]
    return found if latency else [replace(r, latency=known[told(r)].latency) if told(r) in known else r for r in found]


def told(record: Record) -> str:
    return json.dumps([record.technique, record.settings], sort_keys=True)
