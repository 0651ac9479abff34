"""Which techniques work on which model of torchvision: compress, run, save, load in a new process, run in OpenVINO.

    python scripts/coverage.py                       every classification model, those done already left out
    python scripts/coverage.py resnet18 vit_b_16     only these
    python scripts/coverage.py --again --largest 30  anew, models of at most 30 million weights
    python scripts/coverage.py --table               only print what is known

Weights are random, inputs small, settings the defaults. Each model has processes of its own: one compresses and saves;
one takes half of the channels with Torch-Pruning, which gets the hints that its own tests give; the last, which never
saw their memory, loads and compares. OpenVINO's answers may differ as sums in another order do; those of a quantized
model by a tenth of the largest, or by twice what one pixel, moved by one level, does to torch's own answers. One line
for each model is kept in data/records/coverage.jsonl as soon as it is known, so that a run can be broken off and gone
on with.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

import workbench as wb
from workbench.paths import shipped
from workbench.techniques.repair import recalibrate

TECHNIQUES = ("LowRank", "MagnitudePruning", "ChannelPruning", "Quantization", "WeightClustering")
PEER = "Torch-Pruning"
STEPS = ("compress", "forward", "save", "load", "equal", "openvino")
SIZES = {"inception_v3": 96, "vit": 224, "maxvit": 224, "tiny": 32}  # pixels; 64 for all others
TOLERANCE = 1e-3  # of the largest output: sums in another order
TOLERANCE_QUANTIZED = 0.1  # a sum in another order can round an activation to the next of 256 levels, and so on upwards
STEPS_TRIED = 8  # pixels moved by one level each, to see what the model itself makes of a single rounding
PEER_BYTES = 16 << 30  # of memory for Torch-Pruning, whose bookkeeping grows without end on some models
RECORDS = shipped("data", "records", "coverage.jsonl")


def tiny(name: str) -> torch.nn.Module:
    """Return a model of torchvision's own parts with few of them, for tests: tiny-vit or tiny-regnet."""
    from torchvision.models import RegNet, VisionTransformer
    from torchvision.models.regnet import BlockParams

    if name == "tiny-vit":
        return VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64)
    shape = {"depth": 4, "w_0": 16, "w_a": 8.0, "w_m": 2.2, "group_width": 8, "se_ratio": 0.25}
    return RegNet(BlockParams.from_init_params(**shape))


def names() -> list[str]:
    """Return the names of torchvision's classification models, the smallest first."""
    from torchvision import models

    listed = models.list_models(module=models)
    sizes = {name: models.get_model_weights(name).DEFAULT.meta["num_params"] for name in listed}
    return sorted(listed, key=lambda name: (sizes[name], name))


def millions(name: str) -> float:
    """Return a model's number of weights, in millions."""
    from torchvision import models

    if name.startswith("tiny"):
        return sum(p.numel() for p in tiny(name).parameters()) / 1e6
    return models.get_model_weights(name).DEFAULT.meta["num_params"] / 1e6


