"""What the stages of a pipeline must keep of one another: zeros stay zero, codebooks stay small, shapes stay.

`Invariants.of(model)` reads them off a model, `broken(before, after)` says in sentences what no longer holds, and
`Promises` remembers which stage made what, so that the sentence names the stage whose work was undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from workbench.surgery import weighted_layers
from workbench.weights import Codebook, InputQuantizer, describe, weight_parametrizations

MOST_LEVELS = 256  # a weight with more distinct values has no codebook


@dataclass(frozen=True)
class LayerFacts:
    """What holds of the weight of one layer, and what of it is meant to last.

    `zero`: bool, where the weight is zero; `held`: where it is meant to stay so. `distinct` values in all, and
    `row_distinct` at most in one output channel; `codebook`: they were chosen to be few. `bits` that each number is
    rounded to, None for fp32. `integer_inputs`: the layer's input is rounded to 8 bits.
    """

    zero: Tensor
    held: Tensor
    distinct: int
    row_distinct: int
    codebook: bool
    bits: int | None
    integer_inputs: bool

    @property
    def numbers(self) -> int:
        return self.zero.numel()

    @property
    def used(self) -> int:
        """How many numbers are not zero."""
        return self.numbers - int(self.zero.sum())


@dataclass(frozen=True)
class Invariants:
    """The facts of every linear and convolution layer by name."""

    layers: dict[str, LayerFacts]

    @classmethod
    def of(cls, model: nn.Module) -> Invariants:
        """Read the facts off a model, whatever is stacked on its weights."""
        with torch.no_grad():
            return cls({name: _facts(layer) for name, layer in weighted_layers(model)})

    @property
    def numbers(self) -> int:
        """How many weights the layers hold."""
        return sum(facts.numbers for facts in self.layers.values())

    @property
    def sparsity(self) -> float:
        """The part of all weights that is zero."""
        return sum(facts.numbers - facts.used for facts in self.layers.values()) / max(self.numbers, 1)

    @property
    def largest_codebook(self) -> int | None:
        """The most distinct values of a weight that has a codebook; None where no weight has one."""
        return max((facts.distinct for facts in self.layers.values() if facts.codebook), default=None)

    @property
    def bits(self) -> int | None:
        """The most bits that a weight is rounded to; None where one is not rounded."""
        bits = [facts.bits for facts in self.layers.values()]
        return max(bits) if bits and None not in bits else None

    def __str__(self) -> str:
        parts = [f"{self.numbers:,} weights", f"{100 * self.sparsity:.1f} % zero"]
        if self.largest_codebook:
            parts.append(f"at most {self.largest_codebook} values in a codebook")
        if self.bits:
            parts.append(f"at most {self.bits} bits")
        return ", ".join(parts)


def _facts(layer: nn.Module) -> LayerFacts:
    weight, code = layer.weight.detach(), describe(layer)
    zero, bits = weight == 0, _bits(layer)
    held = zero
    if bits is not None:  # what is rounded to zero today may be rounded to something else after training
        held = torch.zeros_like(zero) if code.mask is None else ~code.mask
    used = weight[~zero]
    distinct = len(used.unique()) + bool(zero.any())
    few = distinct <= MOST_LEVELS and 4 * distinct <= len(used)
    quantized_inputs = isinstance(getattr(layer, "input_quantizer", None), InputQuantizer)
    return LayerFacts(zero, held, distinct, _row_distinct(weight), few and bits is None, bits, quantized_inputs)


def _bits(layer: nn.Module) -> int | None:
    """Return the bits of the tightest rounding on the layer's weight, None without one; a codebook is none."""
    kinds = [p for p in weight_parametrizations(layer) if not isinstance(p, Codebook)]
    return min((p.bits for p in kinds if getattr(p, "bits", None)), default=None)


def _row_distinct(weight: Tensor) -> int:
    """Return the most distinct values in one output channel of `weight` (channels, …)."""
    rows = weight.float().flatten(1).sort(1).values
    return int((rows.diff(dim=1) != 0).sum(1).max()) + 1 if rows.numel() else 0


# --- what can break: (a layer before, the layers in its place) -> (how it was, how it is), or None ------------------

Change = tuple[int, int]


def _zeros(before: LayerFacts, after: list[LayerFacts]) -> Change | None:
    """Compare place by place where the shape is the same, else count the numbers that are not zero."""
    if len(after) == 1 and after[0].zero.shape == before.held.shape:
        filled = int((before.held & ~after[0].zero).sum())
    else:
        filled = sum(facts.used for facts in after) - before.used if before.held.any() else 0
    return (int(before.held.sum()), filled) if filled > 0 else None


def _codebook(before: LayerFacts, after: list[LayerFacts]) -> Change | None:
    now = max(facts.distinct for facts in after)
    return (before.distinct, now) if before.codebook and now > before.distinct else None


def _rounding(before: LayerFacts, after: list[LayerFacts]) -> Change | None:
    if before.bits is None:
        return None
    keeps = all((f.bits or 32) <= before.bits or f.row_distinct <= 2**before.bits for f in after)
    return None if keeps else (before.bits, max(facts.bits or 32 for facts in after))


