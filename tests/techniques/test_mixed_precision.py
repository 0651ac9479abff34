"""Bits from a budget: against trying all allocations, and against the same bits for all."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import workbench as wb
from workbench.techniques.quantization.mixed_precision import BITS, allocate_bits
from workbench.weights import weight_parametrizations


def convex(sensitivity):
    """The error of a layer falls fourfold with every bit."""
    return [sensitivity * 4.0 ** -(bits - 2) for bits in BITS]


def cost(bits, sizes):
    return sum(b * size for b, size in zip(bits, sizes, strict=True))


def error(bits, errors):
    return sum(row[b - 2] for row, b in zip(errors, bits, strict=True))


@pytest.mark.parametrize("budget", [2, 3, 3.5, 5, 8])
def test_the_best_of_all_allocations(budget):
    sizes, errors = [100, 400, 900], [convex(9.0), convex(1.0), convex(0.3)]
    chosen = allocate_bits(errors, sizes, budget)
    fitting = [b for b in product(BITS, repeat=3) if cost(b, sizes) <= budget * sum(sizes)]
    best = min(error(b, errors) for b in fitting)
    assert cost(chosen, sizes) <= budget * sum(sizes) + 1e-6
    assert error(chosen, errors) == pytest.approx(best)


def test_a_large_layer_is_not_left_one_step_short():
    """Greedy by error per bit gives the small layer all it wants, and then the large ones cannot all have 3 bits."""
    sizes, errors = [10, 1000, 1000, 1000], [convex(1.0), convex(1.0), convex(1.0), convex(0.9)]
    assert error(allocate_bits(errors, sizes, 3.0), errors) <= error([3, 3, 3, 3], errors)
    assert allocate_bits(errors, [1000 * size for size in sizes], 3.02)[1:] == [3, 3, 3]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 1000), st.lists(st.floats(-1, 10), min_size=7, max_size=7)), min_size=1, max_size=6
    ),
    st.floats(2, 8),
)
def test_within_the_budget_and_never_worse_than_the_same_bits_for_all(layers, budget):
    sizes, errors = [size for size, _ in layers], [row for _, row in layers]
    chosen = allocate_bits(errors, sizes, budget)
    assert cost(chosen, sizes) <= budget * sum(sizes) + 1e-3
    assert error(chosen, errors) <= error([int(budget)] * len(sizes), errors) + 1e-9


def test_a_budget_below_two_bits_is_refused():
    with pytest.raises(ValueError, match=r"budget is 1\.5 bits a weight; 2 is the least"):
        allocate_bits([convex(1.0)], [10], 1.5)


@pytest.fixture(scope="module")
def trained():
    return toy.model(), toy.data(200, 200)


@pytest.mark.parametrize("sensitivity", ["outputs", "loss"])
def test_the_model_has_the_bits_that_were_chosen(trained, sensitivity):
    model, data = trained
    technique = wb.MixedPrecision(average_bits=3.5, sensitivity=sensitivity)
    small = technique.compress(model, data)
    chosen = {names[0]: bits for names, bits in technique.bits(model, data)}
    sizes = [model.get_submodule(name).weight.numel() for name in chosen]
    assert {name: weight_parametrizations(small.get_submodule(name))[-1].bits for name in chosen} == chosen
    assert len(set(chosen.values())) > 1 and cost(chosen.values(), sizes) <= 3.5 * sum(sizes)
    assert hasattr(small[0], "input_quantizer")


def test_the_outputs_are_nearer_than_with_the_same_bits_for_all(trained):
    model, data = trained
    images = data.example(64)
    error = lambda technique: float((technique.compress(model, data)(images) - model(images)).detach().square().mean())
    even = wb.Quantization(weight_bits=2, activation_bits=32)
    assert error(wb.MixedPrecision(average_bits=2.5, activation_bits=32)) < error(even)


def test_bad_input_is_answered_in_words(trained):
    model, data = trained
    with pytest.raises(ValueError, match="needs labels to measure the loss"):
        wb.MixedPrecision(sensitivity="loss", activation_bits=32).compress(model, data.example(8))
    with pytest.raises(ValueError, match="MixedPrecision measures errors on images: pass data"):
        wb.MixedPrecision(activation_bits=32).compress(model)
    with pytest.raises(ValueError, match="no linear or convolution layer in ReLU"):
        wb.MixedPrecision(activation_bits=32).compress(nn.ReLU(), torch.zeros(1, 1))