def build(name: str) -> torch.nn.Module:
    """Return the model with the same random weights in every process."""
    from torchvision import models

    torch.manual_seed(0)
    options = {"init_weights": True, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    model = tiny(name) if name.startswith("tiny") else models.get_model(name, weights=None, **options)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and not layer.weight.any():
            torch.nn.init.normal_(layer.weight, std=0.02)  # the heads of ViT start at zero, and answer zero to anything
    return model.eval()


def example(name: str, count: int = 2) -> torch.Tensor:
    """Return random images of the size that the model is tried on."""
    size = next((pixels for start, pixels in SIZES.items() if name.startswith(start)), 64)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def settled(name: str) -> torch.nn.Module:
    """Return the model with its BatchNorm statistics measured, without which signals fade to 1e-10 or grow to 1e10."""
    return recalibrate(build(name), [example(name, 8)])


# --- the first process: compress and save ---------------------------------------------------------------------------


def compress_all(name: str, folder: Path) -> dict[str, dict]:
    """Compress the model with each technique, and save what works into `folder`; return the steps by technique."""
    model, images, cells = settled(name), example(name), {}
    for technique in TECHNIQUES:
        cells[technique] = tried(lambda cell, t=technique: compress(getattr(wb, t)(), model, images, folder / t, cell))
    return cells


def tried(run) -> dict:
    """Return what `run` wrote into its cell, with the reason where it failed, and the seconds it took."""
    cell, start = {"passed": []}, time.perf_counter()
    try:
        run(cell)
    except Exception as error:
        cell["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    cell["seconds"] = round(time.perf_counter() - start, 1)
    return cell


def compress(technique, model, images, path: Path, cell: dict) -> None:
    small = technique.compress(model, images)
    cell["passed"].append("compress")
    answers = run_forward(small, images, cell)
    cell["bytes"] = wb.save(small, path.with_suffix(".wb"))
    cell["passed"].append("save")
    torch.save(answers, path.with_suffix(".pt"))


def run_forward(model, images, cell: dict) -> torch.Tensor:
    with torch.no_grad():
        answers = model(images)
    if not torch.isfinite(answers).all():
        raise ValueError("the outputs are not finite")
    cell["passed"].append("forward")
    return answers


def prune_with_peer(model, images, path: Path, cell: dict) -> None:
    """Remove half of the channels with Torch-Pruning; the classifier keeps its outputs."""
    import torch_pruning as tp
    from torchvision.models import ConvNeXt, MaxVit, VisionTransformer

    weights = sum(p.numel() for p in model.parameters())
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    hints = {"ignored_layers": [m for m in linear if m.out_features == 1000]}
    heads = {m: m.num_heads for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)}
    if isinstance(model, VisionTransformer):
        hints |= {"round_to": model.encoder.layers[0].num_heads, "num_heads": heads}
        hints["unwrapped_parameters"] = [(model.class_token, 2), (model.encoder.pos_embedding, 2)]
    if isinstance(model, ConvNeXt):
        scales = [m.layer_scale for m in model.modules() if hasattr(m, "layer_scale")]
        hints["unwrapped_parameters"] = [(scale, 0) for scale in scales]
    if isinstance(model, MaxVit):
        tables = [p for n, p in model.named_parameters() if n.endswith("relative_position_bias_table")]
        hints["unwrapped_parameters"] = [(table, 1) for table in tables]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(model, images, importance, pruning_ratio=0.5, **hints).step()
    if isinstance(model, VisionTransformer):
        model.hidden_dim = model.conv_proj.out_channels
    if sum(p.numel() for p in model.parameters()) >= weights:
        raise ValueError("no channel was removed")
    cell["passed"].append("compress")
    answers = run_forward(model, images, cell)
    torch.save(model, path.with_suffix(".model"))
    cell["passed"].append("save")
    torch.save(answers, path.with_suffix(".pt"))


# --- the second process: load and compare ---------------------------------------------------------------------------


def check_all(name: str, folder: Path, cells: dict[str, dict]) -> dict[str, dict]:
    """Load what the first process saved, compare its answers, and run it in OpenVINO."""
    images = example(name)
    for technique, cell in cells.items():
        if cell["passed"][-1:] == ["save"]:
            path = folder / technique
            found = tried(lambda now, t=technique, p=path: check(t, name, p, images, now))
            cell["passed"] += found.pop("passed")
            cell["seconds"] = round(cell["seconds"] + found.pop("seconds"), 1)
            cell |= found
    return cells


def check(technique: str, name: str, path: Path, images, cell: dict) -> None:
    from workbench.runtimes import is_fake_quantized, runtime

    if technique == PEER:
        model = torch.load(path.with_suffix(".model"), weights_only=False).eval()
    else:
        model = wb.load(path.with_suffix(".wb"), like=build(name))
    cell["passed"].append("load")
    answers, expected = run_forward(model, images, {"passed": []}), torch.load(path.with_suffix(".pt"))
    if not torch.equal(answers, expected):
        raise ValueError(f"the answers differ by {(answers - expected).abs().max():.2g} after loading")
    cell["passed"].append("equal")
    prepared = runtime("openvino").prepare(model, images)
    cell["openvino"], cell["difference"] = prepared.precision, float(f"{prepared.difference:.2g}")
    allowed = TOLERANCE
    if is_fake_quantized(model):
        cell["one_step"] = float(f"{one_step(model, images, answers):.2g}")
        allowed = max(TOLERANCE_QUANTIZED, 2 * cell["one_step"])
    if not prepared.difference <= allowed:
        raise ValueError(f"OpenVINO's answers differ by {prepared.difference:.2g} of the largest one")
    cell["passed"].append("openvino")


def one_step(model, images, answers) -> float:
    """Return how far torch's own answers move, at most, when one pixel moves by one level of the first layer's input.

    Deep nets with random weights amplify a single rounding, so that no two orders of summing agree any better.
    """
    from workbench.weights import InputQuantizer

    level = float(next(m.scale for m in model.modules() if isinstance(m, InputQuantizer)))
    places = torch.randint(images.numel(), (STEPS_TRIED,), generator=torch.Generator().manual_seed(2))
    largest, moved = answers.abs().max(), []
    for place in places:
        other = images.clone()
        other.view(-1)[place] += level
        with torch.no_grad():
            moved.append(float((model(other) - answers).abs().max() / largest))
    return max(moved)


# --- all models -----------------------------------------------------------------------------------------------------


def measure(name: str, limit: float) -> dict:
    """Return the line of one model, from two processes."""
    start = time.perf_counter()
    line = {"model": name, "millions": round(millions(name), 1), "pixels": example(name).shape[-1]}
    with tempfile.TemporaryDirectory(prefix="coverage-") as folder:
        kept = Path(folder) / "cells.json"
        for stage in ("compress", "peer", "check"):
            failure = stage_failure(stage, name, folder, limit)
            if failure and stage == "peer":
                cells = json.loads(kept.read_text()) | {PEER: {"passed": [], "reason": failure, "seconds": 0}}
                kept.write_text(json.dumps(cells))
            elif failure:
                return {**line, "left_out": f"{stage} {failure}"}
        line["cells"] = json.loads(kept.read_text())
    return {**line, "seconds": round(time.perf_counter() - start)}


def stage_failure(stage: str, name: str, folder: str, limit: float) -> str | None:
    """Run one stage in a process of its own; return what went wrong with the process, or None."""
    command = [sys.executable, __file__, "--stage", stage, "--folder", folder, name]
    try:
        done = subprocess.run(command, timeout=limit, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return f"took longer than {limit:.0f} s"
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"ended with {done.returncode}: {last[:200]}" if done.returncode else None


def run_stage(stage: str, name: str, folder: Path) -> None:
    """Do one process's part, with the cells handed on in a file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    kept = folder / "cells.json"
    cells = json.loads(kept.read_text()) if kept.is_file() else compress_all(name, folder)
    if stage == "peer":
        resource.setrlimit(resource.RLIMIT_AS, (PEER_BYTES, PEER_BYTES))
        cells[PEER] = tried(lambda cell: prune_with_peer(settled(name), example(name), folder / PEER, cell))
    elif stage == "check":
        cells = check_all(name, folder, cells)
    kept.write_text(json.dumps(cells))


def known(path: Path) -> dict[str, dict]:
    """Return the lines kept so far, the last for each model."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {line["model"]: line for line in map(json.loads, lines)}


def green(cell: dict | None) -> bool:
    """True when every step passed."""
    return cell is not None and cell["passed"] == list(STEPS)


def succeeded(cell: dict | None) -> bool:
    """True when the compressed model runs, also after loading; what Torch-Pruning itself promises."""
    return cell is not None and "equal" in cell["passed"]


def word(cell: dict | None) -> str:
    if cell is None:
        return "-"
    return "yes" if green(cell) else f"no: {STEPS[len(cell['passed'])]}"


def table(lines: dict[str, dict]) -> str:
    """Return the table, the reasons below it, and the sums."""
    heads = ("model", "million", *TECHNIQUES, PEER)
    rows = [heads]
    for name, line in lines.items():
        cells = line.get("cells", {})
        rows.append((name, f"{line['millions']:.1f}", *(word(cells.get(t)) for t in (*TECHNIQUES, PEER))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*text, "", *reasons(lines), "", *sums(lines)])


def reasons(lines: dict[str, dict]) -> list[str]:
    found = [f"{name}: left out, {line['left_out']}" for name, line in lines.items() if "left_out" in line]
    for name, line in lines.items():
        cells = line.get("cells", {})
        found += [f"{name}, {t}: {cell['reason']}" for t, cell in cells.items() if "reason" in cell]
    return found


def sums(lines: dict[str, dict]) -> list[str]:
    cells = [line["cells"] for line in lines.values() if "cells" in line]
    total, passed = len(cells) * len(TECHNIQUES), sum(green(each.get(t)) for each in cells for t in TECHNIQUES)
    ours = sum(succeeded(each.get("ChannelPruning")) for each in cells)
    theirs = sum(succeeded(each.get(PEER)) for each in cells)
    behind = [
        line["model"]
        for line in lines.values()
        if "cells" in line and succeeded(line["cells"][PEER]) and not succeeded(line["cells"].get("ChannelPruning"))
    ]
    return [
        f"{passed} of {total} cells green ({passed / max(total, 1):.1%}), {len(cells)} models.",
        f"Channels removed, run, saved and loaded: ChannelPruning {ours}, {PEER} {theirs} of {len(cells)} models.",
        f"{PEER} succeeds and ChannelPruning does not: {', '.join(behind) or 'none'}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="names of torchvision's models (default: all)")
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    parser.add_argument("--largest", type=float, default=1000, help="leave out models of more million weights")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that each of a model's processes may take")
    parser.add_argument("--records", type=Path, default=RECORDS, help="the file that keeps one line for each model")
    parser.add_argument("--table", action="store_true", help="only print what is known")
    parser.add_argument("--stage", choices=("compress", "peer", "check"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        return run_stage(args.stage, args.models[0], args.folder)
    done = known(args.records)
    chosen = [] if args.table else [n for n in args.models or names() if millions(n) <= args.largest]
    for number, name in enumerate(chosen, 1):
        if name in done and not args.again:
            continue
        print(f"{number}/{len(chosen)} {name} …", end=" ", file=sys.stderr, flush=True)
        done[name] = measure(name, args.limit)
        with args.records.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[name]) + "\n")
        cells = done[name].get("cells", {})
        words = ", ".join(f"{t} {word(cell)}" for t, cell in cells.items())
        print(words or done[name]["left_out"], file=sys.stderr, flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
