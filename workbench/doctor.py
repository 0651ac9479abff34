"""Examine a model: which layers each technique reaches, skips and couples, and whether it traces, saves, exports, runs.

    print(doctor(model, torch.zeros(1, 3, 224, 224)))

Everything is tried on copies, each technique with its default settings.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench.artifact import decode, encode
from workbench.export import export_onnx, export_openvino
from workbench.runtimes import RUNTIMES
from workbench.runtimes.base import outputs
from workbench.surgery import ChannelTrace, clone, trace_channels, weighted_layers
from workbench.technique import Technique
from workbench.techniques import TECHNIQUES, ChannelPruning

WORKS, NEEDS_DATA, REFUSED, FAILED, ABSENT = "works", "needs data", "refused", "failed", "not here"


@dataclass(frozen=True)
class Check:
    """One question and its answer. `status`: "works", "failed", or "not here" for what is not installed."""

    name: str
    status: str
    detail: str = ""


@dataclass(frozen=True)
class Reach:
    """What one technique does to the model.

    `status`: "works"; "needs data", and so was not tried; "refused", with the technique's own sentence; "failed".
    `reached`: the layers that change. `skipped`: the others, each with the reason. `size_bytes`: of the file, or 0.
    """

    technique: str
    status: str
    detail: str = ""
    reached: tuple[str, ...] = ()
    skipped: dict[str, str] | None = None
    size_bytes: int = 0


@dataclass(frozen=True)
class Diagnosis:
    """All that `doctor` found out; print it, or take `to_dict()`."""

    model: str
    parameters: int
    layers: tuple[str, ...]
    checks: tuple[Check, ...]
    coupled: tuple[tuple[str, ...], ...]
    techniques: tuple[Reach, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain lists and dictionaries, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def doctor(
    model: nn.Module,
    example: Tensor,
    data: Any = None,
    techniques: Iterable[type[Technique]] = TECHNIQUES,
    watch: Callable[[str, float], Any] | None = None,
) -> Diagnosis:
    """Try everything on copies of `model` and say what works.

    `example`: one batch of inputs. `data`: a `Data` for techniques that train; without one they are not tried. `watch`
    is called with what is being tried and the part done. Raises ValueError if the model has no linear or convolution
    layer, and RuntimeFailed if it does not run on the example.
    """
    model, techniques = clone(model), tuple(techniques)
    layers = weighted_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear or convolution layer, so there is nothing to compress.")
    called = _called(model, example)
    trace, checks = _traced(model, example)
    checks += [*_kept(model), *_exported(model, example), *_run(model, example)]
    found = []
    for number, technique in enumerate(techniques):
        if watch is not None:
            watch(technique.title(), number / len(techniques))
        found.append(_reach(technique, model, example, data, trace, called))
    count = sum(p.numel() for p in model.parameters())
    coupled = tuple(group.layers for group in trace.groups if len(group.layers) > 1) if trace else ()
    names = tuple(name for name, _ in layers)
    return Diagnosis(type(model).__name__, count, names, tuple(checks), coupled, tuple(found))


# --- the model as it is ---------------------------------------------------------------------------------------------


def _called(model: nn.Module, example: Tensor) -> set[str]:
    """Return the names of the layers whose forward runs on the example."""
    called = set()
    hooks = [
        layer.register_forward_pre_hook(lambda _layer, _args, name=name: called.add(name))
        for name, layer in weighted_layers(model)
    ]
    try:
        outputs(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _traced(model: nn.Module, example: Tensor) -> tuple[ChannelTrace | None, list[Check]]:
    try:
        trace = trace_channels(model, example)
    except ValueError as error:
        return None, [Check("tracing", FAILED, _sentence(error))]
    return trace, [Check("tracing", WORKS, f"{len(trace.groups)} groups of channels can be removed")]


def _kept(model: nn.Module) -> list[Check]:
    """Save the model and load it again, from its file alone if that is possible."""
    try:
        data = encode(model)
    except Exception as error:
        return [Check("saving", FAILED, _sentence(error))]
    try:
        decode(data)
        loading = Check("loading", WORKS, "from the file alone")
    except ValueError:
        loading = _loaded(model, data)
    return [Check("saving", WORKS, f"{len(data):,} bytes"), loading]


def _loaded(model: nn.Module, data: bytes) -> Check:
    try:
        decode(data, like=model)
    except Exception as error:
        return Check("loading", FAILED, _sentence(error))
    return Check("loading", WORKS, f"with like={type(model).__name__}(), since the class is your own")


def _exported(model: nn.Module, example: Tensor) -> list[Check]:
    checks = []
    for name, export, file in (("ONNX", export_onnx, "m.onnx"), ("OpenVINO IR", export_openvino, "m.xml")):
        with tempfile.TemporaryDirectory() as folder:
            try:
                written = export(model, Path(folder) / file, example)
                checks.append(Check(f"export to {name}", WORKS, f"{written.size_bytes:,} bytes"))
            except Exception as error:
                status = ABSENT if "not installed" in str(error) else FAILED
                checks.append(Check(f"export to {name}", status, _sentence(error)))
    return checks


def _run(model: nn.Module, example: Tensor) -> list[Check]:
    checks = []
    for one in RUNTIMES:
        here, why_not = one.available()
        if not here:
            checks.append(Check(f"runtime {one.name}", ABSENT, why_not))
            continue
        try:
            prepared = one.prepare(model, example)
            checks.append(Check(f"runtime {one.name}", WORKS, f"computes in {prepared.precision}"))
        except Exception as error:
            status = FAILED if one.for_baseline() is one else ABSENT  # the latter takes compressed models only
            checks.append(Check(f"runtime {one.name}", status, _sentence(error)))
    return checks


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


# --- each technique -------------------------------------------------------------------------------------------------


def _reach(technique, model, example, data, trace, called) -> Reach:
    name = technique.__name__
    if technique.trains and data is None:
        return Reach(name, NEEDS_DATA, "it trains")
    try:
        small = technique().compress(model, example if data is None else data, _once)
    except ValueError as error:
        return Reach(name, REFUSED, _sentence(error))
    except Exception as error:
        return Reach(name, FAILED, f"{type(error).__name__}: {_sentence(error)}")
    layers = dict(weighted_layers(model))
    reached = tuple(layer for layer in layers if _changed(layers[layer], small, layer))
    reasons = trace.skipped if technique is ChannelPruning and trace else {}
    skipped = {layer: reasons.get(layer) or _reason(model, layer, called) for layer in layers if layer not in reached}
    try:
        size = _sound(small, model, example)
    except Exception as error:
        return Reach(name, FAILED, f"{type(error).__name__}: {_sentence(error)}", reached, skipped)
    return Reach(name, WORKS, "", reached, skipped, size)


def _once(step: Any) -> bool:
    """Stop a training after its first step: here it matters that it runs, not how far it comes."""
    return False


def _changed(before: nn.Module, model: nn.Module, name: str) -> bool:
    """Return whether the layer called `name` is another one now, or holds another weight."""
    after = _find(model, name)
    if after is None or parametrize.is_parametrized(after) != parametrize.is_parametrized(before):
        return True
    if hasattr(after, "input_quantizer") != hasattr(before, "input_quantizer") or type(after) is not type(before):
        return True
    return before.weight.shape != after.weight.shape or not torch.equal(before.weight, after.weight)


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _reason(model: nn.Module, name: str, called: set[str]) -> str:
    """Say why a technique may have left this layer: what is particular about it."""
    layer = model.get_submodule(name)
    uses = Counter(id(p) for each in model.modules() for p in each._parameters.values() if p is not None)
    if any(uses[id(p)] > 1 for p in layer._parameters.values() if p is not None):
        return "it shares its weight with another layer"
    if name not in called:
        return "it is not called: the code around it reads its weight, or never uses it"
    if getattr(layer, "groups", 1) > 1:
        return "it is a grouped convolution"
    return "this technique changes layers of another kind, or it would not become smaller"


def _sound(small: nn.Module, model: nn.Module, example: Tensor) -> int:
    """Run, save, load and compare; return the bytes of the file, or raise with what is wrong."""
    answers = outputs(small, example)
    if not torch.isfinite(answers).all():
        raise ValueError("the compressed model's outputs are not finite")
    data = encode(small)
    again = outputs(decode(data, like=model), example)
    if not torch.equal(again, answers):
        raise ValueError("the model that was saved and loaded answers differently")
    return len(data)


# --- in words -------------------------------------------------------------------------------------------------------


def _lines(found: Diagnosis) -> list[str]:
    lines = [f"{found.model}: {found.parameters:,} parameters, {len(found.layers)} linear and convolution layers", ""]
    width = max(len(check.name) for check in found.checks)
    lines += [f"{check.name:<{width}}  {check.status:<8}  {check.detail}".rstrip() for check in found.checks]
    lines += ["", "Channels that can only be removed together:" if found.coupled else "No layers are coupled."]
    lines += [f"  {', '.join(group)}" for group in found.coupled]
    lines += ["", f"{'technique':<26}  {'':<10}  {'layers':>9}  {'bytes':>12}"]
    for each in found.techniques:
        lines += _technique_lines(each, len(found.layers))
    return lines


def _technique_lines(reach: Reach, layers: int) -> list[str]:
    tried = reach.skipped is not None
    count = f"{len(reach.reached)} of {layers}" if tried else ""
    size = f"{reach.size_bytes:,}" if reach.size_bytes else ""
    lines = [f"{reach.technique:<26}  {reach.status:<10}  {count:>9}  {size:>12}".rstrip()]
    if reach.status == NEEDS_DATA:
        return [f"{lines[0]}: {reach.detail}"]
    if reach.detail:
        lines.append(f"    {reach.detail}")
    by_reason: dict[str, list[str]] = {}
    for layer, reason in (reach.skipped or {}).items():
        by_reason.setdefault(reason, []).append(layer)
    return lines + [f"    leaves {_listed(names)}: {reason}" for reason, names in by_reason.items()]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
