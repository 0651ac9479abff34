"""Measure the sweeps that the notebooks quote and the panels draw, and keep them in data/records/*.json.

    python scripts/make_records.py                   what is missing, or was measured on other weights
    python scripts/make_records.py --again           everything
    python scripts/make_records.py --latency         times too, of the settings in TIMED, on every runtime here
    python scripts/make_records.py quantization …    only these

Bytes, multiply-adds and right answers come out the same again; tests/test_lesson.py counts a sample anew. Milliseconds
belong to the machine and the day that the record names. Each file is written as soon as it is complete.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import torch
from safetensors import safe_open

import workbench as wb
from workbench.models import fingerprint
from workbench.paths import shipped
from workbench.records import record_names, write_records

MODEL, DATA = "glyphs-cnn", "glyphs"


@dataclass(frozen=True)
class Distillation(wb.Distillation):
    """The students that are shipped: recalled, never trained here."""

    def compress(self, model, data=None, watch=None):
        return self.recall(model)


def students() -> list[wb.Technique]:
    """Return the shipped students and their controls, by their weights' own notes, the teacher last."""
    found = []
    for path in sorted(shipped("data", "weights").glob(f"{MODEL}-*.safetensors")):
        with safe_open(path, "pt") as file:
            found.append(Distillation(**json.loads(file.metadata()["settings"])))
    return [*sorted(found, key=lambda one: (one.soft_weight == 0, one.width)), Distillation(width=1.0)]


def positions(technique: type[wb.Technique], name: str) -> list:
    """Return every position of a technique's slider."""
    return next(knob for knob in technique.settings() if knob.name == name).positions()


def deep_compression(sparsity: float, bits: int = 4) -> wb.Pipeline:
    """Return pruning and clustering without training; the file does the coding."""
    return wb.Pipeline([wb.MagnitudePruning(sparsity=sparsity), wb.WeightClustering(bits=bits)])


def combining() -> list[wb.Pipeline]:
    """Return what 07_combining quotes, nothing trained: each stage alone, pairs, all three, other orders and bits."""
    prune, four, three = wb.MagnitudePruning(sparsity=0.5), wb.WeightClustering(bits=4), wb.WeightClustering(bits=3)
    int8 = wb.Quantization(weight_bits=8)
    table = [[], [prune], [four], [int8], [prune, four], [prune, int8], [four, int8], [prune, four, int8]]
    others = [[four, prune], [three], [prune, three], [three, prune], [prune, three, int8]]
    more = wb.MagnitudePruning(sparsity=0.8)  # as in combinations.json, where the same is trained
    untrained = [[more], [more, four], [more, int8], [more, four, int8]]
    return [wb.Pipeline(stages) for stages in (*table, *others, *untrained)]


SPARSITIES = [0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.74, 0.78, 0.8, 0.82, 0.84, 0.86, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98]
BITS = range(2, 9)
STARTS = ("linear", "density", "k-means++")
CUTS = (0.5, 0.8, 0.9)
PLAIN_RANKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9)

