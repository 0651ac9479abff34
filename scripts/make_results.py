"""Train the results that are shipped, so that a panel shows the usual settings of a training technique at once.

    python scripts/make_results.py              what is missing; run it again to go on after an interruption
    python scripts/make_results.py --again      everything
    python scripts/make_results.py AdaRound …   only these techniques

Each result is an artifact in data/results that the technique's `recall` finds for exactly this model and these
settings. data/results/index.json says for each what it is and how many validation images the file itself gets right.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

import workbench as wb
from workbench import results
from workbench.paths import shipped

MODEL = "glyphs-cnn"
RESULTS = (
    wb.GradualPruning(),
    wb.MovementPruning(),
    wb.WeightDecayPruning(),
    wb.AdaRound(),
    wb.QuantizationAwareTraining(),
    wb.DistillationFeatures(),
    wb.DistillationRelational(),
    *(wb.MagnitudePruning(sparsity=s, finetune=1) for s in (0.8, 0.9)),
    wb.Pipeline([wb.MagnitudePruning(), wb.QuantizationAwareTraining()]),
    wb.Pipeline([wb.MagnitudePruning(sparsity=0.8), wb.WeightClustering(), wb.Quantization(), wb.FineTune(epochs=1)]),
    *(wb.ChannelPruning(sparsity=s, finetune=1) for s in (0.5, 0.75)),
    wb.LowRank(rank=0.1, finetune=1),
    wb.EntropyAwareTraining(),
    wb.SelfDistillation(),
)


def make(technique: wb.Technique, model, data: wb.Data) -> Path:
    """Train one result and keep it."""
    with tqdm(desc=str(technique), unit="step") as bar:

        def watch(step):
            bar.total, bar.n = step.steps, step.step
            bar.set_postfix_str(f"loss {step.loss:.3f}" + (f", {step.accuracy.percent:.1f} %" if step.accuracy else ""))

        small = technique.compress(model, data, watch)
    return results.keep(technique, model, small)


def entry(technique: wb.Technique, path: Path, data: wb.Data) -> dict:
    """Describe a result, counted on the file as it is."""
    counted = wb.evaluate(wb.load(path), data.val)
    print(f"{technique}: {counted}, {path.stat().st_size:,} bytes", flush=True)
    about = {"file": path.name, "model": MODEL, "technique": type(technique).__name__, "settings": technique.values()}
    return about | {"data": data.name, "split": "val", "correct": counted.correct, "total": counted.total}


def write_index(entries: list[dict], path: Path) -> None:
    """Write the entries, one line each, and the file whole or not at all."""
    part = path.with_suffix(".part")
    lines = [json.dumps(one, sort_keys=True) for one in sorted(entries, key=lambda one: one["file"])]
    part.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="train everything anew")
    parser.add_argument("only", nargs="*", metavar="TECHNIQUE", help="such as DistillationFeatures")
    asked = parser.parse_args()
    known_names = list(dict.fromkeys(type(technique).__name__ for technique in RESULTS))
    unknown = [name for name in asked.only if name not in known_names]
    if unknown:
        parser.error(f"there is no result of {unknown[0]!r}; choose from {', '.join(known_names)}")
    model, data = wb.load_model(MODEL), wb.load_data(wb.MODELS[MODEL].data)
    index = shipped("data", "results", "index.json")
    known = {one["file"]: one for one in json.loads(index.read_text())} if index.is_file() else {}
    for technique in RESULTS:
        path = results.result_path(technique, model)
        if asked.only and type(technique).__name__ not in asked.only:
            continue
        if asked.again or path.name not in known or not path.is_file():
            make(technique, model, data)
            known[path.name] = entry(technique, path, data)
            write_index([one for one in known.values() if (index.parent / one["file"]).is_file()], index)


if __name__ == "__main__":
    main()
