"""`workbench profile`: measure any model, print a table, write JSON and a page, and compare what was written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from workbench.cli.choosing import add_split, at_least_one, chosen, compressed, shape_of, technique_named
from workbench.cli.progress import Doing
from workbench.subjects import architecture_of, model_named, opened

SECTIONS = {  # flags, and what each measures
    "layers": "time, multiply-adds and bytes of each layer",
    "roofline": "what this machine's processor and memory reach, and where the layers lie below it",
    "verdicts": "why it isn't faster, layer by layer",
    "scenarios": "single stream, multi stream, server and offline, like MLPerf's",
    "sweep": "batch sizes and threads, and the knee",
    "software": "the uncompressed model made faster by software alone",
    "memory": "weights, activations, resident size, and energy where the machine tells",
    "maps": "where sparsity, rank, bit width and channel widths win or lose on this machine; about a minute",
}


def add_profile(commands):
    """Declare the command on an argparse group of subcommands."""
    parser = commands.add_parser("profile", help="measure size, accuracy and latency", allow_abbrev=False)
    words = "a model's name, a .wb, .onnx or .xml (OpenVINO IR) file, or module:function that builds a model"
    parser.add_argument("model", metavar="MODEL", nargs="?", help=words)
    words = "the shape of one batch, such as 1,3,224,224 (default: images of the model's own data)"
    parser.add_argument("--input", type=shape_of, metavar="N,C,H,W", help=words)
    parser.add_argument("--technique", type=technique_named, help="compress first; its settings are flags too")
    parser.add_argument("--baseline", help="compare with this model (default: the one that it was made from)")
    parser.add_argument("--data", help="images to count accuracy on (default: the model's own)")
    parser.add_argument("--batch", type=at_least_one, help="images at once (default: those of --input, or 1)")
    parser.add_argument("--runtime", action="append", help="measure on this runtime only; may be repeated")
    parser.add_argument("--threads", type=at_least_one, default=1, help="processor threads (default 1)")
    parser.add_argument("--calls", type=at_least_one, default=100, help="calls to time (default 100; 1000 give a p99)")
    words = "overwrite a GPU's L2 cache before each of its calls, as if something else had run in between"
    parser.add_argument("--flush-l2", action="store_true", help=words)
    add_split(parser)
    _add_sections(parser)
    _add_outputs(parser)
    parser.set_defaults(run=run_profile, misused=parser.error)
    return parser


def _add_sections(parser) -> None:
    group = parser.add_argument_group("further measurements", "each takes some seconds on a quiet machine")
    for name, words in SECTIONS.items():
        group.add_argument(f"--{name}", action="store_true", help=words)
    group.add_argument("--all", action="store_true", help="all of them")


def _add_outputs(parser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file too")
    words = "write a page with figures that opens without a network; without other flags it has all measurements"
    group.add_argument("--html", type=Path, metavar="FILE", help=words)
    words = "measure nothing: show two files written with --json side by side"
    group.add_argument("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help=words)


def run_profile(args) -> None:
    """Measure a model beside its baseline and print a table and what it says in words; or compare two profiles."""
    if args.compare:
        return _compare(*args.compare)
    if args.model is None:
        args.misused("name a model, such as glyphs-cnn, model.onnx or torchvision.models:resnet18")
    from workbench.profiler import save_profile
    from workbench.reports import html_page, investigate

    for path in filter(None, (args.json, args.html)):
        _require_folder(path)
    subject, baseline = _subjects(args)
    how = {
        "flush_l2": args.flush_l2,
        "runtimes": args.runtime,
        "batch": _batch(args, subject),
        "threads": _threads(args.threads),
    }
    with Doing() as watch:
        report = investigate(subject, baseline, _sections(args), watch, calls=args.calls, split=args.split, **how)
    print(report)
    if args.json:
        save_profile(report, args.json)
    if args.html:
        args.html.write_text(html_page(report), encoding="utf-8")
        print(f"\nPage: {args.html}")


def _compare(first: Path, second: Path) -> None:
    from workbench.profiler import compare_profiles, load_profile

    print(compare_profiles(load_profile(first), load_profile(second), (str(first), str(second))))


def _require_folder(path: Path) -> None:
    """Raise OSError before anything is measured, rather than when it is to be written."""
    if not path.parent.is_dir():
        raise OSError(f"There is no folder {path.parent} to write {path.name} to; make it first.")


def _sections(args) -> list[str]:
    """Return the measurements asked for; a page without any named has them all."""
    named = [name for name in SECTIONS if getattr(args, name)]
    return list(SECTIONS) if args.all or (args.html and not named) else named


def _subjects(args):
    """Return the model to measure and, where there is one, what to compare it with."""
    subject = opened(args.model, args.input, args.data)
    baseline = opened(args.baseline, args.input, args.data) if args.baseline else _origin(args, subject)
    if args.technique is None:
        return subject, baseline
    return _compressed(args, subject), baseline if args.baseline else subject


def _origin(args, subject):
    """Return the shipped model that a file was made from, or None."""
    from workbench.models import MODELS

    name = architecture_of(subject.model)
    return replace(subject, name=name, model=model_named(name)[0]) if name in MODELS and args.model != name else None


def _compressed(args, subject):
    from workbench.runtimes import ModelFile

    if isinstance(subject.model, ModelFile):
        raise ValueError(
            f"{subject.name} is a file of another program, which no technique compresses; give a torch model."
        )
    technique = chosen(args, args.technique)
    small, ended = compressed(technique, subject.model, subject.images)
    name = f"{subject.name}, {_in_words(technique)}"
    if ended:
        name += ", its training stopped early"
        print("Stopped early; measured is what was learned until then. Run it again to train to the end.\n")
    return replace(subject, name=name, model=small)


def _in_words(technique) -> str:
    """Return a technique and those of its settings that are not as they come: channel pruning (sparsity 0.5)."""
    changed = [
        f"{knob.name.replace('_', ' ')} {value}"
        for knob in technique.settings()
        if (value := getattr(technique, knob.name)) != knob.default
    ]
    return type(technique).title().lower() + (f" ({', '.join(changed)})" if changed else "")


def _batch(args, subject) -> int:
    fixed = getattr(subject.model, "fixed_batch", 0)  # of a file that takes no other
    return args.batch or fixed or (len(subject.example) if args.input or subject.data is None else 1)


def _threads(count: int) -> int:
    """Return the number of threads; raise ValueError for more than there are cores: they would wait for one another."""
    from workbench.profiler.environment import allowed_cores

    if count > allowed_cores():
        cores = allowed_cores()
        raise ValueError(
            f"{count} threads on {cores} core{'s' * (cores > 1)} would wait for one another; take at most {cores}."
        )
    return count
