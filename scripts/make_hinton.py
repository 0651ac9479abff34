"""Distillation on MNIST after Hinton: a net of two 800-unit layers, without and with a teacher.

    python scripts/make_hinton.py            what is missing; an interrupted training goes on from its last epoch
    python scripts/make_hinton.py --again    everything
    python scripts/make_hinton.py --choose   the candidates for the images as they are, each with its validation errors

The student is trained from the same first weights on the images as they are, and on images moved by up to two pixels,
each without and with a teacher, a convolutional net that is trained first on moved ones. On moved images a net keeps
its best epoch on the validation split. On the images as they are the settings were chosen on that split among CHOICES
(`--choose` prints their errors), and the chosen nets then learn from all 60,000 images, as Hinton's did. The test
images decide nothing. Writes data/records/hinton.json; the weights stay in runs/hinton. MNIST is read from
$WORKBENCH_DATA or downloaded.

Source: Hinton, Vinyals and Dean, 2015, arXiv:1503.02531, section 3.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import workbench as wb
from workbench.artifact import ledger
from workbench.models import build, load_weights, save_weights
from workbench.profiler import environment, layer_costs
from workbench.records import Record, write_records
from workbench.training import fit

RUNS = Path("runs") / "hinton"
UNITS, BATCH = 800, 256


@dataclass(frozen=True)
class Run:
    """One training: `taught` by the teacher or not, on images that are moved (`jitter`) or not.

    With `everything` the validation images are trained on too, and the last weights are kept.
    """

    name: str
    epochs: int
    learning_rate: float
    jitter: bool = True
    taught: bool = False
    temperature: float = 8.0
    soft_weight: float = 0.9
    everything: bool = False
    seed: int = 0


TEACHER = Run("teacher", epochs=10, learning_rate=4e-3)
PLAIN = partial(Run, jitter=False)
CHOICES = (
    PLAIN("alone-1", epochs=40, learning_rate=1.5e-3),
    PLAIN("alone-2", epochs=80, learning_rate=1.5e-3),
    PLAIN("alone-3", epochs=80, learning_rate=4e-3),
    PLAIN("taught-1", epochs=40, learning_rate=1.5e-3, taught=True),
    PLAIN("taught-2", epochs=40, learning_rate=1.5e-3, taught=True, temperature=20.0, soft_weight=1.0),
    PLAIN("taught-3", epochs=80, learning_rate=1.5e-3, taught=True, temperature=20.0, soft_weight=1.0),
)
STUDENTS = (
    Run("taught-moved", epochs=40, learning_rate=1.5e-3, taught=True),
    Run("alone-moved", epochs=40, learning_rate=1.5e-3),
    replace(CHOICES[1], name="alone", everything=True),
    replace(CHOICES[5], name="taught", everything=True),
)


def untrained(run: Run) -> nn.Module:
    """Return the net of a run with its first weights: (N, 1, 28, 28) -> (N, 10)."""
    if run.name == TEACHER.name:
        return build("glyphs-cnn", 0.25, classes=10, seed=run.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        hidden = [nn.Linear(784, UNITS), nn.ReLU(), nn.Linear(UNITS, UNITS), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(UNITS, 10))


def together(data: wb.Data) -> wb.Data:
    """Return the data with the validation images among the training images, and none to validate on."""
    train, val = data.train, data.val
    both = replace(train, images=torch.cat([train.images, val.images]), labels=torch.cat([train.labels, val.labels]))
    return replace(data, train=both, val=val.take(0))


def trained(run: Run, data: wb.Data, teacher: nn.Module | None) -> nn.Module:
    """Return the trained net of a run, from its file when it is there already."""
    done = RUNS / f"{run.name}.safetensors"
    model = untrained(run)
    if done.is_file():
        return load_weights(model, done)
    steps = fit(
        model,
        together(data) if run.everything else data,
        epochs=run.epochs,
        batch_size=BATCH,
        learning_rate=run.learning_rate,
        seed=run.seed,
        augment=run.jitter,
        teacher=teacher if run.taught else None,
        temperature=run.temperature,
        soft_weight=run.soft_weight,
        checkpoint=RUNS / f"{run.name}.part",
    )
    with tqdm(desc=run.name, unit="step") as bar:
        for step in steps:
            bar.total, bar.n = step.steps, step.step
            bar.set_postfix_str(f"{step.accuracy}" if step.accuracy and step.accuracy.total else bar.postfix)
    save_weights(model, done, asdict(run))
    return model


def record(run: Run, model: nn.Module, data: wb.Data, split: str) -> Record:
    """Count the errors of a net on a split of the images."""
    accuracy, account, place = wb.evaluate(model, getattr(data, split)), ledger(model), environment()
    print(f"{run.name}: {accuracy.total - accuracy.correct} errors of {accuracy.total:,} on {split}", flush=True)
    return Record(
        model="glyphs-cnn-0.25" if run.name == TEACHER.name else f"mlp-{UNITS}",
        data=data.name,
        technique="Distillation" if run.taught else "Training",
        settings=asdict(run),
        split=split,
        correct=accuracy.correct,
        total=accuracy.total,
        size_bytes=account.total_bytes,
        fp32_bytes=account.fp32_bytes,
        parameters=sum(p.numel() for p in model.parameters()),
        macs=sum(cost.macs for cost in layer_costs(model, data.example())),
        seed=run.seed,
        machine=str(place),
        date=datetime.now(timezone.utc).date().isoformat(),
        versions=dict(place.versions),
    )


def choose(data: wb.Data, teacher: nn.Module) -> None:
    """Train the candidates and print how many validation images each gets wrong."""
    for run in CHOICES:
        counted = wb.evaluate(trained(run, data, teacher), data.val)
        print(f"{run}: {counted.total - counted.correct} errors of {counted.total:,} on val", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="train everything anew")
    parser.add_argument("--choose", action="store_true", help="train the candidates, and count validation images only")
    asked = parser.parse_args()
    if asked.again:
        shutil.rmtree(RUNS, ignore_errors=True)
    RUNS.mkdir(parents=True, exist_ok=True)
    data = wb.load_data("mnist")
    nets = {TEACHER: (teacher := trained(TEACHER, data, None))}
    if asked.choose:
        return choose(data, teacher)
    nets |= {run: trained(run, data, teacher) for run in STUDENTS}
    counted = [(run, split) for run in nets for split in ("val", "test") if split == "test" or not run.everything]
    print(write_records("hinton", [record(run, nets[run], data, split) for run, split in counted]))


if __name__ == "__main__":
    main()
