"""From words on the command line to models, data and techniques."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path


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
        f"there is no technique {name!r}; {_near(name, known)}choose from {', '.join(known)}"
    )


def technique_in(argv: list[str]):
    """Return the first technique that `argv` names, or None: its settings become flags before `argv` is parsed."""
    for word in argv:
        try:
            return technique_named(word)
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


def model_named(word: str):
    """Return (model, name): a shipped model, or one read from a .wb file; raise ValueError for anything else."""
    from workbench.models import MODELS, load_model

    if word in MODELS:
        return load_model(word), word
    if Path(word).suffix == ".wb" or Path(word).is_file():
        from workbench.artifact import load

        return load(word), word
    names = ", ".join(MODELS)
    raise ValueError(f"There is no model {word!r}; {_near(word, MODELS)}choose from {names}, or give a .wb file.")


def architecture_of(model) -> str:
    """Return the name of the shipped model that this one was made from, or an empty string."""
    return (getattr(model, "architecture", None) or {}).get("name", "")


def data_for(model, named: str | None):
    """Return the data named, else those that the model was trained on; raise ValueError where neither is known."""
    from workbench.data import load_data
    from workbench.models import MODELS

    name = architecture_of(model)
    if named is None and name not in MODELS:
        raise ValueError("Nothing says which images this model is for; name them with --data (see wb.DATA_SETS).")
    return load_data(named or MODELS[name].data)


def _near(word: str, known) -> str:
    near = difflib.get_close_matches(word.lower(), list(known), 1, 0.5)
    return f"did you mean {near[0]!r}? " if near else ""
