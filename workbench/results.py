"""Results that took a training and are shipped: found again by technique, settings and the model's own numbers.

A result is the artifact that `workbench.artifact.save` writes; its name says model, technique and a key made of all
that decides the result, so that a change of any of them finds nothing rather than something else.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from workbench.artifact import load, save
from workbench.models import fingerprint
from workbench.paths import shipped
from workbench.surgery import remembered

Technique = Any  # a Technique, which stands below this module and calls it


def result_key(technique: Technique, model: nn.Module) -> str:
    """Return twelve hexadecimal digits that differ when technique, settings or the model's numbers do."""
    mark = remembered(model, "fingerprint", lambda: fingerprint(model))
    told = [type(technique).__name__, technique.values(), mark, *_passed_models(technique)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _passed_models(technique: Technique) -> list[str]:
    """Return the fingerprints of models that a caller passed to the technique or its stages: a teacher, a student."""
    inner = [mark for stage in getattr(technique, "stages", ()) for mark in _passed_models(stage)]
    return inner + [fingerprint(value) for value in vars(technique).values() if isinstance(value, nn.Module)]


def result_path(technique: Technique, model: nn.Module, folder: Path | None = None) -> Path:
    """Return where the result of a technique on a model lies, or would lie, in `folder` (default: data/results)."""
    name = getattr(model, "architecture", None) or {"name": type(model).__name__}
    kind = type(technique).__name__
    return (folder or shipped("data", "results")) / f"{name['name']}-{kind}-{result_key(technique, model)}.wb"


def recall(technique: Technique, model: nn.Module, folder: Path | None = None) -> nn.Module | None:
    """Return the shipped result of exactly this technique on exactly this model, in eval mode, or None."""
    path = result_path(technique, model, folder)
    return load(path) if path.is_file() else None


def keep(technique: Technique, model: nn.Module, result: nn.Module, folder: Path | None = None) -> Path:
    """Write the result of a technique on a model where `recall` finds it, and return the path."""
    path = result_path(technique, model, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(result, path)
    return path