SWEEPS = {
    "low_rank": lambda: [
        *(wb.LowRank(rank=r) for r in positions(wb.LowRank, "rank")),
        *(wb.LowRank(rank=r, objective="weights", recalibrate=False) for r in PLAIN_RANKS),
        *(wb.LowRank(rank=r, objective="weights") for r in (0.25, 0.5, 0.75)),
    ],
    "magnitude_pruning": lambda: [
        *(wb.MagnitudePruning(sparsity=s) for s in SPARSITIES),
        *(wb.MagnitudePruning(sparsity=s, scope="layer") for s in (0.5, 0.6, 0.7, 0.8, 0.9, 0.94, 0.98)),
    ],
    "channel_pruning": lambda: [
        *(wb.ChannelPruning(sparsity=s) for s in positions(wb.ChannelPruning, "sparsity")),
        *(wb.ChannelPruning(sparsity=s, recalibrate=False) for s in (0.05, 0.1, 0.2, 0.3, 0.5, 0.75)),
    ],
    "quantization": lambda: [
        *(wb.Quantization(weight_bits=b, granularity=g) for g in ("channel", "tensor") for b in BITS),
        *(wb.Quantization(weight_bits=b, activation_bits=32) for b in BITS),
        *(wb.Quantization(weight_bits=b, calibration="min-max") for b in (2, 3, 4, 8)),
        wb.Quantization(weight_bits=32, activation_bits=32),
    ],
    "clustering": lambda: [
        *(wb.WeightClustering(bits=b) for b in positions(wb.WeightClustering, "bits")),
        *(wb.WeightClustering(bits=b, initial=start) for start in STARTS for b in (2, 3, 4)),
        *(wb.WeightClustering(bits=b, scope="global") for b in (2, 3, 4)),
        wb.WeightClustering.neutral(),
    ],
    "deep_compression": lambda: [
        wb.Pipeline(),
        *(wb.Pipeline([wb.MagnitudePruning(sparsity=s)]) for s in CUTS),
        *(deep_compression(s) for s in CUTS),
        *(deep_compression(0.5, bits=b) for b in (2, 3, 5)),
        wb.Pipeline([wb.WeightClustering(bits=4), wb.MagnitudePruning(sparsity=0.5)]),
    ],
    "combining": combining,
    "distillation": students,
    "low_rank_finetuned": lambda: [wb.LowRank(rank=r, finetune=1) for r in (0.25, 0.5)],
    "magnitude_pruning_finetuned": lambda: [wb.MagnitudePruning(sparsity=s, finetune=1) for s in (0.8, 0.9)],
    "channel_pruning_finetuned": lambda: [wb.ChannelPruning(sparsity=s, finetune=1) for s in (0.25, 0.5, 0.75)],
}
TIMED = {
    "low_rank": {"rank": (0.1, 0.25, 0.5, 0.75), "objective": ("outputs",)},
    "magnitude_pruning": {"sparsity": (0.0, 0.5, 0.9), "scope": ("global",)},
    "channel_pruning": {"sparsity": (0.0, 0.25, 0.5, 0.75, 0.9), "recalibrate": (True,)},
    "quantization": {"weight_bits": (4, 8, 32), "granularity": ("channel",), "calibration": ("mse",)},
    "distillation": {"soft_weight": (0.9,)},
    "combining": {"stages": ()},
    "deep_compression": {"stages": ()},
}


def timed(name: str, technique: wb.Technique) -> bool:
    """True when this setting is to be timed."""
    wanted_values = TIMED.get(name, {"finetune": ()})
    return technique.is_neutral or all(getattr(technique, key) in values for key, values in wanted_values.items())


def told(settings: dict) -> str:
    """Return settings as one text, also where they hold the stages of a pipeline."""
    return json.dumps(settings, sort_keys=True)


def wanted(technique: wb.Technique) -> dict:
    """Return a technique's settings as JSON gives them back."""
    return json.loads(json.dumps(technique.values()))


def up_to_date(name: str, techniques: list[wb.Technique], weights: str) -> bool:
    """True when the file holds exactly these settings, measured on exactly these weights."""
    if name not in record_names():
        return False
    records = wb.read_records(name)
    asked = [wanted(technique) for technique in techniques]
    return [r.settings for r in records] == asked and all(r.versions.get("weights") == weights for r in records)


def with_times(name: str, records: list[wb.Record], techniques: list[wb.Technique], model, data) -> list[wb.Record]:
    """Return the records, those of TIMED with milliseconds of this machine, all taken in turns."""
    chosen = [technique for technique in techniques if timed(name, technique)]
    measured = wb.sweep(chosen, model, data, latency=True)
    found = {told(t.values()): r for t, r in zip(chosen, measured, strict=True)}
    today = datetime.now(timezone.utc).date().isoformat()
    dated = []
    for record in records:
        fresh = found.get(told(record.settings))
        times = {} if fresh is None else {"latency": fresh.latency, "machine": fresh.machine, "date": today}
        dated.append(replace(record, **times))
    return dated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(SWEEPS)} (default: all)")
    parser.add_argument("--again", action="store_true", help="measure also what is up to date")
    parser.add_argument("--latency", action="store_true", help="time the settings in TIMED")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in SWEEPS]
    if unknown:
        parser.error(f"there is no sweep {unknown[0]!r}; choose from {', '.join(SWEEPS)}")
    torch.set_num_threads(1)
    model, data = wb.load_model(MODEL), wb.load_data(DATA)
    weights = fingerprint(model)
    for name in args.names or SWEEPS:
        techniques = SWEEPS[name]()
        if args.again or not up_to_date(name, techniques, weights):
            records = wb.sweep(techniques, model, data, watch=lambda message, _: print(f"  {message}", file=sys.stderr))
            write_records(name, [replace(r, versions={**r.versions, "weights": weights}) for r in records])
        if args.latency:
            write_records(name, with_times(name, wb.read_records(name), techniques, model, data))
        print(f"{name}: {len(techniques)} records")


if __name__ == "__main__":
    main()
