"""Profiles as files, and two of them side by side: another machine, another day, another model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from workbench.profiler.report import Profile
from workbench.profiler.timing import NOISY_FLOOR
from workbench.profiler.units import counted, listed, times
from workbench.runtimes.cuda import FLUSHED

FORMAT, VERSION = "workbench profile", 1
PARTS = ("model", "runtimes", "environment", "failed")  # of a saved profile
MODEL = {"parameters": "parameters", "macs": "multiply-adds an image", "size_bytes": "bytes of the file"}
MACHINE = {
    "processor": "processor",
    "features": "instruction sets",
    "cores": "cores of the process",
    "virtual_machine": "virtual machine",
    "governor": "frequency governor",
    "gpu": "GPU",
    "platform": "platform",
    "torch_threads": "torch threads by default",
}
BUSY = 0.5  # processes more than the measuring threads, on average: enough to be seen in the figures


@dataclass(frozen=True)
class ComparedRuntime:
    """One runtime in two profiles. A side without it has None; `versus` says how the second compares with the first.

    `ratio` is times faster in the second profile, below 1 slower. It is claimed, `distinguishable`, only where the
    middle halves of the times, p25 to p75, lie apart and the medians differ by more than a tenth: the two were not
    timed in turns, so nothing tells a machine's mood from a real difference that is smaller.
    """

    runtime: str
    precisions: tuple[str | None, str | None]
    medians_ms: tuple[float | None, float | None]
    quartiles_ms: tuple[tuple[float, float] | None, tuple[float, float] | None]
    images_per_second: tuple[float | None, float | None]
    ratio: float | None
    distinguishable: bool
    versus: str


@dataclass(frozen=True)
class Comparison:
    """Two profiles side by side: their runtimes, what differs between the machines, and what to know before reading."""

    names: tuple[str, str]
    rows: tuple[ComparedRuntime, ...]
    differences: tuple[tuple[str, str, str], ...]  # (what, in the first, in the second)
    notes: tuple[str, ...]

    def to_dict(self) -> dict:
        """Return it as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        first, second = self.names
        lines = [f"{'runtime':<21}{'first':>12}{'second':>12}  second versus first", *map(_line, self.rows)]
        apart = [f"{what}: {a} | {b}" for what, a, b in self.differences] or ["The machines and libraries are alike."]
        return "\n".join([f"first: {first}", f"second: {second}", "", *lines, "", *apart, *self.notes])


def save_profile(profile: Profile, path: str | os.PathLike, **sections: Any) -> Path:
    """Write a profile as JSON, whole or not at all, and return the path; `sections` are kept in it by their names."""
    return _replaced(Path(path), json.dumps(profile_record(profile, **sections), indent=1) + "\n")


def profile_record(profile: Profile, **sections: Any) -> dict[str, Any]:
    """Return a profile as it is saved, with the time of saving; `sections` are kept in it by their names."""
    stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"format": FORMAT, "version": VERSION, "saved": stamp, **profile.to_dict(), **sections}


def write_profiles(path: str | os.PathLike, records: Iterable[dict[str, Any]]) -> Path:
    """Write several `profile_record`s, one a line, whole or not at all, and return the path."""
    return _replaced(Path(path), "".join(json.dumps(record) + "\n" for record in records))


