"""Compress the LeNets as far as the published tables and beyond, and ship the files with a record beside them.

    python scripts/make_headlines.py                  what is missing
    python scripts/make_headlines.py --again          everything
    python scripts/make_headlines.py lenet-5-1.00 …   only these

Each headline takes the shipped model, cuts it to fewer channels, and trains it once with the coded size in the loss, on
MNIST's training images, moved and turned a little. Settings were chosen on 5,000 validation images that are taken out
of the training images; the 10,000 test images are classified once, by the file, at the end. Everything follows from the
seed, up to the rounding of another machine. An interrupted training goes on: its epochs are kept in runs/. The
published rows beside a record are those of PUBLISHED each time, without a training.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn
from tqdm import tqdm

import workbench as wb
from workbench.data import Data
from workbench.models import fingerprint
from workbench.paths import shipped
from workbench.profiler import environment, layer_costs
from workbench.records import Record, read_records, record_names, write_records
from workbench.surgery import clone, weighted_layers
from workbench.surgery.channels import cut_channels
from workbench.techniques.pruning.channel import strongest
from workbench.training import jitter

WORK = Path(__file__).resolve().parents[1] / "runs" / "headlines"
VARIANTS = 4  # of each training image: itself, and three that are moved and turned
PIXELS = 1.0  # how far at most they are moved


@dataclass(frozen=True)
class Headline:
    """One file to make: the model, how many channels of its layers stay at the start, the training, and the aim."""

    name: str
    model: str
    channels: dict[str, int]
    training: wb.EntropyAwareTraining
    at_least: float  # times smaller than fp32
    at_most: float  # test error, per cent


HEADLINES = (
    Headline(
        "lenet-300-100-1.64",
        "lenet-300-100",
        {"1": 150, "3": 80},
        wb.EntropyAwareTraining(strength=1.2, epochs=3, learning_rate=0.03, augment=False),
        at_least=100,
        at_most=1.64,
    ),
    Headline(
        "lenet-5-0.80",
        "lenet-5",
        {"0": 12, "2": 30, "5": 120},
        wb.EntropyAwareTraining(strength=0.7, epochs=6, learning_rate=0.02, augment=False),
        at_least=200,
        at_most=0.80,
    ),
    Headline(
        "lenet-5-1.00",
        "lenet-5",
        {"0": 10, "2": 24, "5": 100},
        wb.EntropyAwareTraining(strength=1.5, epochs=3, learning_rate=0.03, augment=False),
        at_least=420,
        at_most=1.0,
    ),
    Headline(
        "lenet-5-0.96",
        "lenet-5",
        {"0": 8, "2": 16, "5": 80},
        wb.EntropyAwareTraining(strength=3.2, epochs=10, learning_rate=0.02, augment=False),
        at_least=1110,
        at_most=0.96,
    ),
    Headline(
        "lenet-5-smallest",
        "lenet-5",
        {"0": 8, "2": 16, "5": 60},
        wb.EntropyAwareTraining(strength=7.0, epochs=8, learning_rate=0.02, augment=False),
        at_least=1110,
        at_most=1.5,
    ),
)

PUBLISHED = {  # model -> rows of (method, times smaller, test error in per cent, source)
    "lenet-300-100": [
        ("Deep Compression", 40, 1.58, "Han et al., 2016, arXiv:1510.00149, table 1"),
    ],
    "lenet-5": [
        ("Deep Compression", 39, 0.74, "Han et al., 2016, arXiv:1510.00149, table 1"),
        ("DeepCABAC, after sparse training", 115, None, "Wiedemann et al., 2019, arXiv:1907.11900"),
        ("Bayesian Compression, fast prediction", 419, 1.0, "Louizos et al., 2017, arXiv:1705.08665, table 2"),
        ("Bayesian Compression, maximum compression", 771, 1.0, "Louizos et al., 2017, arXiv:1705.08665, table 2"),
        ("Minimal Random Code Learning", 555, 0.69, "Havasi et al., 2019, arXiv:1810.00440"),
        ("Minimal Random Code Learning", 1110, 0.96, "Havasi et al., 2019, arXiv:1810.00440"),
    ],
}


def many(data: Data) -> Data:
    """Return the data with VARIANTS of each training image, made once, so that an epoch shows all of them."""
    generator, images = torch.Generator().manual_seed(0), data.train.images
    moved = [
        jitter(part.float(), generator, PIXELS).round().clamp(0, 255).byte()
        for _ in range(VARIANTS - 1)
        for part in images.split(5000)
    ]
    labels = data.train.labels.repeat(VARIANTS)
    return replace(data, train=replace(data.train, images=torch.cat([images, *moved]), labels=labels))


def start(headline: Headline, data: Data) -> nn.Module:
    """Return the shipped model with only its strongest channels, and without biases.

    A background pixel is a constant, so that a weight on it does what a bias did; training finds it.
    """
    small = clone(wb.load_model(headline.model))
    groups = wb.ChannelPruning.trace(small, data).groups
    cut_channels(small, [(g, strongest(strengths(small, g), headline.channels[g.layers[0]])) for g in groups])
    for _, layer in weighted_layers(small):
        layer.bias = None
    return small


def strengths(model: nn.Module, group) -> Tensor:
    """Return for each channel of a group the product of the squared norms of what makes it and what reads it."""
    norms = []
    for member in group.members:
        weight = model.get_submodule(member.layer).weight.detach()
        slices = weight.transpose(0, dict(member.tensors)["weight"]).flatten(1).square().sum(1)
        norms.append(slices[member.index].sum(1))
    return torch.stack(norms).prod(0)


def train(headline: Headline, data: Data, again: bool) -> nn.Module:
    """Train with a progress bar; each finished epoch is kept in runs/, and an interrupted training goes on from it."""
    checkpoint = WORK / f"{headline.name}-{crc32(repr(headline).encode()):08x}.safetensors"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if again:
        checkpoint.unlink(missing_ok=True)
    with tqdm(desc=headline.name, unit="step") as bar:

        def watch(step):
            bar.total, bar.n = step.steps, step.step
            right = f", {step.accuracy.total - step.accuracy.correct} validation errors" if step.accuracy else ""
            bar.set_postfix_str(f"loss {step.loss:.3f}{right}")

        return replace(headline.training, checkpoint=checkpoint).compress(start(headline, data), data, watch)


def record(headline: Headline, path: Path, data: Data) -> Record:
    """Count everything on the file itself: bytes, validation errors, and, this once, test errors."""
    model, original, place = wb.load(path), wb.load_model(headline.model), environment()
    test, val = wb.evaluate(model, data.test), wb.evaluate(model, data.val)
    settings = {
        "file": path.name,
        "aim": {"at_least_times": headline.at_least, "at_most_percent": headline.at_most},
        "channels": headline.channels,
        "training": headline.training.values(),
        "validation": [val.correct, val.total],
        "published": published(headline.model),
    }
    return Record(
        model=headline.model,
        data=data.name,
        technique=type(headline.training).__name__,
        settings=settings,
        split="test",
        correct=test.correct,
        total=test.total,
        size_bytes=path.stat().st_size,
        fp32_bytes=4 * sum(p.numel() for p in original.parameters()),
        parameters=sum(p.numel() for p in model.parameters()),
        macs=sum(cost.macs for cost in layer_costs(model, data.example())),
        seed=headline.training.seed,
        machine=str(place),
        date=datetime.now(timezone.utc).date().isoformat(),
        versions={**place.versions, "weights": fingerprint(original)},
    )


def published(model: str) -> list[dict]:
    """Return the published rows of a model as a record holds them."""
    return [dict(zip(("method", "times", "error_percent", "source"), row, strict=True)) for row in PUBLISHED[model]]


def renew_published() -> None:
    """Bring the published rows of all records up to date with PUBLISHED; nothing is trained or counted for it."""
    records = known_records()
    renewed = [replace(one, settings={**one.settings, "published": published(one.model)}) for one in records]
    if renewed != records:
        write_records("headlines", renewed)


def print_table(records: list[Record]) -> None:
    """Print each headline with the published rows of its model below it."""
    for one in records:
        errors = one.total - one.correct
        print(
            f"{one.settings['file']:24} {one.size_bytes:7,} B {one.compression:7.0f}×  {errors / 100:.2f} % test error"
        )
        for row in one.settings["published"]:
            error = "" if row["error_percent"] is None else f"{row['error_percent']:.2f} %"
            print(f"    {row['method']:42} {row['times']:7.0f}×  {error:8} {row['source']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [one.name for one in HEADLINES]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(known)} (default: all)")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--untested", action="store_true", help="train and show validation errors, touch no test image")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"there is no headline {unknown[0]!r}; choose from {', '.join(known)}")
    wanted = [one for one in HEADLINES if not arguments.names or one.name in arguments.names]
    torch.set_num_threads(1)  # so that sums are taken in the same order everywhere
    data = wb.load_data("mnist")
    for headline in wanted:
        path = shipped("data", "headlines", f"{headline.name}.wb")
        if arguments.again or not is_made(headline, path):
            make(headline, path, data, arguments)
    if not arguments.untested:
        renew_published()
        print_table(read_records("headlines"))


def is_made(headline: Headline, path: Path) -> bool:
    """Say whether the file and a record of exactly these settings are there."""
    return path.is_file() and any(
        one.settings["file"] == path.name and one.settings["training"] == headline.training.values()
        for one in known_records()
    )


def known_records() -> list[Record]:
    return read_records("headlines") if "headlines" in record_names() else []


def make(headline: Headline, path: Path, data: Data, arguments: argparse.Namespace) -> None:
    """Train, save, count and record one headline; `--untested` only prints bytes and validation errors."""
    model = train(headline, many(data), arguments.again)
    if arguments.untested:
        val = wb.evaluate(model, data.val)
        print(f"{headline.name}: {len(wb.encode(model)):,} B, {val.total - val.correct} validation errors")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    wb.save(model, path)
    others = [one for one in known_records() if one.settings["file"] != path.name]
    made = [*others, record(headline, path, data)]
    write_records("headlines", sorted(made, key=lambda one: one.settings["file"]))


if __name__ == "__main__":
    main()