def _inputs(before: LayerFacts, after: list[LayerFacts]) -> Change | None:
    return (8, 32) if before.integer_inputs and not any(facts.integer_inputs for facts in after) else None


def _size(before: LayerFacts, after: list[LayerFacts]) -> Change | None:
    now = sum(facts.numbers for facts in after)
    return (before.numbers, now) if now > before.numbers else None


@dataclass(frozen=True)
class _Kind:
    """One kind of invariant: how it breaks, when a stage made it, and the sentence's words for what happened."""

    find: Callable[[LayerFacts, list[LayerFacts]], Change | None]
    made: Callable[[LayerFacts, LayerFacts], bool]
    words: Callable[[list[Change]], str]


KINDS = (
    _Kind(
        _zeros,
        lambda old, new: int(new.held.sum()) > int(old.held.sum()),
        lambda found: f"filled {_sum(found, 1):,} weights where there were {_sum(found, 0):,} zeros",
    ),
    _Kind(
        _codebook,
        lambda old, new: new.codebook and (not old.codebook or new.distinct < old.distinct),
        lambda found: "left up to {1:,} distinct values in a weight that had {0:,}".format(*max(found, key=_growth)),
    ),
    _Kind(
        _rounding,
        lambda old, new: new.bits is not None and (old.bits is None or new.bits < old.bits),
        lambda found: "left weights in {1} bits that had {0}".format(*max(found, key=_growth)),
    ),
    _Kind(
        _inputs,
        lambda old, new: new.integer_inputs and not old.integer_inputs,
        lambda found: "no longer rounds inputs to 8 bits",
    ),
    _Kind(
        _size,
        lambda old, new: new.numbers < old.numbers,
        lambda found: f"made layers of {_sum(found, 1):,} weights out of {_sum(found, 0):,}",
    ),
)


def _sum(found: list[Change], which: int) -> int:
    return sum(change[which] for change in found)


def _growth(change: Change) -> float:
    return change[1] / change[0]


def _found(kind: _Kind, before: dict[str, LayerFacts], after: Invariants) -> dict[str, Change]:
    """Return the layers where this kind of invariant no longer holds; a layer that is gone breaks nothing."""
    places = {name: _in_place_of(name, after) for name in before}
    changes = {name: kind.find(before[name], facts) for name, facts in places.items() if facts}
    return {name: change for name, change in changes.items() if change is not None}


def _in_place_of(name: str, after: Invariants) -> list[LayerFacts]:
    """Return the facts of the layer of this name, or of the layers inside what replaced it."""
    return [facts for other, facts in after.layers.items() if other == name or other.startswith(f"{name}.")]


def _sentence(kind: _Kind, found: dict[str, Change], by: str, earlier: str = "") -> str:
    first, *others = found
    where = first + (f" and {len(others)} more layer{'s' if len(others) > 1 else ''}" if others else "")
    owner = f", which undoes {earlier}" if earlier else ""
    return f"{by} {kind.words(list(found.values()))} ({where}){owner}."


def broken(before: Invariants, after: Invariants, by: str = "This") -> list[str]:
    """Return one sentence for each kind of invariant of `before` that does not hold in `after`; `by` is its subject."""
    pairs = [(kind, _found(kind, before.layers, after)) for kind in KINDS]
    return [_sentence(kind, found, by) for kind, found in pairs if found]


@dataclass
class Promises:
    """What the stages so far have made and later ones must keep: one entry for each kind that a stage made."""

    made: list[tuple[str, _Kind, dict[str, LayerFacts]]] = field(default_factory=list)

    def broken_by(self, stage: str, after: Invariants) -> list[str]:
        """Return in sentences what `stage` broke of earlier ones; what is broken is said once and then forgotten."""
        sentences, kept = [], []
        for earlier, kind, layers in self.made:
            found = _found(kind, layers, after)
            if found:
                sentences.append(_sentence(kind, found, stage, earlier))
            rest = {name: _fresh(facts, after.layers.get(name)) for name, facts in layers.items() if name not in found}
            kept.append((earlier, kind, rest))
        self.made = kept
        return sentences

    def add(self, stage: str, before: Invariants, after: Invariants) -> None:
        """Remember what `stage` made of the model: more zeros, a smaller codebook, fewer bits, smaller layers."""
        for kind in KINDS:
            layers = {name: facts for name, facts in _changed(before, after) if kind.made(before.layers[name], facts)}
            if layers:
                self.made.append((stage, kind, layers))


def _fresh(facts: LayerFacts, now: LayerFacts | None) -> LayerFacts:
    """Return the facts to keep of a layer: those promised, or after a change of shape those that it has now."""
    return facts if now is None or now.zero.shape == facts.zero.shape else now


def _changed(before: Invariants, after: Invariants) -> Iterable[tuple[str, LayerFacts]]:
    return ((name, facts) for name, facts in after.layers.items() if name in before.layers)
