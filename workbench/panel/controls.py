"""The controls of a panel, made from the settings that a technique declares, and the pieces of page around them."""

from __future__ import annotations

from pathlib import Path

import anywidget
import ipywidgets
import traitlets

from workbench.technique import Setting, Technique

_HERE = Path(__file__).parent
_text = lambda name: (_HERE / name).read_text(encoding="utf-8")


class Number(anywidget.AnyWidget):
    """A slider with a number box beside it and the unit in words; `value` is what both show.

    `held` is true while the slider is held by the pointer or a key; `disabled` greys it out.
    """

    _esm = _text("number.js")
    label = traitlets.Unicode().tag(sync=True)
    unit = traitlets.Unicode().tag(sync=True)
    help = traitlets.Unicode().tag(sync=True)
    low = traitlets.Float().tag(sync=True)
    high = traitlets.Float().tag(sync=True)
    step = traitlets.Float().tag(sync=True)
    whole = traitlets.Bool().tag(sync=True)
    value = traitlets.Float().tag(sync=True)
    disabled = traitlets.Bool().tag(sync=True)
    held = traitlets.Bool().tag(sync=True)


class View(anywidget.AnyWidget):
    """A piece of page: `html` is drawn as it is; `kind` is its class, `role` and `live` are for screen readers."""

    _esm = _text("view.js")
    _css = _text("style.css")
    html = traitlets.Unicode().tag(sync=True)
    kind = traitlets.Unicode().tag(sync=True)
    role = traitlets.Unicode().tag(sync=True)
    name = traitlets.Unicode().tag(sync=True)
    live = traitlets.Bool().tag(sync=True)
    opened = traitlets.Float().tag(sync=True)  # when the figure of a panel stood on a page, for the header only


class Address(anywidget.AnyWidget):
    """The settings in the page's address (`found` when the page opens, `settings` from then on) and a copy button."""

    _esm = _text("address.js")
    prefix = traitlets.Unicode().tag(sync=True)
    settings = traitlets.Dict().tag(sync=True)
    found = traitlets.Dict().tag(sync=True)
    code = traitlets.Unicode().tag(sync=True)


def word(value) -> str:
    """Return a choice as the page shows it: True -> "on", None -> "none"."""
    for plain, said in ((True, "on"), (False, "off"), (None, "none")):
        if value is plain:
            return said
    return str(value)


def control(knob: Setting, value) -> ipywidgets.DOMWidget:
    """Return the control of one setting, showing `value`."""
    if not knob.is_number:
        return choice(knob.label, [(word(c), c) for c in knob.choices], value, knob.help)
    return Number(
        label=knob.label,
        unit=knob.unit,
        help=knob.help,
        low=knob.low,
        high=knob.high,
        step=knob.step,
        whole=isinstance(knob.default, int),
        value=value,
    )


def choice(label: str, options: list, value, help: str = "") -> ipywidgets.Dropdown:
    """Return a drop-down with its label; `options` are (word, value) pairs."""
    drop = ipywidgets.Dropdown(options=options, value=value, description=label, tooltip=help or label)
    drop.style.description_width = "initial"
    drop.layout.width = "auto"
    return drop.add_class("wb-choice")


def row(kind: str, *parts: ipywidgets.Widget) -> ipywidgets.Box:
    """Return the parts side by side, in rows as the page is wide; `kind` is its class."""
    return ipywidgets.Box(parts).add_class("wb-row").add_class(kind)


def button(label: str, tooltip: str, on_click, *, accent: bool = False, disabled: bool = False) -> ipywidgets.Button:
    """Return a push button that calls `on_click()`."""
    made = ipywidgets.Button(description=label, tooltip=tooltip, disabled=disabled)
    made.layout.width = "auto"
    made.on_click(lambda _: on_click())
    return made.add_class("wb-button").add_class("wb-accent" if accent else "wb-plain")


def value_of(knob: Setting, shown):
    """Return what a control shows as the setting's own type: the slider's 4.0 is the setting's 4."""
    if not knob.is_number:
        return shown
    kind = type(knob.default)
    return kind(round(shown, 10)) if kind is float else kind(round(shown))


def parse(knob: Setting, text: str):
    """Return the setting's value from the text in an address; raise ValueError when it does not fit."""
    if knob.is_number:
        return knob.check(type(knob.default)(float(text)))
    for value in knob.choices:
        if word(value) == text:
            return value
    raise ValueError(f"{knob.label} is {text!r}; choose one of {', '.join(map(word, knob.choices))}.")


def reachable(knob: Setting, value) -> bool:
    """True when the control can show `value`."""
    return knob.low <= value <= knob.high if knob.is_number else value in knob.choices


def presets(technique: type[Technique], start: dict) -> dict[str, dict]:
    """Return named settings: where the panel began, and four steps from the gentlest to the strongest.

    Only numbers that have a value without effect are moved, and training effort is left as it is.
    """
    moved = [k for k in technique.settings() if k.is_number and k.has_neutral and k.name != "finetune"]
    if not moved:
        return {"as opened": start}
    steps = {"gentlest": 0.0, "gentle": 0.3, "strong": 0.7, "strongest": 1.0}
    named = {name: {**start, **{k.name: _toward_strongest(k, part) for k in moved}} for name, part in steps.items()}
    return {"as opened": start, **named}


def _toward_strongest(knob: Setting, part: float):
    values = knob.positions()
    if abs(values[-1] - knob.neutral) < abs(values[0] - knob.neutral):
        values.reverse()
    return values[round(part * (len(values) - 1))]
