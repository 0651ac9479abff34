"""Where compression wins time and where it loses: maps of ratios over two quantities, measured on this machine.

Each cell times a compressed operation in turns with the plain one that it stands for, on kernels of torch and OpenVINO
for the processor; there are none of a GPU.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from workbench.profiler.timing import compare, latencies
from workbench.profiler.units import counted
from workbench.runtimes import Prepared, RuntimeFailed, runtime
from workbench.weights import FakeQuantize, InputQuantizer, attach_input_quantizer, parametrize_weight

CALLS, BUDGET_S = 40, 0.3
SPARSITIES, BATCHES = (0.5, 0.7, 0.8, 0.9, 0.95), (1, 8, 64)
RANKS, SIZES = (0.1, 0.25, 0.5, 0.75), (64, 256, 1024)
BITS, PLANES = (8, 4), (16, 64, 128)
WIDTHS, SIDES = (48, 56, 60, 63, 64, 65, 72, 80), (7, 14, 28)


@dataclass(frozen=True, eq=False)
class WinLoseMap:
    """Times faster than the uncompressed operation, measured in turns; below 1 is slower, NaN is not measured.

    `ratio`, `low` and `high` (its 95 % interval) are float (len(y), len(x)). `what` says in one sentence what was
    measured against what.
    """

    title: str
    x_name: str
    x: tuple
    y_name: str
    y: tuple
    ratio: np.ndarray
    low: np.ndarray
    high: np.ndarray
    what: str

    def to_dict(self) -> dict:
        """Return the figures as JSON can hold them; None where nothing was measured."""
        tables = {name: _plain(getattr(self, name)) for name in ("ratio", "low", "high")}
        names = ("title", "x_name", "y_name", "what")
        return {name: getattr(self, name) for name in names} | {"x": list(self.x), "y": list(self.y)} | tables


def _plain(table: np.ndarray) -> list[list[float | None]]:
    return [[float(value) if np.isfinite(value) else None for value in row] for row in table]


Contest = tuple[Prepared, Prepared, float]  # the compressed operation, the plain one, and by what the ratio is divided


def sparse_map(
    sparsities: tuple = SPARSITIES, batches: tuple = BATCHES, size: int = 512, threads: int = 1, seed: int = 0
) -> Iterator[WinLoseMap]:
    """Yield a growing map of compressed sparse rows (CSR) against a dense linear layer: zeros × images a call."""
    dense = _weight(size, size, seed)
    order = dense.abs().flatten().argsort()

    def contest(sparsity: float, batch: int) -> Contest:
        weight, inputs = dense.clone(), torch.ones(size, batch)
        weight.view(-1)[order[: round(sparsity * weight.numel())]] = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that torch's sparse rows are in beta
            rows = weight.to_sparse_csr()
        return Call(lambda: rows @ inputs, batch, threads), Call(lambda: dense @ inputs, batch, threads), 1.0

    what = (
        f"A linear layer of {size}×{size} whose smallest weights are zero, as CSR and dense, in torch on the processor."
    )
    return _grown("Zeros: sparse rows against dense", ("zeros", sparsities), ("images a call", batches), what, contest)


def low_rank_map(
    ranks: tuple = RANKS, sizes: tuple = SIZES, batch: int = 1, threads: int = 1, seed: int = 0
) -> Iterator[WinLoseMap]:
    """Yield a growing map of two factors against one matrix: rank × size."""

    def contest(rank: float, size: int) -> Contest:
        kept, inputs = max(1, round(rank * size)), torch.ones(batch, size)
        whole, left, right = (_weight(*shape, seed) for shape in ((size, size), (size, kept), (kept, size)))
        factors = Call(lambda: inputs @ left @ right, batch, threads)
        return factors, Call(lambda: inputs @ whole, batch, threads), 1.0

    images = counted(batch, "image")
    what = f"Linear layers as two factors and as one matrix, {images} a call, in torch on the processor."
    return _grown("Low rank: two factors against one matrix", ("rank", ranks), ("size", sizes), what, contest)


def integer_map(
    bits: tuple = BITS, widths: tuple = PLANES, side: int = 14, name: str = "openvino", threads: int = 1
) -> Iterator[WinLoseMap]:
    """Yield a growing map of rounded convolutions against fp32 ones on one runtime: bit width × channels."""

    def contest(width_bits: int, width: int) -> Contest:
        example = torch.rand(1, width, side, side, generator=torch.Generator().manual_seed(0))
        models = (_rounded(_convolution(width), width_bits), _convolution(width))
        return *(runtime(name).prepare(model, example, threads) for model in models), 1.0

    what = f"3×3 convolutions on {side}×{side} pixels with rounded weights and inputs against fp32, on {name}."
    return _grown("Integers against fp32", ("bits", bits), ("channels", widths), what, contest)


def width_map(
    widths: tuple = WIDTHS, sides: tuple = SIDES, full: int = 64, name: str = "openvino", threads: int = 1
) -> Iterator[WinLoseMap]:
    """Yield a growing map of convolutions of several widths against one of `full` channels: width × pixels of a side.

    The ratio is divided by that of the multiply-adds: 1 is as quick for each as the full one, below 1 the width wastes.
    """

    def contest(width: int, side: int) -> Contest:
        pair = [
            runtime(name).prepare(_convolution(one), torch.rand(1, one, side, side), threads) for one in (width, full)
        ]
        return *pair, (full / width) ** 2

    what = f"3×3 convolutions on {name}: speed for each multiply-add, against that of {full} channels."
    return _grown("Widths: what each multiply-add costs", ("channels", widths), ("side", sides), what, contest)


def _grown(title: str, across: tuple, down: tuple, what: str, contest: Callable) -> Iterator[WinLoseMap]:
    """Time each cell's contest and yield the map after it; a cell that cannot run stays NaN."""
    (x_name, x), (y_name, y) = across, down
    tables = [np.full((len(y), len(x)), math.nan) for _ in range(3)]
    for row, column in np.ndindex(len(y), len(x)):
        try:
            compressed, plain, expected = contest(x[column], y[row])
        except RuntimeFailed:
            continue
        ratio = compare(*latencies([compressed, plain], CALLS, BUDGET_S))
        for table, value in zip(tables, (ratio.value, *ratio.interval), strict=True):
            table[row, column] = value / expected
        yield WinLoseMap(title, x_name, tuple(x), y_name, tuple(y), *(table.copy() for table in tables), what)


class Call(Prepared):
    """A torch function of no arguments, timed like a model."""

    def __init__(self, function: Callable, batch: int, threads: int):
        super().__init__(runtime("eager"), torch.empty(batch), threads)
        self._function = function

    def run(self) -> None:
        with torch.inference_mode():
            self._function()


def _weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5


def _convolution(width: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        return nn.Sequential(*layers, nn.Conv2d(width, width, 3, padding=1), nn.ReLU()).eval()


def _rounded(model: nn.Module, bits: int) -> nn.Module:
    """Round the weights symmetrically for each channel and inputs to 8 bits, in place: only the kernels matter here."""
    for layer in (model[0], model[2]):
        scale = layer.weight.detach().flatten(1).abs().amax(1) / (2 ** (bits - 1) - 1)
        parametrize_weight(layer, FakeQuantize(scale, torch.zeros_like(scale), bits, axis=0))
        attach_input_quantizer(layer, InputQuantizer(torch.tensor(1 / 128), torch.tensor(0)))
    return model
