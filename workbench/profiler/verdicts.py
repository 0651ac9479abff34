"""Why a model is not faster: one verdict for the whole and one for each layer, from what was measured.

Each names its evidence and one thing to try. The three limits, starting a layer, moving its bytes, doing its
operations, are those of the roofline (Williams et al., 2009), with the cost of an empty layer beside them. Where all
three together explain little of a layer's time, the machine's limits are not to blame, but its kernel, or work that is
not counted: all but multiply-adds, and in torch's own runtimes the products that are no layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from workbench.profiler.costs import LayerCost, layer_costs
from workbench.profiler.layers import LayerTime, LayerTimes, layer_times
from workbench.profiler.limits import Limits, limits
from workbench.profiler.timing import Latency, Ratio, compare, latencies
from workbench.profiler.units import counted, duration, listed, size, times
from workbench.runtimes import SPARSE_KERNEL, Kernel, bake
from workbench.runtimes import runtime as named_runtime
from workbench.surgery import clone, weighted_layers
from workbench.weights import rounded_bits

KINDS = (
    "launch-bound",
    "memory-bound",
    "compute-bound",
    "inefficient kernel",
    "uncounted work",
    "no kernel",
    "fell back to fp32",
    "unaligned width",
    "conversion overhead",
    "inside the noise",
    "faster",
    "slower",
)
MANY_ZEROS = 0.2  # fewer are not meant to make a layer faster
CONVERTS = 0.1  # of the total time, from which on a conversion is worth a verdict
FEWER = 1.05  # times fewer multiply-adds, from which on one expects to gain time
LANES = 16  # numbers in fp32 that AVX-512 computes at once: kernels take channels in such blocks
LARGE = 0.1  # of the total time: a layer whose width is worth a measurement
MOSTLY = 0.5  # of the total time: what takes more holds the whole up
EXPLAINED = 0.25  # of a layer's time: where starting it, its bytes and its operations take less, they are not to blame
STEP = 1.1  # times more than its share of the multiply-adds must the odd width cost
CONVERSIONS = ("InputQuantizer", "Reorder", "Convert", "fake_quantize", "QuantizeLinear", "DequantizeLinear")
NO_LAYER = "calls that are no layer"
LOOK_INSIDE = "Measured one by one, its layers tell what holds it up: see the verdicts of the profiler."
ASK_LAYERS = "Ask the verdicts on its layers: they tell what holds each of them up."
ADVICE = {
    "launch-bound": "Give it more images a call, or merge or drop layers: smaller ones start as slowly.",
    "memory-bound": "Store its weights in fewer bits or factors, or share them among more images a call.",
    "compute-bound": "Take channels away, or use a kernel of lower precision: fewer operations are what counts here.",
    "inefficient kernel": "Run it on another runtime: this kernel reaches little of what the machine can do.",
    "uncounted work": "Run it on another runtime, which may fuse it or have a better kernel for it.",
}


@dataclass(frozen=True)
class Verdict:
    """What limits a layer, or the whole model where `layer` is None; `kind` is one of KINDS.

    `evidence` is one sentence with the measured figures, `advice` one sentence with one thing to try.
    """

    layer: str | None
    kind: str
    evidence: str
    advice: str = ""

    def to_dict(self) -> dict:
        """Return it as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.evidence} {self.advice}".strip()


@dataclass(frozen=True)
class Taken:
    """What is already known of a model once its latency was taken; `whole_verdict` measures nothing more.

    `zeros` is the part of its weights that are 0, `bits` says how many bits each rounded layer's weights have, and
    `rounded_inputs` which layers round their inputs too.
    """

    latency: Latency
    costs: tuple[LayerCost, ...]
    kernels: tuple[Kernel, ...]
    zeros: float
    bits: dict[str, int]
    rounded_inputs: frozenset[str]

    @classmethod
    def of(
        cls, model: nn.Module, latency: Latency, costs: Sequence[LayerCost], kernels: Sequence[Kernel] = ()
    ) -> Taken:
        """Return what is known of `model`; reads its structure, and its zeros from `costs`."""
        zeros = 1 - sum(cost.nonzero for cost in costs) / max(1, sum(cost.weights for cost in costs))
        layers = weighted_layers(model) if isinstance(model, nn.Module) else []
        bits = {name: rounded_bits(layer) for name, layer in layers if rounded_bits(layer) < 32}
        rounds = frozenset(name for name, layer in layers if hasattr(layer, "input_quantizer"))
        return cls(latency, tuple(costs), tuple(kernels), zeros, bits, rounds)

    @property
    def macs(self) -> int:
        return sum(cost.macs for cost in self.costs)


