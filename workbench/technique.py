"""What a compression technique is: a frozen set of settings that turns a model into a smaller one.

A setting is declared once. Validation, slider, label, command-line flag and the generic tests follow from it:

    @dataclass(frozen=True)
    class LowRank(Technique):
        family: ClassVar[str] = "low-rank"
        source: ClassVar[str] = "Denton et al., 2014, arXiv:1404.0736"
        rank: float = setting(0.5, low=0.05, high=1.0, step=0.05, unit="of full rank", neutral=1.0)
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import nn

    from workbench.invariants import Invariants

ABSENT: Any = object()  # marks a setting without a value that changes nothing
Watch = Callable[[Any], "bool | None"]


def always(_values: Mapping[str, Any]) -> bool:
    """Say that a setting has an effect whatever the others are."""
    return True


@dataclass(frozen=True)
class Setting:
    """One knob of a technique: its range, its unit, and the value that changes nothing.

    A number has `low`, `high` and `step`; anything else has `choices`. `neutral` is valid even outside the range.
    `applies(values)` says, from the values of all settings, whether this one has an effect beside the others.
    """

    name: str
    default: Any
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: tuple = ()
    unit: str = ""
    neutral: Any = ABSENT
    help: str = ""
    applies: Callable[[Mapping[str, Any]], bool] = always

    @property
    def label(self) -> str:
        """The name in words: `weight_bits` -> "weight bits"."""
        return self.name.replace("_", " ")

    @property
    def is_number(self) -> bool:
        return not self.choices

    @property
    def has_neutral(self) -> bool:
        return self.neutral is not ABSENT

    def positions(self) -> list:
        """Every value that the slider or the drop-down can take, both ends included."""
        if not self.is_number:
            return list(self.choices)
        count = round((self.high - self.low) / self.step)
        values = [self.low + i * self.step for i in range(count + 1)]
        return [type(self.default)(round(v, 10)) for v in values]

    def check(self, value: Any) -> Any:
        """Return the value in the setting's own type; raise ValueError with a readable sentence if it cannot be."""
        if self.has_neutral and value == self.neutral and value is not True:
            return self.neutral
        if not self.is_number:
            return self._check_choice(value)
        return self._check_number(value)

    def _check_choice(self, value):
        if value not in self.choices:
            raise ValueError(f"{self.label} is {value!r}; choose one of {', '.join(map(repr, self.choices))}.")
        return self.choices[self.choices.index(value)]

    def _check_number(self, value):
        kind = type(self.default)
        number = isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
        if not number or kind(value) != value:
            word = "a whole number" if kind is int else "a number"
            raise ValueError(f"{self.label} is {value!r}; it takes {word} from {self.low} to {self.high}.")
        if not self.low <= value <= self.high:
            also = f" (or {self.neutral}, which changes nothing)" if self.has_neutral else ""
            raise ValueError(f"{self.label} is {value}; it goes from {self.low} to {self.high}{also}.")
        return kind(value)


def setting(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
    choices: tuple = (),
    unit: str = "",
    neutral: Any = ABSENT,
    help: str = "",
    applies: Callable[[Mapping[str, Any]], bool] = always,
) -> Any:
    """Declare a setting as a dataclass field; see `Setting` for what the words mean."""
    knob = Setting("", default, low, high, step, tuple(choices), unit, neutral, help, applies)
    return field(default=default, metadata={"setting": knob})


@dataclass(frozen=True)
class Technique:
    """A compression technique with its settings; `compress` returns a new model and never touches the given one."""

    family: ClassVar[str] = ""
    source: ClassVar[str] = ""
    trains: ClassVar[bool] = False

    def __post_init__(self):
        for knob in self.settings():
            try:
                object.__setattr__(self, knob.name, knob.check(getattr(self, knob.name)))
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}: {error}") from None

    @classmethod
    def settings(cls) -> tuple[Setting, ...]:
        """Return the declared settings, in order."""
        knobs = ((f.name, f.metadata["setting"]) for f in fields(cls) if "setting" in f.metadata)
        return tuple(replace(knob, name=name) for name, knob in knobs)

    @classmethod
    def title(cls) -> str:
        """Return the name in words: `LowRank` -> "Low rank", `CPDecomposition` -> "CP decomposition"."""
        words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*", cls.__name__)
        return " ".join([words[0], *(w if len(w) > 1 and w.isupper() else w.lower() for w in words[1:])])

    @classmethod
    def neutral(cls) -> Technique:
        """Return the technique with every setting at the value that changes nothing."""
        return cls(**{knob.name: knob.neutral for knob in cls.settings() if knob.has_neutral})

    @property
    def is_neutral(self) -> bool:
        """True when all settings that have a neutral value are at it: the model comes back as it was."""
        knobs = [knob for knob in self.settings() if knob.has_neutral]
        return bool(knobs) and all(getattr(self, knob.name) == knob.neutral for knob in knobs)

    @property
    def must_train(self) -> bool:
        """True when these settings train: the technique always does, or some epochs of fine-tuning are asked for."""
        return self.trains or bool(self.values().get("finetune"))

    def values(self) -> dict[str, Any]:
        """Return the settings as a plain dictionary that JSON can hold."""
        return {knob.name: getattr(self, knob.name) for knob in self.settings()}

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.values().items())})"

    def compress(self, model: nn.Module, data: Any = None, watch: Watch | None = None) -> nn.Module:
        """Return a compressed copy of `model` in eval mode.

        `data` is a `Data`, or one example batch where only shapes are needed. `watch` receives each training step
        of a technique that trains; returning False stops it, and the best weights so far are kept.
        """
        raise TypeError(f"{type(self).__name__} does not say how it compresses: define compress(model, data, watch).")

    def recall(self, model: nn.Module) -> nn.Module | None:
        """Return a result shipped for exactly this model and these settings, or None; at neutral, a copy."""
        from workbench.results import recall
        from workbench.surgery import clone

        return clone(model) if self.is_neutral else recall(self, model)

    def control(self) -> Technique | None:
        """Return what trains as long and the same way without a teacher, or None where no teacher takes part."""
        return None

    def within(self, original: nn.Module) -> Technique:
        """Return this technique as a stage of a pipeline that was given `original`: it may learn from it."""
        return self


