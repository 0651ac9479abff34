"""From words on the command line to techniques and their settings."""

from __future__ import annotations

import argparse

from workbench.cli.progress import Progress
from workbench.subjects import near


def command_name(cls) -> str:
    """Return a technique's name on the command line: `LowRank` -> "low-rank"."""
    return cls.title().lower().replace(" ", "-")


def technique_named(name: str):
    """Return the technique called `name`, by its class or its command-line name."""
    from workbench.techniques import TECHNIQUES

    known = {command_name(cls): cls for cls in TECHNIQUES}
    for word, cls in known.items():
        if name.lower() in (word, cls.__name__.lower()):
            return cls
    raise argparse.ArgumentTypeError(
        f"there is no technique {name!r}; {near(name, known)}choose from {', '.join(known)}"
    )


def technique_in(argv: list[str]):
    """Return the first technique that `argv` names, or None: its settings become flags before `argv` is parsed."""
    for word in argv:
        try:
            return technique_named(word.removeprefix("--technique="))
        except argparse.ArgumentTypeError:
            continue
    return None


def add_settings(parser, cls) -> None:
    """Add one flag for each setting of the technique, with its range, unit and default."""
    group = parser.add_argument_group(f"settings of {command_name(cls)}", cls.__doc__.strip().splitlines()[0])
    for knob in cls.settings():
        span = f"{knob.low} to {knob.high}" if knob.is_number else " or ".join(map(str, knob.choices))
        words = [knob.help, f"{span}{' ' + knob.unit if knob.unit else ''} (default {knob.default})"]
        flag = "--" + knob.name.replace("_", "-")
        group.add_argument(
            flag,
            dest=knob.name,
            type=lambda text, knob=knob: value_of(knob, text),
            default=knob.default,
            metavar=knob.name.upper(),
            help=" ".join(filter(None, words)).replace("%", "%%"),
        )


def value_of(knob, text: str):
    """Return the setting's value that `text` spells; raise ArgumentTypeError with what it takes."""
    spelled = {str(value).lower(): value for value in knob.choices}
    if knob.has_neutral:
        spelled[str(knob.neutral).lower()] = knob.neutral
    try:
        return knob.check(spelled[text.lower()] if text.lower() in spelled else _number(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _number(text: str):
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and "." not in text and "e" not in text.lower() else number


def chosen(args, cls):
    """Return the technique with the settings given on the command line."""
    return cls(**{knob.name: getattr(args, knob.name) for knob in cls.settings()})


def add_split(parser) -> None:
    """Add the flag that says on which images accuracy is counted."""
    words = "images that accuracy is counted on (default val; test is for the final look)"
    parser.add_argument("--split", choices=("train", "val", "test"), default="val", help=words)


def at_least_one(text: str) -> int:
    """Return the whole number that `text` spells; raise ArgumentTypeError below 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def compressed(technique, model, data):
    """Return the shipped result for these settings where there is one, else compress now, training in sight.

    With it comes whether Ctrl-C ended the training early.
    """
    recalled = technique.recall(model)
    if recalled is not None:
        return recalled, False
    with Progress(type(technique).title()) as watch:
        return technique.compress(model, data, watch), watch.ended


def shape_of(text: str) -> tuple[int, ...]:
    """Return the shape that `text` spells: "1,3,224,224" -> (1, 3, 224, 224)."""
    parts = [part.strip() for part in text.replace("x", ",").split(",")]
    if len(parts) < 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape; write whole numbers such as 1,3,224,224")
    return tuple(map(int, parts))
