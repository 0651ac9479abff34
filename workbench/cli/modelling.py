"""`workbench train`, `compress` and `sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path

from workbench.cli.choosing import (
    add_settings,
    add_split,
    at_least_one,
    chosen,
    compressed,
    technique_in,
    technique_named,
    value_of,
)
from workbench.cli.profiling import add_profile
from workbench.cli.progress import Doing, Progress
from workbench.subjects import data_for, model_named

RUNS = Path("runs")  # where an interrupted training leaves its checkpoint and its best weights


def add_commands(commands, argv: list[str]) -> None:
    """Declare the four commands; the technique that `argv` names adds its settings as flags to the one called."""
    adders = {"train": _add_train, "compress": _add_compress, "profile": add_profile, "sweep": _add_sweep}
    called = next((word for word in argv if word in adders), None)
    for name, add in adders.items():
        parser = add(commands)
        technique = technique_in(argv[argv.index(name) + 1 :]) if name == called and name != "train" else None
        if technique is not None:
            add_settings(parser, technique)


def _add_train(commands):
    parser = commands.add_parser("train", help="train a model of the workbench", allow_abbrev=False)
    parser.add_argument("name", metavar="MODEL", help="glyphs-cnn, lenet-300-100 or lenet-5")
    parser.add_argument(
        "--epochs", type=at_least_one, help="passes through the training images (default: the model's own)"
    )
    parser.add_argument("--learning-rate", type=float, help="the peak of the one-cycle schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="train on other images than the model's own, such as folder:PATH")
    parser.add_argument("--resume", action="store_true", help=f"go on from the last checkpoint in {RUNS}/")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        help="where the weights go (default: where wb.load_model finds them; runs/ for other images)",
    )
    parser.set_defaults(run=run_train)
    return parser


def _add_compress(commands):
    parser = commands.add_parser("compress", help="compress a model into one file", allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="a model's name, or a .wb file")
    parser.add_argument("technique", metavar="TECHNIQUE", type=technique_named, help="such as low-rank")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write, such as small.wb")
    parser.add_argument("--data", help="images for calibration and training (default: the model's own)")
    parser.set_defaults(run=run_compress)
    return parser


def _add_sweep(commands):
    parser = commands.add_parser("sweep", help="measure one setting at several values", allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="a model's name, or a .wb file")
    parser.add_argument("technique", metavar="TECHNIQUE", type=technique_named, help="such as low-rank")
    parser.add_argument("--values", required=True, metavar="SETTING=A,B,…", help="such as rank=0.1,0.2,0.5")
    parser.add_argument("--data", help="images to count accuracy on (default: the model's own)")
    add_split(parser)
    parser.add_argument("--latency", action="store_true", help="time the results too, all in turns")
    parser.add_argument("--records", type=Path, help="keep the records in this file, such as my-sweep.json")
    parser.set_defaults(run=run_sweep)
    return parser


def run_train(args) -> None:
    """Train a model and keep its weights; an interrupted training keeps its best so far and can go on."""
    from workbench.models import build, save_weights, weights_path
    from workbench.training import evaluate

    model = build(args.name, seed=args.seed)
    data = data_for(model, args.data)
    checkpoint = RUNS / f"{args.name}.checkpoint.safetensors"
    finished = _train(args, model, data, checkpoint)
    test = evaluate(model, data.test)
    shipped = args.data is None and finished  # only a whole training on the model's own images replaces its weights
    target = (finished and args.output) or (weights_path(args.name) if shipped else RUNS / f"{args.name}.safetensors")
    note = {"data": data.name, "seed": args.seed, "test": [test.correct, test.total], "finished": finished}
    save_weights(model, target, note)
    if finished:
        checkpoint.unlink(missing_ok=True)
    print(f"{args.name}: {test} never trained on. Weights: {target}")
    if not finished:
        print(f"Stopped early; these are the best so far. Go on with `workbench train {args.name} --resume`.")


def _train(args, model, data, checkpoint: Path) -> bool:
    """Run the training with a progress bar; True when it came to its end."""
    from workbench.models import MODELS
    from workbench.training import fit

    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        checkpoint.unlink(missing_ok=True)
    wishes = {"epochs": args.epochs or MODELS[args.name].epochs, "learning_rate": args.learning_rate}
    given = {key: value for key, value in wishes.items() if value is not None}
    steps = fit(model, data, seed=args.seed, checkpoint=checkpoint, **given)
    with Progress(args.name) as watch:
        for step in steps:
            if not watch(step):
                steps.close()
                return False
    return True


def run_compress(args) -> None:
    """Compress a model and write it as one file."""
    from workbench.artifact import encode, save

    model, name = model_named(args.model)
    technique = chosen(args, args.technique)
    small, ended = compressed(technique, model, data_for(model, args.data))
    before, after = len(encode(model)), save(small, args.output)
    print(f"{name}, {technique}: {before:,} → {after:,} bytes, {before / after:.1f} times smaller. File: {args.output}")
    if ended:
        print("Stopped early; the file holds what was learned until then. Compress again to train to the end.")


def run_sweep(args) -> None:
    """Measure the technique at each of the values, print one line for each, and keep them as records."""
    from workbench.records import write_records

    techniques = swept(args)
    model, name = model_named(args.model)
    records, stopped = _records(args, techniques, model)
    setting = args.values.partition("=")[0].strip().replace("-", "_")
    print(f"{setting:>16} {'bytes':>12} {'smaller':>9}  accuracy ({args.split} of {records[0].data})")
    for record in records:
        times = "".join(f"  {runtime} {found['median_ms']:.3f} ms" for runtime, found in record.latency.items())
        size = f"{record.size_bytes:>12,} {record.compression:>8.1f}×"
        print(f"{record.settings[setting]!s:>16} {size}  {record.accuracy}{times}")
    if args.records:
        path = write_records(args.records.stem, records, args.records.parent)
        print(f"Records of {name}: {path}")
    if stopped:
        times = " and no times" if args.latency else ""
        print(
            f"Stopped early, with {len(records)} of {len(techniques)} values{times}; sweep again to measure them all."
        )


def _records(args, techniques: list, model) -> tuple[list, bool]:
    """Return the records of a sweep, and whether Ctrl-C ended it early; before the first record it is raised."""
    from workbench.records import measure_sweep

    records = []
    with Doing() as watch:
        try:
            for records in measure_sweep(  # noqa: B007
                techniques, model, data_for(model, args.data), args.split, args.latency, watch
            ):
                pass
        except KeyboardInterrupt:
            if not records:
                raise
            return records, True
    return records, False


def swept(args) -> list:
    """Return one technique for each value in `--values rank=0.1,0.2`; the other settings come from their flags."""
    name, equals, values = args.values.partition("=")
    knobs = {knob.name: knob for knob in args.technique.settings()}
    name = name.strip().replace("-", "_")
    if not equals or name not in knobs:
        raise ValueError(
            f"--values takes SETTING=A,B,… with one of the settings {', '.join(knobs)}; got {args.values!r}."
        )
    try:
        numbers = [value_of(knobs[name], text.strip()) for text in values.split(",")]
    except argparse.ArgumentTypeError as error:
        raise ValueError(str(error)) from None
    base = {knob: getattr(args, knob) for knob in knobs}
    return [args.technique(**{**base, name: value}) for value in numbers]