# --- the whole, without measuring --------------------------------------------------------------------------------


def whole_verdict(now: Taken, baseline: Taken, known: Limits | None = None, layers: Sequence[Verdict] = ()) -> Verdict:
    """Say whether a model is faster than its baseline, and if not why, from latencies taken in one run.

    Nothing is measured here, so nothing is blamed that was not: starting layers only with `known`, the measured
    `limits(runtime, threads)`, and odd widths only where one of `layers`, the verdicts on them, timed even ones beside.
    """
    ratio = compare(now.latency, baseline.latency)
    if ratio.distinguishable and ratio.value > 1:
        return _faster(ratio, now, baseline)
    found = next(_missing_kernels(now, baseline), None)
    if found:
        return Verdict(None, found[0], f"{found[1]}: {_took(ratio, now)}.", found[2])
    if now.macs * FEWER < baseline.macs:
        return _smaller_but_not_faster(ratio, now, baseline, known, layers)
    skipping = _skipping(now)
    start = f"{skipping}, and yet" if skipping else "Nothing that costs time here was removed:"
    return Verdict(None, _outcome(ratio), f"{start} {_took(ratio, now)}.")


def _skipping(now: Taken) -> str:
    """Say how many layers run kernels that skip zeros, or return ""."""
    count = sum(kernel.implementation == SPARSE_KERNEL for kernel in now.kernels)
    return f"{count} of {counted(len(now.kernels), 'layer')} run {SPARSE_KERNEL} kernels" if count else ""


def _outcome(ratio: Ratio) -> str:
    return "slower" if ratio.distinguishable else "inside the noise"


def _faster(ratio: Ratio, now: Taken, baseline: Taken) -> Verdict:
    fewer = baseline.macs / max(1, now.macs)
    precision = now.latency.precision
    if fewer > FEWER:
        reason = f", for {times(fewer)} fewer multiply-adds"
    elif _skipping(now):
        reason = f": {_skipping(now)}"
    elif precision != baseline.latency.precision:
        reason = f": its kernels compute in {precision}, the baseline's in {baseline.latency.precision}"
    elif now.zeros - baseline.zeros > MANY_ZEROS:
        reason = ", although no kernel skips its zeros: what else makes it so was not measured"
    else:
        reason = ""
    return Verdict(None, "faster", f"It is {ratio} than the baseline on {now.latency.runtime}{reason}.")


