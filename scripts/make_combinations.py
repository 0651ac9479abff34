"""Combine techniques on glyphs-cnn: pruned, clustered and quantization-aware, alone, in pairs and all three; and one
pipeline whose file is at least fifty times smaller.

    python scripts/make_combinations.py             what is missing; every trained stage is kept in runs/combinations
    python scripts/make_combinations.py --headline  without the table
    python scripts/make_combinations.py --again     everything anew
    python scripts/make_combinations.py --latency   times too, all in turns, on every runtime here

Each row of the table is trained as long, after everything has been stacked; fine-tuning of the full model is the
control. Of the headline's candidates whose files are small enough, the one that is right most often on validation
images is chosen; the test images are counted for that one, the full model and plain int8 alone. Writes
data/records/combinations.json and data/headlines/glyphs-cnn-*.wb.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn
from tqdm import tqdm

import workbench as wb
from workbench import results
from workbench.models import fingerprint
from workbench.paths import shipped
from workbench.records import Record, read_records, record_names, sweep, write_records

MODEL, DATA = "glyphs-cnn", "glyphs"
RUNS = Path("runs") / "combinations"
EPOCHS = 1
TIMES_SMALLER = 50  # a headline's file than the full model's numbers in fp32

PRUNE = wb.MagnitudePruning(sparsity=0.8)
CLUSTER = wb.WeightClustering(bits=4)
INT8 = wb.Quantization(weight_bits=8)
FULL = wb.Quantization.neutral()
TABLE = (
    (),
    (PRUNE,),
    (CLUSTER,),
    (INT8,),
    (PRUNE, CLUSTER),
    (PRUNE, INT8),
    (CLUSTER, INT8),
    (PRUNE, CLUSTER, INT8),
)


LONGER = wb.FineTune(epochs=10, learning_rate=3e-3, soft_weight=0.9)  # the full model is the teacher


def student(width: float, bits: int, *first: wb.Technique) -> list[wb.Technique]:
    """Return the stages of a headline: a student, its weights rounded with care, its inputs in 8 bits."""
    return [wb.Distillation(width=width), *first, wb.GPTQ(weight_bits=bits), wb.Quantization(weight_bits=32)]


CANDIDATES = (student(0.25, 4), student(0.375, 3), student(0.375, 4), student(0.375, 4, LONGER), student(0.4375, 3))


@dataclass(frozen=True)
class Recalled(wb.Pipeline):
    """A pipeline whose stages are taken from runs/combinations where they have been trained before."""

    def compress(self, model, data=None, watch=None):
        """Return the model after all stages."""
        return self._after(len(self.stages), model, data)

    def _after(self, count: int, model: nn.Module, data: wb.Data) -> nn.Module:
        if count == 0:
            return model
        stage, done = self.stages[count - 1], wb.Pipeline(self.stages[:count])
        found = stage.recall(model) if count == 1 else results.recall(done, model, RUNS)
        if found is not None:
            return found
        before = self._after(count - 1, model, data)
        with tqdm(desc=str(stage), unit="step") as bar:
            small = stage.within(model).compress(before, data, lambda step: show(bar, step))
        if stage.must_train:
            results.keep(done, model, small, RUNS)
        return small


def show(bar: tqdm, step: wb.Step) -> None:
    """Let the bar follow a training."""
    bar.total, bar.n = step.steps, step.step
    bar.set_postfix_str(f"loss {step.loss:.3f}" + (f", {step.accuracy.percent:.1f} %" if step.accuracy else ""))


def row(stages: tuple) -> wb.Technique:
    """Return the pipeline of a row of the table: everything stacked, then trained as long as every other row."""
    return Recalled((*stages, wb.FineTune(epochs=EPOCHS)))


def counted(techniques: list, model: nn.Module, data: wb.Data, split: str, latency: bool) -> list[Record]:
    """Return one record each; without `latency` the times that are recorded already stay."""
    known = {told(r): r.latency for r in read_records("combinations")} if "combinations" in record_names() else {}
    found = sweep(techniques, model, data, split, latency, lambda message, fraction: print(message, flush=True))
    weights = fingerprint(model)
    for i, record in enumerate(found):
        kind = record.technique.replace("Recalled", "Pipeline")
        record = replace(record, technique=kind, versions={**record.versions, "weights": weights})
        found[i] = record if latency else replace(record, latency=known.get(told(record), {}))
        print(f"{record.accuracy}, {record.size_bytes:,} bytes, {record.settings}", flush=True)
    return found


def told(record: Record) -> str:
    """Return what tells records apart."""
    return json.dumps([record.technique, record.settings, record.split], sort_keys=True)


def best(candidates: list[Record], full: Record) -> int:
    """Return which candidate is right most often among those whose files are small enough."""
    small = [i for i, record in enumerate(candidates) if times_smaller(record, full) >= TIMES_SMALLER]
    return max(small, key=lambda i: candidates[i].correct)


def times_smaller(record: Record, full: Record) -> float:
    """Return how many times smaller a file is than the full model's numbers in fp32."""
    return full.fp32_bytes / record.size_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="train everything anew")
    parser.add_argument("--latency", action="store_true", help="time everything, in turns")
    parser.add_argument("--headline", action="store_true", help="leave out the table of pairs")
    asked = parser.parse_args()
    if asked.again:
        shutil.rmtree(RUNS, ignore_errors=True)
    model, data = wb.load_model(MODEL), wb.load_data(DATA)
    candidates = [Recalled(stages) for stages in CANDIDATES]
    table = [] if asked.headline else [row(stages) for stages in TABLE]
    records = counted([FULL, INT8, *candidates, *table], model, data, "val", asked.latency)
    chosen = candidates[best(records[2 : 2 + len(candidates)], records[0])]
    tested = counted([FULL, INT8, chosen], model, data, "test", latency=False)
    path = shipped("data", "headlines") / f"{MODEL}-{int(times_smaller(tested[-1], tested[0]))}x.wb"
    path.parent.mkdir(parents=True, exist_ok=True)
    print(
        path.name, wb.save(chosen.compress(model, data), path), "bytes", write_records("combinations", records + tested)
    )


if __name__ == "__main__":
    main()
