"""A profile in plain sentences: what changed, by how much, and why a smaller model is sometimes not a quicker one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from workbench.profiler.units import listed, size, times
from workbench.profiler.verdicts import MANY_ZEROS

if TYPE_CHECKING:
    from workbench.profiler.report import Profile, Run

SPLITS = {"train": "training", "val": "validation", "test": "test"}


def sentences(profile: Profile) -> list[str]:
    """Return the sentences about size, accuracy, each runtime, memory, and what did not help."""
    return [
        *_about_size(profile),
        *_about_accuracy(profile),
        *(sentence for run in profile.runs for sentence in _about_run(profile, run)),
        *_about_memory(profile),
        *_why_not(profile),
        *_about_failed(profile),
        *_about_stopped(profile),
    ]


def _about_size(profile: Profile) -> Iterator[str]:
    model, baseline = profile.model, profile.baseline
    if baseline is None:
        yield f"The file takes {size(model.size_bytes)}; its numbers in fp32 would take {size(model.fp32_bytes)}."
        return
    factor = baseline.size_bytes / model.size_bytes
    change = f"{times(factor)} smaller" if factor >= 1 else f"{times(1 / factor)} larger"
    yield f"The file takes {size(model.size_bytes)}, {change} than the baseline's {size(baseline.size_bytes)}."
    yield (
        f"{model.parameters:,} parameters of {baseline.parameters:,}, and {model.macs:,} multiply-adds an image of "
        f"{baseline.macs:,}, counted in linear and convolution layers."
    )


def _about_accuracy(profile: Profile) -> Iterator[str]:
    if not profile.model.finite:
        yield "The model's outputs are not finite (NaN or infinity), so its accuracy means nothing; check its weights."
    if profile.model.accuracy is None:
        return
    images = f"{SPLITS.get(profile.split, profile.split)} accuracy"
    difference = profile.accuracy_difference
    versus = ""
    if difference is not None:
        found = str(difference) if difference.distinguishable else "a difference that is not distinguishable"
        versus = f"; the baseline has {profile.baseline.accuracy.percent:.1f} %, {found}"
    yield f"{images.capitalize()} is {profile.model.accuracy}{versus}."


def _about_run(profile: Profile, run: Run) -> Iterator[str]:
    noisy = " The machine was not quiet meanwhile, so take these times with care." if run.latency.noisy else ""
    text = f"{run.runtime} computes in {run.latency.precision} and takes {run.latency}"
    if run.ratio is not None:
        there = "there" if run.baseline.runtime == run.runtime else f"on {run.baseline.runtime}"
        text += f", {_against(run.ratio, f'the baseline {there}')}"
        best = profile.best_fp32(run.device)
        if best is not None and best.runtime != run.runtime:
            rival = f"the baseline on {best.runtime}, its best fp32 runtime"
            text += f", and {_against(profile.ratio_to_best(run), rival)}"
    yield f"{text}.{noisy}"
    if run.device == "cuda" and run.note:
        yield f"On {run.runtime} {run.note}."
    yield from _about_outputs(profile, run)


def _about_outputs(profile: Profile, run: Run) -> Iterator[str]:
    """Say where a runtime answers otherwise than torch does; where torch's own outputs are broken, that was said."""
    if run.difference is None or run.difference <= 0.05 or not profile.model.finite:
        return
    if math.isfinite(run.difference):
        yield f"{run.runtime} gives outputs up to {100 * run.difference:.0f} % of the largest one away from torch's."
    else:
        yield f"{run.runtime} gives outputs that are not finite (NaN or infinity) where torch's are: useless here."


def _about_failed(profile: Profile) -> Iterator[str]:
    """Say why runtimes did not run, those that lack the same thing in one sentence."""
    names: dict[str, list[str]] = {}
    for name, why_not in profile.failed.items():
        names.setdefault(why_not.removeprefix(f"{name}: "), []).append(name)
    for why_not, same in names.items():
        said = profile.failed[same[0]]
        yield f"{listed(same)}: {why_not}" if said != why_not else said


def _about_stopped(profile: Profile) -> Iterator[str]:
    if profile.stopped:
        yield "Stopped early: the times are of the calls made until then, and what was to be measured next is not here."


def _against(ratio, rival: str) -> str:
    return f"{ratio} than {rival}" if ratio.distinguishable else f"not distinguishable from {rival}"


def _about_memory(profile: Profile) -> Iterator[str]:
    own = profile.model.peak_activation_bytes
    other = profile.baseline.peak_activation_bytes if profile.baseline else None
    if own is None:
        return
    versus = f", the baseline's {size(other)}" if other is not None else ""
    yield f"Activations take at most {size(own)} at a time in torch eager, by its allocator{versus}."


def _why_not(profile: Profile) -> Iterator[str]:
    """Explain smaller models that are not quicker; only from what was measured, never from what one would expect."""
    if profile.baseline is None:
        return
    yield from _zeros(profile)
    yield from _simulated(profile)
    yield from _fewer_operations(profile)


def _zeros(profile: Profile) -> Iterator[str]:
    zeros = profile.model.sparsity
    if zeros - profile.baseline.sparsity < MANY_ZEROS or profile.model.macs < 0.95 * profile.baseline.macs:
        return
    same = [run.runtime for run in profile.runs if run.latency.precision == "fp32" and not _gained(run)]
    if same:
        yield (
            f"{100 * zeros:.0f} % of the weights are zero, but dense kernels multiply them all the same: on "
            f"{listed(same)} the time is not distinguishable from the baseline's, or longer."
        )


def _simulated(profile: Profile) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for run in profile.runs:
        if "simulated" in run.note:
            names.setdefault(run.latency.precision, []).append(run.runtime)
    for precision, same in names.items():
        simulated = f"rounding to integers is only simulated in {precision}"
        yield f"On {listed(same)} {simulated}; that time is not an int8 kernel's."
    for run in profile.runs:
        if "no layer runs an int8 kernel" in run.note:
            yield f"On {run.runtime} {run.note}."


def _fewer_operations(profile: Profile) -> Iterator[str]:
    """Name runtimes that gain less than half of what was saved; what holds the model up there, a profile cannot say."""
    fewer = profile.baseline.macs / max(profile.model.macs, 1)
    short = [run for run in profile.runs if fewer >= 1.2 and run.ratio.value < 1 + (fewer - 1) / 2]
    for run in short:
        gain = f"it is {run.ratio}" if run.ratio.distinguishable else "its time is not distinguishable"
        yield f"On {run.runtime} the model does {times(fewer)} fewer multiply-adds, but {gain}."
    if short:
        yield "The verdicts on its layers (--verdicts) tell what holds it up."


def _gained(run: Run) -> bool:
    return run.ratio.distinguishable and run.ratio.value > 1
