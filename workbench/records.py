"""Results that were measured once and are quoted ever after: sweeps, their Pareto front, and data/records/*.json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.artifact import ledger
from workbench.data import Data
from workbench.paths import shipped
from workbench.profiler import environment, latencies, layer_costs
from workbench.profiler.profile import Progress
from workbench.runtimes import RuntimeFailed, available_runtimes
from workbench.technique import Pipeline, Technique
from workbench.training import Accuracy, evaluate

SMALLER_IS_BETTER = ("size_bytes", "macs", "parameters", "error")  # and every latency


class RecordError(RuntimeError):
    """Records cannot be read or written; the message says which file and what to do."""


@dataclass(frozen=True)
class Record:
    """One compressed model and what was measured of it; `latency` maps a runtime to its figures in milliseconds.

    `correct` of `total` images of `split` are classified right. `versions` and `machine` say what it was measured with.
    """

    model: str
    data: str
    technique: str
    settings: dict[str, Any]
    split: str
    correct: int
    total: int
    size_bytes: int
    fp32_bytes: int
    parameters: int
    macs: int
    seed: int = 0
    latency: dict[str, dict[str, float]] = field(default_factory=dict)
    machine: str = ""
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def accuracy(self) -> Accuracy:
        return Accuracy(self.correct, self.total)

    @property
    def error(self) -> float:
        """The fraction of images that is classified wrong."""
        return 1 - self.accuracy.value

    @property
    def compression(self) -> float:
        """How many times smaller the file is than its numbers in fp32."""
        return self.fp32_bytes / self.size_bytes

    def median_ms(self, runtime: str) -> float:
        """Return the median latency on a runtime; raises KeyError if it was not measured there."""
        return self.latency[runtime]["median_ms"]


def sweep(
    techniques: Iterable[Technique],
    model: nn.Module,
    data: Data,
    split: str = "val",
    latency: bool = False,
    watch: Progress | None = None,
    seed: int = 0,
    threads: int = 1,
) -> list[Record]:
    """Compress `model` by each technique in turn and return one record each, in order.

    With `latency`, all results are timed together, in turns, on every runtime of this machine. `watch(message,
    fraction)` is called before each step. `seed` is set before each technique, so that the same sweep gives the same.
    """
    records = []
    for records in measure_sweep(techniques, model, data, split, latency, watch, seed, threads):  # noqa: B007
        pass
    return records


def measure_sweep(
    techniques: Iterable[Technique],
    model: nn.Module,
    data: Data,
    split: str = "val",
    latency: bool = False,
    watch: Progress | None = None,
    seed: int = 0,
    threads: int = 1,
) -> Iterator[list[Record]]:
    """Measure as `sweep` does, and yield the records so far after each technique, and at the end those with times."""
    techniques, results, records = list(techniques), [], []
    watch = watch or (lambda message, fraction: None)
    for i, technique in enumerate(techniques):
        watch(str(technique), i / max(len(techniques), 1))
        torch.manual_seed(seed)
        results.append(technique.compress(model, data))
        records = [*records, _record(technique, results[-1], model, data, split, seed)]
        yield records
    timed = _timed(results, data, threads, watch) if latency and results else [{} for _ in results]
    watch("done", 1.0)
    yield [replace(record, latency=found) for record, found in zip(records, timed, strict=True)]


def _record(technique: Technique, result: nn.Module, model: nn.Module, data: Data, split: str, seed: int) -> Record:
    accuracy, account, place = evaluate(result, getattr(data, split)), ledger(result), environment()
    return Record(
        model=getattr(model, "architecture", {}).get("name", type(model).__name__),
        data=data.name,
        technique=type(technique).__name__,
        settings=technique.values(),
        split=split,
        correct=accuracy.correct,
        total=accuracy.total,
        size_bytes=account.total_bytes,
        fp32_bytes=account.fp32_bytes,
        parameters=sum(p.numel() for p in result.parameters()),
        macs=sum(cost.macs for cost in layer_costs(result, data.example())),
        seed=seed,
        machine=str(place),
        date=datetime.now(timezone.utc).date().isoformat(),
        versions=dict(place.versions),
    )


def _timed(results: list[nn.Module], data: Data, threads: int, watch: Progress) -> list[dict[str, dict[str, float]]]:
    """Return {runtime: figures} of each result; a runtime that cannot run one of them is left out for it."""
    found: list[dict] = [{} for _ in results]
    for one in available_runtimes():
        watch(f"timing on {one.name}", 0.99)
        prepared = {}
        for i, result in enumerate(results):
            try:
                prepared[i] = one.prepare(result, data.example(), threads)
            except RuntimeFailed:
                continue
        if prepared:
            for i, taken in zip(prepared, latencies(list(prepared.values())), strict=True):
                found[i][one.name] = taken.to_dict()
    return found


def pareto(records: Sequence[Record], x: str = "size_bytes", y: str = "accuracy") -> list[Record]:
    """Return the records that none beats in both `x` and `y`, sorted by `x`.

    `x`, `y`: names of a Record's figures; "latency:openvino" is the median there. Accuracy is better when larger, the
    others when smaller. Of equal points the first stays. Raises ValueError for a name that is no figure.
    """
    front, reached = [], float("inf")
    for record in sorted(records, key=lambda one: (_cost(one, x), _cost(one, y))):
        if _cost(record, y) < reached:
            reached = _cost(record, y)
            front.append(record)
    return front


def _cost(record: Record, name: str) -> float:
    """Return a figure such that less of it is better."""
    kind, _, runtime = name.partition(":")
    if kind == "latency" and runtime in record.latency:
        return record.median_ms(runtime)
    if name in ("accuracy", "compression"):
        return -float(record.accuracy.value if name == "accuracy" else record.compression)
    if name in SMALLER_IS_BETTER:
        return getattr(record, name)
    figures = ", ".join(["accuracy", "compression", *SMALLER_IS_BETTER, *(f"latency:{r}" for r in record.latency)])
    raise ValueError(f"{name!r} is not a figure of this record; choose one of {figures}.")


def write_records(name: str, records: Iterable[Record], folder: str | os.PathLike | None = None) -> Path:
    """Write records to `folder`/NAME.json, sorted keys, one line a record, and return the path.

    The file is replaced in one step, so that a full disk leaves the old one; raises RecordError if it cannot be.
    """
    path = _path(name, folder)
    lines = [json.dumps(asdict(record), ensure_ascii=False, sort_keys=True) for record in records]
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise RecordError(
            f"The records cannot be written to {path} ({error.strerror}); choose another folder."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def read_records(name: str, folder: str | os.PathLike | None = None) -> list[Record]:
    """Read the records NAME.json of `folder`, or those that the package ships; raises RecordError with the reason."""
    path = _path(name, folder)
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [Record(**row) for row in rows]
    except FileNotFoundError:
        here = ", ".join(record_names(folder)) or "none yet"
        raise RecordError(
            f"There are no records called {name!r}; there are: {here}. `workbench sweep` makes them."
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise RecordError(
            f"{path.name} does not hold records ({error}); delete it and run `workbench sweep` again."
        ) from error


def record_names(folder: str | os.PathLike | None = None) -> list[str]:
    """Return the names of the records in `folder`, or of those that the package ships."""
    return sorted(path.stem for path in _path("any", folder).parent.glob("*.json"))


def technique_of(name: str, settings: dict[str, Any]) -> Technique:
    """Return the technique that a record names with its settings; those of a pipeline are its stages."""
    from workbench import techniques

    if name == "Pipeline":
        return Pipeline([technique_of(stage["technique"], _without_name(stage)) for stage in settings["stages"]])
    return getattr(techniques, name)(**settings)


def _without_name(stage: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stage.items() if name != "technique"}


def find(records: Iterable[Record], technique: str | None = None, **settings) -> Record:
    """Return the one record of a technique with these settings, for a text that quotes it.

    `find(read_records("low_rank"), rank=0.25).accuracy`. Raises KeyError when there is none, or more than one.
    """
    wanted = [r for r in records if technique in (None, r.technique) and settings.items() <= _flat(r.settings)]
    if len(wanted) != 1:
        raise KeyError(f"{len(wanted)} records match {technique or 'any technique'} with {settings}; exactly one must.")
    return wanted[0]


def _flat(settings: dict[str, Any]):
    return {name: value for name, value in settings.items() if not isinstance(value, (list, dict))}.items()


def _path(name: str, folder: str | os.PathLike | None) -> Path:
    if not name or Path(name).name != name:
        raise ValueError(f"{name!r} is not a name for records; use letters, digits, - and _.")
    return (Path(folder) if folder is not None else shipped("data", "records")) / f"{name}.json"