def _missing_kernels(now: Taken, baseline: Taken) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, evidence, advice) of what was compressed but is not computed in that form."""
    runtime, fewest = now.latency.runtime, min(now.bits.values(), default=32)
    if fewest < min(baseline.bits.values(), default=32):
        slow = _in_floats(now)
        if slow:
            (bits, rounded_inputs), count = Counter(slow).most_common(1)[0]
            yield _not_integer(bits, rounded_inputs, runtime, counted(count, "layer"))
        elif fewest < 8:
            yield _too_few_bits(fewest, runtime)
    if not _skipping(now) and now.zeros - baseline.zeros > MANY_ZEROS and now.macs * FEWER >= baseline.macs:
        yield _unused_zeros(now.zeros, runtime)


def _in_floats(now: Taken) -> list[tuple[int, bool]]:
    """Return (bits, whether inputs are rounded too) of each rounded layer without an int8 kernel."""
    integer = {kernel.layer for kernel in now.kernels if kernel.precision == "int8"}
    ran = {kernel.layer for kernel in now.kernels} or set(now.bits)  # a runtime that names no kernels has none for int8
    return [(bits, name in now.rounded_inputs) for name, bits in now.bits.items() if name in ran - integer]


def _not_integer(bits: int, rounded_inputs: bool, runtime: str, where: str) -> tuple[str, str, str]:
    """Return (kind, evidence, advice) for weights rounded to integers that are multiplied as floating point."""
    if "eager" in runtime or "cuda" in runtime:
        evidence = f"{runtime} has no integer kernels and only simulates rounding to {bits} bits in floating point"
        return "no kernel", evidence, "Run it on openvino, which computes 8-bit weights and inputs in int8."
    if rounded_inputs:
        evidence = (
            f"Weights and inputs are rounded, but {runtime} runs no integer kernel for {where} and multiplies in fp32"
        )
        return "no kernel", evidence, "Try another runtime: on this one, rounding such layers saves bytes and no time."
    if bits < 8:
        evidence = f"{runtime} has no kernel for {bits}-bit weights here and multiplies {where} in fp32"
        return "no kernel", evidence, "Take 8 bits and round the inputs too: that runs in int8."
    evidence = f"The weights are rounded to 8 bits, but {runtime} multiplies {where} in fp32"
    return "fell back to fp32", evidence, "Round the inputs too, else int8 cannot run."


def _too_few_bits(bits: int, runtime: str) -> tuple[str, str, str]:
    evidence = f"{runtime} has no kernel for {bits} bits and computes them in int8"
    return "no kernel", evidence, "Take 8 bits, which run as fast and lose less accuracy."


def _unused_zeros(zeros: float, runtime: str) -> tuple[str, str, str]:
    evidence = f"{100 * zeros:.0f} % of the weights are zero, but {runtime} has no kernel that skips single zeros"
    return "no kernel", evidence, "Remove whole channels: those are not multiplied."


def _smaller_but_not_faster(
    ratio: Ratio, now: Taken, baseline: Taken, known: Limits | None, layers: Sequence[Verdict]
) -> Verdict:
    start = f"It multiplies {times(baseline.macs / max(1, now.macs))} less, but {_took(ratio, now)}"
    odd = next((one for one in layers if one.kind == "unaligned width"), None)
    if odd:
        return Verdict(None, odd.kind, f"{start}; {odd.evidence}", odd.advice)
    if known and _launches_ms(now, known) > MOSTLY * now.latency.median_ms:
        empty = counted(len(now.costs), "empty layer")
        why = f"starting a call and {empty} takes {duration(_launches_ms(now, known))} here"
        return Verdict(None, "launch-bound", f"{start}; {why}.", ADVICE["launch-bound"])
    return Verdict(None, _outcome(ratio), f"{start}.", ASK_LAYERS if layers else LOOK_INSIDE)


def _launches_ms(now: Taken, known: Limits) -> float:
    return known.starts_ms(cost.kind for cost in now.costs)


def _took(ratio: Ratio, now: Taken) -> str:
    found = str(ratio) if ratio.distinguishable else "not distinguishable from the baseline"
    noisy = ", and the machine was not quiet" if now.latency.noisy else ""
    return f"at {duration(now.latency.median_ms)} it is {found}{noisy}"


# --- whole and layers, measured ------------------------------------------------------------------------------------


def verdicts(
    model: nn.Module,
    example: Tensor,
    baseline: nn.Module | None = None,
    runtime: str = "eager",
    threads: int = 1,
    times: LayerTimes | None = None,
) -> list[Verdict]:
    """Measure `model` on `example`, float (B, C, H, W), and return the verdict on the whole, then one for each layer.

    With `baseline` both are timed in turns. `times`: those of the layers in the same place, where they were taken
    already. Raises RuntimeFailed if the runtime cannot run or does not show layers.
    """
    known, found = limits(runtime, threads), times or layer_times(model, example, runtime, threads)
    each = layer_verdicts(model, example, found, known)
    if baseline is None:
        return [_of_the_whole(found, each, known), *each]
    return [_versus(model, example, baseline, runtime, threads, known, each), *each]


def layer_verdicts(model: nn.Module, example: Tensor, found: LayerTimes, known: Limits) -> list[Verdict]:
    """Return the verdict on each layer of `model`, whose times on `example` are `found`."""
    torch_model = isinstance(model, nn.Module)  # a file's layers are judged by their times alone
    bodies, shapes = (dict(weighted_layers(model)), _input_shapes(model, example)) if torch_model else ({}, {})
    each = []
    for layer in found.layers:
        verdict, body = _layer_verdict(layer, bodies.get(layer.name), found, known), bodies.get(layer.name)
        if body is not None and layer.share > LARGE and verdict.kind in ADVICE:
            verdict = _width_verdict(layer, body, shapes[layer.name], found) or verdict
        each.append(verdict)
    return each


def _layer_verdict(layer: LayerTime, body: nn.Module | None, found: LayerTimes, known: Limits) -> Verdict:
    if _converts(layer) and sum(one.share for one in found.layers if _converts(one)) > CONVERTS:
        return _conversion(layer, found)
    missing = _missing_kernel(layer, body, found.runtime) if body is not None else None
    if missing:
        return Verdict(layer.name, missing[0], f"{layer.name}: {missing[1]}.", missing[2])
    return _limit(layer, found, known)


def _converts(layer: LayerTime) -> bool:
    return layer.macs == 0 and any(word in layer.name + layer.kind for word in CONVERSIONS)


def _conversion(layer: LayerTime, found: LayerTimes) -> Verdict:
    together = 100 * sum(one.share for one in found.layers if _converts(one))
    evidence = (
        f"{layer.name} only converts numbers and takes {duration(layer.ms)}; all conversions together take "
        f"{together:.0f} % of {duration(found.total_ms)}."
    )
    advice = "Let neighbouring layers compute in one precision, so that nothing is converted between them."
    if layer.kind == "InputQuantizer":
        advice = "Run it on openvino, where int8 kernels round by themselves."
    return Verdict(layer.name, "conversion overhead", evidence, advice)


def _missing_kernel(layer: LayerTime, body: nn.Module, runtime: str) -> tuple[str, str, str] | None:
    bits, zeros = rounded_bits(body), float((body.weight == 0).float().mean())
    if bits < 32 and layer.precision != "int8":
        return _not_integer(bits, hasattr(body, "input_quantizer"), runtime, "them")
    if bits < 8:
        return _too_few_bits(bits, runtime)
    return _unused_zeros(zeros, runtime) if zeros > MANY_ZEROS and layer.kernel != SPARSE_KERNEL else None


def _limit(layer: LayerTime, found: LayerTimes, known: Limits) -> Verdict:
    """Name the limit that alone would take longest, unless all of them together explain little of the time."""
    bounds = known.of(layer, sum(one.weight_bytes for one in found.layers))
    kind, together = max(bounds, key=bounds.__getitem__), sum(bounds.values())
    if together < EXPLAINED * layer.ms:
        return _unexplained(layer, together)
    does = {
        "launch-bound": f"starting an empty {layer.kind if layer.kind in known.launch_ms else 'layer'}",
        "memory-bound": f"moving its {size(layer.weight_bytes + layer.activation_bytes)}",
        "compute-bound": f"doing its {layer.macs:,} multiply-adds at the measured peak",
    }
    taken = duration(layer.ms) if layer.ms > 0 else "less than the runtime's clock tells"
    evidence = f"{layer.name} takes {taken}; {does[kind]} alone takes {duration(bounds[kind])} here."
    return Verdict(layer.name, kind, evidence, _advice(kind, layer))


def _unexplained(layer: LayerTime, together_ms: float) -> Verdict:
    """Say that the three limits take `together_ms`, a small part of the layer's time."""
    kind = "inefficient kernel" if layer.macs else "uncounted work"
    parts = ["starting it", "moving its bytes", *(["doing its multiply-adds"] if layer.macs else [])]
    rest = "" if layer.macs else "; what else it does is not counted"
    evidence = f"{layer.name} takes {duration(layer.ms)}; {listed(parts)} takes {duration(together_ms)} here{rest}."
    return Verdict(layer.name, kind, evidence, _advice(kind, layer))