@dataclass(frozen=True)
class StageReport:
    """What one stage of a pipeline left: its model, what holds of it, and what it broke of earlier stages, in words."""

    stage: Technique
    model: nn.Module
    invariants: Invariants
    broken: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pipeline(Technique):
    """Several techniques, one after the other: each compresses what the one before it returned."""

    family: ClassVar[str] = "combination"
    source: ClassVar[str] = "Han et al., 2016, arXiv:1510.00149"
    stages: tuple[Technique, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(self.stages))
        for stage in self.stages:
            if not isinstance(stage, Technique):
                raise ValueError(f"Pipeline: {stage!r} is not a technique; pass instances such as LowRank(rank=0.5).")

    @property
    def is_neutral(self) -> bool:
        return all(stage.is_neutral for stage in self.stages)

    @property
    def must_train(self) -> bool:
        return any(stage.must_train for stage in self.stages)

    def values(self) -> dict[str, Any]:
        return {"stages": [{"technique": type(s).__name__, **s.values()} for s in self.stages]}

    def __str__(self) -> str:
        return " → ".join(map(str, self.stages)) or "Pipeline()"

    def compress(self, model, data=None, watch=None):
        """Return the model after all stages; an empty pipeline returns an untouched copy."""
        small = copy.deepcopy(model).eval()
        for _, small in self._compressed(model, data, watch):  # noqa: B007
            pass
        return small

    def run(self, model: nn.Module, data: Any = None, watch: Watch | None = None) -> Iterator[StageReport]:
        """Yield a report after each stage: the same models as `compress`, and what each stage broke of earlier ones.

        A stage keeps what those before it made: zeros stay zero, codebooks stay small, layers do not grow again.
        """
        yield from self._reports(model, self._compressed(model, data, watch))

    def recalled(self, model: nn.Module, data: Any = None) -> list[StageReport] | None:
        """Return the reports of `run` without a training, or None.

        Shipped results stand where a stage trains; None where one of them is not shipped.
        """
        pairs = list(self._recalled(model, data))
        return None if any(small is None for _, small in pairs) else list(self._reports(model, pairs))

    def recall(self, model):
        """Return the shipped result of exactly these stages, or None; one stage alone has the result of its own."""
        return self.stages[0].recall(model) if len(self.stages) == 1 else super().recall(model)

    def _reports(self, model: nn.Module, pairs: Iterable[tuple[Technique, nn.Module]]) -> Iterator[StageReport]:
        from workbench.invariants import Invariants, Promises

        before, promises = Invariants.of(model), Promises()
        for stage, small in pairs:
            after = Invariants.of(small)
            broken = promises.broken_by(stage.title(), after)
            promises.add(stage.title(), before, after)
            yield StageReport(stage, small, after, tuple(broken))
            before = after

    def _compressed(self, model, data, watch) -> Iterator[tuple[Technique, nn.Module]]:
        """Yield each stage and the model that it returns."""
        small = model
        for stage in self.stages:
            small = stage.within(model).compress(small, data, watch)
            yield stage, small

    def _recalled(self, model, data) -> Iterator[tuple[Technique, nn.Module | None]]:
        """Do as `_compressed` does with shipped results for stages that train; the first that is missing ends it."""
        small = model
        for i, stage in enumerate(self.stages):
            if stage.must_train and not stage.is_neutral:
                small = Pipeline(self.stages[: i + 1]).recall(model)
            else:
                small = stage.compress(small, data)
            yield stage, small
            if small is None:
                return
