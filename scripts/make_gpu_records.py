"""Profile networks on an NVIDIA GPU, for those who have none: writes data/records/gpu.jsonl, one profile a line.

    python scripts/make_gpu_records.py                   all networks, a few minutes
    python scripts/make_gpu_records.py --model resnet18  one of them again; the others' lines stay

Each network is timed in turns with its 2:4 sparse twin on every CUDA runtime: single images, and batches of 64. The
networks of torchvision have random weights, which take as long as trained ones. Every line is a profile as `workbench
profile --json` writes it, with the GPU, the libraries and the date, and the GPU's measured roofs beside.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import workbench as wb
from workbench.paths import shipped
from workbench.profiler import Profile, roofline
from workbench.profiler.comparison import profile_record, read_profiles, write_profiles
from workbench.profiler.environment import allowed_cores
from workbench.runtimes import RUNTIMES, runtime

MODELS = ("glyphs-cnn", "resnet18", "resnet50", "vit_b_16")
RECORDS = shipped("data", "records", "gpu.jsonl")
BATCH, PIXELS = 64, 224


def profiled(
    name: str, runtimes: Sequence[str], calls: int, threads: int = 1, batch: int = BATCH, pixels: int = PIXELS
) -> Profile:
    """Return the profile of a network's 2:4 sparse twin beside the network itself, on single images and on batches.

    `threads` of the processor compute the outputs in fp32 that those of the GPU are compared with.
    """
    if name in wb.MODELS:
        model, images = wb.load_model(name), wb.load_data("glyphs")
    else:
        from torchvision import models

        torch.manual_seed(0)
        model, images = models.get_model(name).eval(), torch.randn(1, 3, pixels, pixels)
    sparse = wb.SemiStructuredPruning().compress(model)
    how = {"calls": calls, "throughput_batch": batch, "threads": threads}
    found = wb.profile(sparse, images, baseline=model, runtimes=runtimes, **how)
    if found.stopped:
        raise KeyboardInterrupt  # half a profile is no record
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="only this one; may be repeated")
    parser.add_argument("--calls", type=int, default=300, help="single images to time on each runtime (default 300)")
    parser.add_argument("--out", type=Path, default=RECORDS, help="the file to write (default data/records/gpu.jsonl)")
    args = parser.parse_args()
    here, why_not = runtime("cuda").available()
    if not here:
        raise SystemExit(f"These records are measured on an NVIDIA GPU, and there is {why_not}. Run it where one is.")
    named = [one.name for one in RUNTIMES if one.device == "cuda"]
    lines = {line["name"]: line for line in read_profiles(args.out)}
    for name in args.model or MODELS:
        found = profiled(name, named, args.calls, allowed_cores())
        roofs = roofline(device="cuda").to_dict()
        lines[name] = profile_record(found, name=name, baseline_name=f"{name}, not pruned", roofline=roofs)
        write_profiles(args.out, [lines[known] for known in MODELS if known in lines])
        print(f"{name}, 2:4 sparse, against {name}\n{found}\n", flush=True)


if __name__ == "__main__":
    main()
