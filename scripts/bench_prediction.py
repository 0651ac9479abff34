"""Show how far predicted latencies are from measured ones: fit to a few settings of the sliders, predict the others.

    python scripts/bench_prediction.py [--runtimes openvino eager] [--calls 100] [--json FILE]

All settings, those fitted to and those held out, are timed in turns in one run, so that a drift of the machine reaches
all alike. Exits with 1 if the median error on a runtime is above 15 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import workbench as wb
from workbench.profiler import LatencyModel, environment, layer_times_of

MOST = 0.15
FITTED_CHANNELS, HELD_CHANNELS = (0.25, 0.5, 0.75, 0.9), (0.1, 0.35, 0.45, 0.6, 0.7, 0.85)
FITTED_RANKS, HELD_RANKS = (0.1, 0.3, 0.6, 0.9), (0.05, 0.2, 0.4, 0.5, 0.75)


def settings(model, data) -> tuple[dict, dict]:
    """Return the compressed models that are fitted to and those that are held out, by what was done to them."""
    example = data.example(1)
    channels = lambda part: wb.ChannelPruning(sparsity=part).compress(model, example)
    ranks = lambda part: wb.LowRank(rank=part).compress(model, example)
    int8 = lambda small: wb.Quantization(weight_bits=8).compress(small, data)
    fitted = {"baseline": model, "8 bits": int8(model)}
    fitted |= {f"{part:.0%} of channels removed": channels(part) for part in FITTED_CHANNELS}
    fitted |= {f"rank {part}": ranks(part) for part in FITTED_RANKS}
    fitted |= {f"8 bits, {part:.0%} of channels removed": int8(channels(part)) for part in (0.5, 0.8)}
    fitted |= {"8 bits, rank 0.3": int8(ranks(0.3))}
    held = {f"{part:.0%} of channels removed": channels(part) for part in HELD_CHANNELS}
    held |= {f"rank {part}": ranks(part) for part in HELD_RANKS}
    held |= {f"8 bits, {part:.0%} of channels removed": int8(channels(part)) for part in (0.3, 0.65)}
    return fitted, held | {"8 bits, rank 0.5": int8(ranks(0.5))}


def errors(runtime: str, fitted: dict, held: dict, example, calls: int) -> list[dict]:
    """Measure everything in turns on one runtime; return one row for each setting that was held out."""
    times = layer_times_of([*fitted.values(), *held.values()], example, runtime, calls=calls)
    predictor = LatencyModel(runtime, threads=1, batch=len(example))
    for model, found in zip(fitted.values(), times, strict=False):
        predictor.learn(model, example, found)
    rows = []
    for (name, model), found in zip(held.items(), times[len(fitted) :], strict=True):
        start = time.perf_counter()
        predicted = predictor.predict_ms(model, example)
        took = 1000 * (time.perf_counter() - start)
        row = {"runtime": runtime, "setting": name, "predicted_ms": predicted, "measured_ms": found.total_ms}
        rows.append(row | {"error": predictor.track(predicted, found.total_ms), "noisy": found.noisy, "took_ms": took})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runtimes", nargs="+", default=["openvino", "eager"])
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--json", help="write the rows to this file")
    chosen = parser.parse_args()
    data = wb.load_data("glyphs")
    fitted, held = settings(wb.load_model("glyphs-cnn"), data)
    rows = []
    for runtime in chosen.runtimes:
        rows += errors(runtime, fitted, held, data.example(1), chosen.calls)
    for row in rows:
        noisy = "  noisy" if row["noisy"] else ""
        print(f"{row['runtime']:<10}{row['setting']:<36}{row['predicted_ms']:>9.3f} ms predicted"
              f"{row['measured_ms']:>9.3f} ms measured{row['error']:>7.0%}{noisy}")  # fmt: skip
    medians = {name: statistics.median(r["error"] for r in rows if r["runtime"] == name) for name in chosen.runtimes}
    slowest = statistics.median(row["took_ms"] for row in rows)
    print(f"Median error: {', '.join(f'{name} {value:.1%}' for name, value in medians.items())}. "
          f"A prediction takes {slowest:.0f} ms. {environment()}.")  # fmt: skip
    if chosen.json:
        with open(chosen.json, "w", encoding="utf-8") as file:
            json.dump({"median_error": medians, "rows": rows, "environment": environment().to_dict()}, file, indent=1)
    return int(max(medians.values()) > MOST)


if __name__ == "__main__":
    sys.exit(main())
