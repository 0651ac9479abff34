"""Measure all that a report tells about a model: its profile, and as many of the further sections as were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from workbench.profiler import (
    Energy,
    Memory,
    Profile,
    ScenarioResult,
    SoftwareRow,
    SweepPoint,
    energy,
    memory,
    profile,
    scenarios,
    software_first,
    sweep_batches,
)
from workbench.profiler.layers import LayerTimes, layer_times
from workbench.profiler.maps import WinLoseMap, integer_map, low_rank_map, sparse_map, width_map
from workbench.profiler.roofline import Roofline, roofline
from workbench.profiler.scenarios import repeated
from workbench.profiler.units import finite
from workbench.profiler.verdicts import Verdict, verdicts
from workbench.reports.words import text
from workbench.runtimes import ModelFile, Runtime, RuntimeFailed, runtime
from workbench.runtimes.base import cause
from workbench.runtimes.layers import SHOW_LAYERS
from workbench.subjects import Subject

Progress = Callable[[str, float], Any]
SECTIONS = ("layers", "roofline", "verdicts", "scenarios", "sweep", "software", "memory", "maps")
NEEDS = {"roofline": ("layers",)}  # the layers are its points
STOPPED = "it was stopped before all of it was measured"
PROFILE_PART = 0.3  # of the progress bar, where further sections follow


@dataclass(frozen=True, eq=False)
class Report:
    """Everything measured of one model. A section that was not asked for is empty; `missing` says why one is not there.

    The further sections were measured on `runtime`; those that compare also hold the baseline. `when` is in UTC.
    """

    name: str
    baseline_name: str
    profile: Profile
    runtime: str
    when: str
    layers: LayerTimes | None = None
    baseline_layers: LayerTimes | None = None
    roofline: Roofline | None = None
    verdicts: tuple[Verdict, ...] = ()
    scenarios: dict[str, ScenarioResult] = field(default_factory=dict)
    sweep: tuple[SweepPoint, ...] = ()
    software: tuple[SoftwareRow, ...] = ()
    memory: dict[str, Memory] = field(default_factory=dict)
    energy: Energy | str = ""
    maps: tuple[WinLoseMap, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Return everything as JSON can hold it: the profile's own keys, and one for each further section."""
        figures = {
            "name": self.name,
            "baseline_name": self.baseline_name,
            "when": self.when,
            "runtime": self.runtime,
            **self.profile.to_dict(),
            "layers": _plain(self.layers),
            "baseline_layers": _plain(self.baseline_layers),
            "roofline": _plain(self.roofline),
            "verdicts": [_plain(one) for one in self.verdicts],
            "scenarios": {name: _plain(one) for name, one in self.scenarios.items()},
            "sweep": [{"batch": p.batch, "threads": p.threads, **p.latency.to_dict()} for p in self.sweep],
            "software": [_plain(row) for row in self.software],
            "memory": {name: _plain(one) for name, one in self.memory.items()},
            "energy": _plain(self.energy),
            "maps": [_plain(one) for one in self.maps],
            "missing": dict(self.missing),
        }
        return finite(figures)

    def __str__(self) -> str:
        return text(self)


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else value or None


def investigate(
    subject: Subject,
    baseline: Subject | None = None,
    sections: Sequence[str] = SECTIONS,
    watch: Progress | None = None,
    seconds: float = 2.0,
    **how,
) -> Report:
    """Profile the subject beside its baseline, and measure the sections named; `how` goes to `profile`.

    `seconds`: how long each scenario runs. A section that cannot be measured is missing from the report, with its
    reason; so is one that Ctrl-C stopped, and those after it: all of them where it stopped the profile. Raises what
    `profile` raises, and ValueError for a section that there is not.
    """
    wanted = _wanted(sections)
    watch = watch or (lambda message, fraction: None)
    part = PROFILE_PART if wanted else 1.0
    other = baseline.model if baseline else None
    found = profile(subject.model, subject.images, other, watch=lambda m, f: watch(m, part * f), **how)
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    report = Report(subject.name, baseline.name if baseline else "", found, _runtime(found, how), when)
    if found.stopped:
        return replace(report, missing=dict.fromkeys(wanted, STOPPED))
    case = _Case(subject, baseline, report.runtime, how.get("batch", 1), how.get("threads", 1), seconds)
    for i, section in enumerate(wanted):
        start, size = part + (1 - part) * i / len(wanted), (1 - part) / len(wanted)
        try:
            for message, changes in MEASURE[section](case, report):
                report = replace(report, **changes)
                watch(message, start + size / 2)
        except Exception as error:  # whatever a strange model breaks there, the other sections stand
            why = str(error) if isinstance(error, RuntimeFailed | ValueError) else cause(error)
            report = replace(report, missing={**report.missing, section: why})
        except KeyboardInterrupt:  # what was measured so far is not lost
            report = replace(report, missing={**report.missing, **dict.fromkeys(wanted[i:], STOPPED)})
            break
    watch("done", 1.0)
    return report


