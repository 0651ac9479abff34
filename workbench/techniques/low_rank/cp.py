"""CP decomposition of convolutions: a sum of simple kernels, each a product of four vectors.

Idea: a kernel of outputs × inputs × height × width is written as a sum of R terms, each an output vector times an
input vector times a column times a row. As layers, this is a 1×1 convolution to R channels, a vertical and a horizontal
depthwise one along each of them, and a 1×1 convolution to the outputs: R·(outputs + inputs + height + width) numbers.

Settings: `rank`, as part of the largest rank at which the four layers hold fewer numbers than the one: it is the part
of the weights that is left. `sweeps` of alternating least squares, from singular vectors and, where the rank exceeds
these, from random ones drawn with `seed`. `objective` says what is approximated: "weights", or "outputs", where a
direction of the input channels counts as much as 128 training images use it and the last layer is fitted to the
outputs. `recalibrate` measures the statistics of BatchNorm anew. `finetune`, epochs of training afterwards. Linear
layers, 1×1 and grouped convolutions are left alone.

When it helps: large kernels of few channels, and where very few multiply-adds are wanted and there is time to train.

When it does not: it is unstable. The best approximation of a given rank need not exist: terms can grow without bound
and cancel one another, least squares then stall, and training starts from large numbers that nearly cancel. A small
penalty holds the terms down here, and a layer whose terms are not finite, or no better than nothing, is left as it was.
Ranks do not nest, so each slider position is decomposed by itself, which takes seconds the first time. Depthwise
kernels are slow for what they compute, so fewer multiply-adds need not be less time. Layers that are pruned, clustered
or quantized become dense again.

Source: Lebedev et al., 2015, arXiv:1412.6553.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.surgery import clone
from workbench.technique import Technique, setting
from workbench.techniques.moments import channel_moment, moment_root
from workbench.techniques.repair import calibration_batches, finetune, recalibrate
from workbench.techniques.replacing import fitted, is_spatial, replaced, thin

PENALTY = 1e-4  # of the kernel's squared norm: too little to spoil a fit, enough to hold terms that cancel


def cp_terms(weight: Tensor, rank: int, sweeps: int, seed: int) -> list[Tensor] | None:
    """Return one factor (size, rank) for each dimension of `weight`; their sum of products approximates it.

    None where alternating least squares fail: singular equations, NaN, or an error as large as the weight. Each term's
    norm is shared evenly between its factors. Source: Kolda and Bader, 2009, doi:10.1137/07070111X; by tensorly.
    """
    import tensorly
    from tensorly.decomposition import parafac

    size = weight.norm()
    options = {"n_iter_max": sweeps, "tol": 0, "l2_reg": PENALTY * float(size) ** 2, "random_state": seed}
    with tensorly.backend_context("pytorch", local_threadsafe=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the rank exceeds the singular vectors, which is meant so
        try:
            terms = parafac(weight, rank, **options).factors
        except RuntimeError:  # torch's word for singular equations
            return None
    good = (composed(terms) - weight).norm() < size  # false for NaN as well
    return balanced(terms) if good else None


def products(terms: list[Tensor]) -> Tensor:
    """Return for each of r columns the product of all `terms` (size, r), flattened: (r, size · size · …)."""
    product = terms[0]
    for factor in terms[1:]:
        product = product.unsqueeze(-2) * factor
    return product.flatten(0, -2).T


def composed(terms: list[Tensor]) -> Tensor:
    """Return the kernel that the sum of the products of all `terms` (size, r) makes, (size, size, …)."""
    return (terms[0] @ products(terms[1:])).view([len(factor) for factor in terms])


def balanced(terms: list[Tensor]) -> list[Tensor]:
    """Return the same products with the norm of each shared evenly between its factors."""
    norms = torch.stack([factor.norm(dim=0) for factor in terms]).clamp_min(1e-30)
    even = norms.log().mean(0).exp()
    return [factor * (even / norm) for factor, norm in zip(terms, norms, strict=True)]


def least_squares(weight: Tensor, moment: Tensor, basis: Tensor) -> Tensor:
    """Return P (outputs, r) for which P·basis answers most like `weight` (outputs, n) on inputs of `moment` (n, n).

    `basis`: (r, n), float64. The mean squared difference of the outputs is the least there is.
    """
    seen = basis @ moment
    root = moment_root(seen @ basis.T)
    return torch.cholesky_solve(seen @ weight.double().T, root).T


def cp_for(weight: Tensor, moment: Tensor | None, part: float, sweeps: int, seed: int) -> list[Tensor] | None:
    """Decompose a kernel into the terms of four layers, with its inputs weighed as `moment` says they are used."""
    rank = max(1, round(part * largest_rank(weight)))
    if moment is None:
        return cp_terms(weight, rank, sweeps, seed)
    root = moment_root(channel_moment(moment, weight.shape[1]))
    terms = cp_terms(torch.einsum("oi...,ij->oj...", weight, root.float()), rank, sweeps, seed)
    if terms is None:
        return None
    down = torch.linalg.solve_triangular(root, terms[1].double().T, upper=False, left=False).T
    up = least_squares(weight.flatten(1), moment, products([down, *(term.double() for term in terms[2:])]))
    return [up.float(), down.float(), *terms[2:]]


def largest_rank(weight: Tensor) -> int:
    """Return the largest rank at which the terms hold fewer numbers than the kernel; 0 where there is none."""
    return (weight.numel() - 1) // sum(weight.shape)


def four_layers(layer: nn.Module, terms: list[Tensor]) -> list[nn.Module]:
    """Return the layers that stand in for `layer`: pointwise, one depthwise for each axis of the image, pointwise."""
    up, down, *axes = terms
    rank, dims = up.shape[1], len(axes)
    depthwise = [
        thin(layer, term.T.reshape(rank, 1, *[-1 if i == axis else 1 for i in range(dims)]), along=axis, groups=rank)
        for axis, term in enumerate(axes)
    ]
    return [thin(layer, down.T), *depthwise, thin(layer, up, last=True)]


@dataclass(frozen=True)
class CPDecomposition(Technique):
    """Write each convolution as two 1×1 convolutions with a vertical and a horizontal depthwise one between."""

    family: ClassVar[str] = "low-rank"
    source: ClassVar[str] = "Lebedev et al., 2015, arXiv:1412.6553"

    rank: float = setting(0.5, low=0.05, high=1.0, step=0.05, unit="of the weights", neutral=1.0)
    sweeps: int = setting(10, low=1, high=100, step=1, help="Rounds of alternating least squares.")
    objective: str = setting(
        "outputs",
        choices=("outputs", "weights"),
        help="Weigh the input channels as training images use them, or all alike.",
    )
    recalibrate: bool = setting(True, choices=(True, False), help="Measure BatchNorm statistics anew afterwards.")
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training afterwards.")
    seed: int = setting(0, low=0, high=9, step=1)

    def compress(self, model, data=None, watch=None):
        """Return a copy with decomposed convolutions; those that least squares fail on are left as they were.

        `data`: a `Data`; without one, `objective` is "weights" and nothing is recalibrated. Raises ValueError where a
        weight holds NaN or infinity.
        """
        small = clone(model)
        if self.rank < 1:
            fit = lambda weight, moment: cp_for(weight, moment, self.rank, self.sweeps, self.seed)
            key = ("CP", self.rank, self.sweeps, self.seed)
            found = fitted(model, data, key, self.objective, fit, is_spatial)
            terms = {name: each for name, each in found.items() if each is not None}
            small = replaced(small, lambda name, layer: four_layers(layer, terms[name]), terms)
            if self.recalibrate:
                recalibrate(small, calibration_batches(model, data))
        return finetune(small, data, self.finetune, watch)