def _advice(kind: str, layer: LayerTime) -> str:
    if "BatchNorm" in layer.kind:
        return "Fold it into the convolution before it, which then computes both."
    passes_on = layer.weight_bytes < layer.activation_bytes  # it mostly moves what other layers give and take
    if (kind == "launch-bound" and not layer.macs) or (kind == "memory-bound" and passes_on):
        return "Take a runtime that fuses it into the layer before it, or give that layer fewer channels."
    return ADVICE[kind]


# --- odd widths, measured beside even ones -------------------------------------------------------------------------


def _width_verdict(layer: LayerTime, body: nn.Module, inputs: tuple[int, ...], found: LayerTimes) -> Verdict | None:
    """Time a layer of odd width beside the next smaller even one; None unless the odd channels cost too much."""
    even = _evened(body)
    if even is None:
        return None
    fewer = body.weight.numel() / even.weight.numel()
    way = named_runtime(found.runtime).for_baseline()  # no kernel for zeros takes an odd width
    prepare = lambda one: way.prepare(one, torch.zeros(_inputs_of(one, inputs)), found.threads)
    quick, slow = latencies([prepare(even), prepare(body)], budget_s=1.0)
    ratio = compare(quick, slow)
    if not ratio.interval[0] > STEP * fewer:
        return None
    evidence = (
        f"{layer.name} takes {duration(slow.median_ms)} with {_widths(body)} and {duration(quick.median_ms)} with "
        f"{_widths(even)}, {times(ratio.value)} faster for {times(fewer)} fewer multiply-adds."
    )
    return Verdict(layer.name, "unaligned width", evidence, f"Round its widths to multiples of {LANES}.")