def _wanted(sections: Sequence[str]) -> list[str]:
    """Return the sections asked for and those that they rest on, in the order of SECTIONS."""
    strange = [section for section in sections if section not in SECTIONS]
    if strange:
        raise ValueError(f"There is no section {strange[0]!r}; choose from {', '.join(SECTIONS)}.")
    asked = {*sections, *(need for section in sections for need in NEEDS.get(section, ()))}
    return [section for section in SECTIONS if section in asked]


def _runtime(found: Profile, how: dict) -> str:
    """Return the runtime of the further sections: the first one named, else the first here that shows its layers."""
    ran = [run.runtime for run in found.runs]
    named = [one if isinstance(one, str) else one.name for one in how.get("runtimes") or ()]
    return next((one for one in [*named, *SHOW_LAYERS] if one in ran), ran[0])


@dataclass(frozen=True)
class _Case:
    """What the sections are measured on."""

    subject: Subject
    baseline: Subject | None
    runtime: str
    batch: int
    threads: int
    seconds: float

    @property
    def way(self) -> Runtime:
        return runtime(self.runtime)

    @property
    def example(self):
        return repeated(self.subject.example, self.batch)

    @property
    def models(self) -> dict[str, Any]:
        """The models by their role, the baseline first."""
        both = {"baseline": self.baseline.model} if self.baseline else {}
        return {**both, "now": self.subject.model}

    @property
    def has_files(self) -> bool:
        """True where one of the models is in a file of another program, and torch does not run it."""
        return any(isinstance(model, ModelFile) for model in self.models.values())


# --- the sections: each yields (what it is doing, what changes in the report) ---------------------------------------

Changes = Iterator[tuple[str, dict[str, Any]]]


def _layers(case: _Case, report: Report) -> Changes:
    yield "timing each layer", {}
    for role, model in case.models.items():
        way = case.way if role == "now" else case.way.for_baseline()
        times = layer_times(model, case.example, way.name, case.threads)
        yield "timing each layer", {"layers" if role == "now" else "baseline_layers": times}


def _roofline(case: _Case, report: Report) -> Changes:
    yield "measuring this machine's roofs, once", {}
    yield "roofs", {"roofline": roofline(case.threads, case.way.device)}


def _verdicts(case: _Case, report: Report) -> Changes:
    yield "asking why it isn't faster", {}
    other = case.baseline.model if case.baseline and not case.has_files else None
    found = verdicts(case.subject.model, case.example, other, case.runtime, case.threads, report.layers)
    yield "verdicts", {"verdicts": tuple(found)}


def _scenarios(case: _Case, report: Report) -> Changes:
    yield "preparing scenarios", {}
    for found in scenarios(case.subject.model, case.example, case.runtime, case.threads, case.seconds):
        yield f"scenario {list(found)[-1]}", {"scenarios": found}


def _sweep(case: _Case, report: Report) -> Changes:
    yield "preparing batches", {}
    cores = report.profile.environment.cores
    counts = sorted({1, case.threads, cores}) if case.way.device == "cpu" else [case.threads]
    example_of = lambda batch: repeated(case.subject.example, batch)
    for points in sweep_batches(case.subject.model, example_of, case.runtime, threads=counts, budget_s=10.0):
        yield "sweeping batch and threads", {"sweep": tuple(points)}


def _software(case: _Case, report: Report) -> Changes:
    model = next(iter(case.models.values()))  # the uncompressed one, where there are two
    yield "trying software alone", {}
    for rows in software_first(model, case.example, case.threads, device=case.way.device):
        yield "trying software alone", {"software": tuple(rows)}


def _memory(case: _Case, report: Report) -> Changes:
    yield "weighing memory", {}
    if not case.has_files:  # what torch's allocator tells
        ways = {role: case.way if role == "now" else case.way.for_baseline() for role in case.models}
        on = {role: way.name if way.device == "cuda" else "eager" for role, way in ways.items()}
        found = {role: memory(model, case.example, on[role]) for role, model in case.models.items()}
        yield "reading energy counters", {"memory": found}
    prepared = runtime(case.runtime).prepare(case.subject.model, case.example, case.threads)
    yield "energy", {"energy": energy(prepared, case.seconds)}


def _maps(case: _Case, report: Report) -> Changes:
    done: tuple[WinLoseMap, ...] = ()
    for draw in (sparse_map, low_rank_map, integer_map, width_map):
        for found in draw(threads=case.threads):
            yield f"map, {found.title}", {"maps": (*done, found)}
        done = (*done, found)


MEASURE: dict[str, Callable[[_Case, Report], Changes]] = {
    "layers": _layers,
    "roofline": _roofline,
    "verdicts": _verdicts,
    "scenarios": _scenarios,
    "sweep": _sweep,
    "software": _software,
    "memory": _memory,
    "maps": _maps,
}