def read_profiles(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return what `write_profiles` wrote, or [] where there is no such file; raises ValueError for another file."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    return [_checked(line, f"line {number} of {path}", path) for number, line in enumerate(lines, 1)]


def _replaced(path: Path, text: str) -> Path:
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # there only where it could not be put in place
    return path


def load_profile(path: str | os.PathLike) -> dict[str, Any]:
    """Read a profile that `save_profile` wrote; raises ValueError saying what is wrong with the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        text = ""
    return _checked(text, str(path), path)


def _checked(text: str, where: str, path: str | os.PathLike) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{where} is not a saved profile; `workbench profile MODEL --json {path}` writes one.")
    if found.get("version") != VERSION:
        raise ValueError(f"{where} is of version {found.get('version')}, this program reads {VERSION}; profile again.")
    missing = [part for part in PARTS if found.get(part, []) == []]
    if missing:
        raise ValueError(f"{where} is not a whole profile, it has no {listed(missing)}; profile again.")
    return found


def compare_profiles(
    first: dict[str, Any], second: dict[str, Any], names: tuple[str, str] = ("first", "second")
) -> Comparison:
    """Put two loaded profiles side by side; `names` are what the reader calls them, such as the names of the files."""
    sides = [{row["runtime"]: row for row in found["runtimes"]} for found in (first, second)]
    runtimes = list(dict.fromkeys([*sides[0], *sides[1]]))
    return Comparison(
        names=names,
        rows=tuple(_compared(name, [side.get(name) for side in sides], (first, second)) for name in runtimes),
        differences=tuple(_differences(first["environment"], second["environment"])),
        notes=tuple(_notes(first, second, names)),
    )


def _compared(runtime: str, rows: list[dict | None], profiles: tuple[dict, dict]) -> ComparedRuntime:
    take = lambda key: tuple(row and row[key] for row in rows)
    quartiles = tuple(row and (row["p25_ms"], row["p75_ms"]) for row in rows)
    ratio = rows[0]["median_ms"] / rows[1]["median_ms"] if all(rows) else None
    apart = ratio is not None and _apart(ratio, *quartiles)
    if ratio is None:
        absent = 0 if rows[0] is None else 1
        why = profiles[absent]["failed"].get(runtime, "it was not asked for")
        versus = f"not in the {('first', 'second')[absent]}: {why}"
    else:
        versus = _words(ratio) if apart else "not distinguishable"
    precisions, medians, rates = (take(key) for key in ("precision", "median_ms", "images_per_second"))
    return ComparedRuntime(runtime, precisions, medians, quartiles, rates, ratio, apart, versus)


def _apart(ratio: float, first: tuple[float, float], second: tuple[float, float]) -> bool:
    return abs(math.log(ratio)) > math.log(1 + NOISY_FLOOR) and (first[1] < second[0] or second[1] < first[0])


def _words(ratio: float) -> str:
    return f"{times(ratio)} faster" if ratio > 1 else f"{times(1 / ratio)} slower"


def _differences(first: dict, second: dict) -> Iterator[tuple[str, str, str]]:
    for key, title in MACHINE.items():
        if first.get(key) != second.get(key):
            yield title, _told(first.get(key)), _told(second.get(key))
    for library in sorted({*first["versions"], *second["versions"]}):
        versions = [place["versions"].get(library) for place in (first, second)]
        if versions[0] != versions[1]:
            yield library, *(version or "not installed" for version in versions)


def _told(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(value) or "none known"
    return str(value) if value not in (None, "") else "none told"


def _notes(first: dict, second: dict, names: tuple[str, str]) -> Iterator[str]:
    changed = next((key for key in MODEL if first["model"][key] != second["model"][key]), None)
    if changed:
        counts = " and ".join(f"{found['model'][changed]:,}" for found in (first, second))
        yield f"These are not the same model: {counts} {MODEL[changed]}."
    hows = [_how(found["runtimes"]) for found in (first, second)]
    if hows[0] != hows[1]:
        yield f"They were not timed alike: {hows[0]}, and {hows[1]}."
    for name, found in zip(names, (first, second), strict=True):
        yield from _unrest(name, found["runtimes"], found["environment"])
        if found.get("stopped"):
            yield f"The profile of {name} was stopped early and rests on fewer calls."


def _how(rows: list[dict]) -> str:
    """Say in words how the single calls were timed: all rows of a profile alike, but for a cache that a GPU has."""
    flushed = ", a GPU's cache flushed before each" if any(FLUSHED in row.get("note", "") for row in rows) else ""
    return f"{counted(rows[0]['batch'], 'image')} a call on {counted(rows[0]['threads'], 'thread')}{flushed}"


def _unrest(name: str, rows: list[dict], place: dict) -> Iterator[str]:
    noisy = [row["runtime"] for row in rows if row["noisy"]]
    if noisy:
        yield f"In {name} the machine was not quiet while it was measured, on {listed(noisy)}."
    if (place.get("load") or 0) > rows[0]["threads"] + BUSY:
        yield f"In {name} the machine had other work: {place['load']:.1f} processes on average, {place['cores']} cores."


def _line(row: ComparedRuntime) -> str:
    medians = "".join(f"{'—' if value is None else f'{value:.3f} ms':>12}" for value in row.medians_ms)
    same = row.precisions[0] == row.precisions[1] or None in row.precisions
    note = "" if same else f" (computes in {row.precisions[0]} | {row.precisions[1]})"
    return f"{row.runtime:<21}{medians}  {row.versus}{note}"