def _evened(layer: nn.Module) -> nn.Module | None:
    """Return the layer with its widths rounded down to multiples of LANES, or None where they are or it cannot be."""
    outputs, inputs = layer.weight.shape[:2]
    if getattr(layer, "groups", 1) > 1 or not (outputs % LANES or inputs % LANES) or outputs < LANES:
        return None
    outputs, inputs = outputs // LANES * LANES, max(inputs // LANES * LANES, min(inputs, LANES))
    even = bake(layer)
    even.weight = nn.Parameter(even.weight[:outputs, :inputs].clone(), requires_grad=False)
    if even.bias is not None:
        even.bias = nn.Parameter(even.bias[:outputs].clone(), requires_grad=False)
    for name in ("in_channels", "in_features"):
        if hasattr(even, name):
            setattr(even, name, inputs)
    for name in ("out_channels", "out_features"):
        if hasattr(even, name):
            setattr(even, name, outputs)
    return even


def _inputs_of(layer: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the inputs that a layer of this width takes where the original took `shape`."""
    axis = len(shape) - 1 if isinstance(layer, nn.Linear) else 1
    return (*shape[:axis], layer.weight.shape[1], *shape[axis + 1 :])


def _widths(layer: nn.Module) -> str:
    return f"{layer.weight.shape[1]}→{layer.weight.shape[0]} channels"


def _input_shapes(model: nn.Module, example: Tensor) -> dict[str, tuple[int, ...]]:
    """Return the shape of the inputs of each linear and convolution layer that is called."""
    model, shapes = clone(model), {}
    for name, layer in weighted_layers(model):
        layer.register_forward_pre_hook(lambda _, args, name=name: shapes.update({name: tuple(args[0].shape)}))
    with torch.inference_mode():
        model(example)
    return shapes


# --- the whole, measured -------------------------------------------------------------------------------------------


def _of_the_whole(found: LayerTimes, each: list[Verdict], known: Limits) -> Verdict:
    """Name the kind of verdict under which most of the time falls."""
    starts = known.starts_ms(layer.kind for layer in found.layers)
    between = max(0.0, found.outside_ms)
    spent = [(layer.name, verdict.kind, layer.ms) for layer, verdict in zip(found.layers, each, strict=True)]
    spent.append((NO_LAYER, "uncounted work", max(0.0, between - starts)))
    taken = Counter({"launch-bound": min(between, starts)})
    for _, of_kind, its_ms in spent:
        taken[of_kind] += its_ms
    kind, ms = taken.most_common(1)[0]
    total = duration(found.total_ms)
    if kind == "launch-bound":
        empty = counted(len(found.layers), "empty layer")
        evidence = f"starting a call and {empty} takes {duration(starts)} here, and the whole model {total}"
    else:
        slowest = sorted((one for one in spent if one[1] == kind and one[2] > 0), key=lambda one: -one[2])
        where = listed([name for name, *_ in slowest[:3]]) + (" and others" if len(slowest) > 3 else "")
        evidence = f"{100 * min(1.0, ms / found.total_ms):.0f} % of {total} go by in {where}"
    advice = ADVICE.get(kind) or next(verdict.advice for verdict in each if verdict.kind == kind)
    return Verdict(None, kind, f"On {found.runtime} the model is mostly {_adjective(kind)}: {evidence}.", advice)


def _adjective(kind: str) -> str:
    words = {
        "inefficient kernel": "held up by inefficient kernels",
        "uncounted work": "busy with work that is not counted",
        "no kernel": "without a kernel for its form",
        "fell back to fp32": "back in fp32",
        "unaligned width": "held up by odd widths",
        "conversion overhead": "busy converting",
    }
    return words.get(kind, kind)


def _versus(model, example, baseline, runtime: str, threads: int, known: Limits, each: list[Verdict]) -> Verdict:
    """Time a model and its baseline in turns and judge the whole."""
    way = named_runtime(runtime)
    prepared = [way.prepare(model, example, threads), way.for_baseline().prepare(baseline, example, threads)]
    taken = [
        Taken.of(one, latency, layer_costs(one, example), ready.kernels)
        for one, latency, ready in zip((model, baseline), latencies(prepared, budget_s=3.0), prepared, strict=True)
    ]
    return whole_verdict(*taken, known, each)
