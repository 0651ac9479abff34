"""CP decomposition of convolutions: a sum of simple kernels, each a product of four vectors.

Idea: a kernel of outputs × inputs × height × width is written as a sum of R terms, each an output vector times an
input vector times a column times a row. As layers, this is a 1×1 convolution to R channels, a vertical and a horizontal
depthwise one along each of them, and a 1×1 convolution to the outputs: R·(outputs + inputs + height + width) numbers.

Settings: `rank`, as part of the largest rank at which the four layers hold fewer numbers than the one: it is the part
of the weights that is left. The terms are those of singular values: along rows and columns the kernel is turned into
its main directions, and each pair of these leaves a matrix of outputs × inputs, whose singular vectors give terms.
`sweeps` of alternating least squares improve them. `objective` says what is approximated: "weights", or "outputs",
where a direction of the input channels counts as much as 128 training images use it and the last layer is fitted to
the outputs. `recalibrate` measures the statistics of BatchNorm anew. `finetune`, epochs of training afterwards. Linear
layers, 1×1 and grouped convolutions are left alone.

When it helps: large kernels of few channels, and where very few multiply-adds are wanted and there is time to train.
Without sweeps all ranks come from one decomposition, so the slider answers at once, and no two terms can cancel.

When it does not: the best approximation of a given rank need not exist. With many sweeps terms can grow without bound
and cancel one another, least squares then stall, and training starts from large numbers that nearly cancel. A small
penalty holds the terms down here, and a layer that sweeps do not improve keeps the terms it started from. Sweeps take
seconds, at each rank anew, and gain little. Depthwise kernels are slow for what they compute, so fewer multiply-adds
need not be less time. Layers that are pruned, clustered or quantized become dense again.

Source: Lebedev et al., 2015, arXiv:1412.6553; De Lathauwer et al., 2000, doi:10.1137/S0895479896305696 (main
directions); sweeps by tensorly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from workbench.surgery import clone
from workbench.technique import Technique, setting
from workbench.techniques.moments import channel_moment, moment_root
from workbench.techniques.repair import calibration_batches, finetune, recalibrate
from workbench.techniques.replacing import fitted, is_spatial, replaced, thin

PENALTY = 1e-4  # of the kernel's squared norm: too little to spoil a fit, enough to hold terms that cancel


class Terms(NamedTuple):
    """The terms of a kernel in falling order, float64; their first r are the terms of rank r.

    `factors`: one (size, R) for each dimension of the kernel. `root` (R, R), lower triangular, and `seen` (R, outputs):
    what fits the output vectors to the outputs of the layer, None where only the weights count.
    """

    factors: list[Tensor]
    root: Tensor | None = None
    seen: Tensor | None = None

    def cut(self, rank: int) -> list[Tensor]:
        """Return the factors (size, rank) of that rank, float32."""
        up, *others = (factor[:, :rank] for factor in self.factors)
        if self.root is not None:
            up = torch.linalg.solve_triangular(self.root[:rank, :rank].T, self.seen[:rank], upper=True).T
        return [factor.float() for factor in balanced([up, *others])]


def singular_terms(weight: Tensor) -> list[Tensor]:
    """Return one factor (size, R) for each dimension of `weight`, R being its largest rank, by singular values.

    The terms are orthogonal to one another, in falling order, so that the first r are the best r of them. All of them,
    of which there can be more than R, make up `weight`.
    """
    core, directions = weight.double(), []
    for axis in range(2, weight.dim()):
        rows = weight.double().movedim(axis, 0).flatten(1)
        directions.append(torch.linalg.eigh(rows @ rows.T).eigenvectors)
        core = torch.tensordot(core, directions[-1], dims=([2], [0]))
    ups, sizes, downs = torch.linalg.svd(core.flatten(2).movedim(2, 0), full_matrices=False)
    order = sizes.flatten().argsort(descending=True, stable=True)[: largest_rank(weight)]
    pair, place = order // sizes.shape[1], order % sizes.shape[1]
    along = torch.unravel_index(pair, core.shape[2:])
    up, down = ups[pair, :, place].T * sizes.flatten()[order], downs[pair, place].T
    return [up, down, *(each[:, chosen] for each, chosen in zip(directions, along, strict=True))]


def swept(weight: Tensor, terms: list[Tensor], sweeps: int) -> list[Tensor]:
    """Return the `terms` after rounds of alternating least squares towards `weight`; as they were if that fails.

    It fails where equations are singular, and counts as failed where the error does not fall. Source: Kolda and Bader,
    2009, doi:10.1137/07070111X; by tensorly.
    """
    import tensorly
    from tensorly.decomposition import parafac

    options = {"n_iter_max": sweeps, "tol": 0, "l2_reg": PENALTY * float(weight.norm()) ** 2}
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        try:
            found = parafac(weight, terms[0].shape[1], init=(None, [t.clone() for t in terms]), **options).factors
        except RuntimeError:  # torch's word for singular equations
            return terms
    better = (composed(found) - weight).norm() < (composed(terms) - weight).norm()  # false for NaN as well
    return balanced(found) if better else terms


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


def fit_outputs(weight: Tensor, moment: Tensor, factors: list[Tensor]) -> Terms:
    """Return terms whose output vectors are fitted so that the kernel answers most like `weight` at every rank.

    `weight`: (outputs, n), float64; `moment`: (n, n), of its inputs. The mean squared difference of the outputs is the
    least there is.
    """
    basis = products(factors[1:])
    used = basis @ moment
    root = moment_root(used @ basis.T)
    return Terms(factors, root, torch.linalg.solve_triangular(root, used @ weight.T, upper=False))


def cp_for(weight: Tensor, moment: Tensor | None, rank: float = 1.0, sweeps: int = 0) -> Terms:
    """Decompose a kernel into terms, its inputs weighed as `moment` says they are used.

    The terms serve every rank unless there are `sweeps`, which are of one `rank`, as part of the largest.
    """
    weight = weight.double()
    channels = weight.shape[1]
    root = torch.eye(channels).to(weight) if moment is None else moment_root(channel_moment(moment, channels))
    weighed = torch.einsum("oi...,ij->oj...", weight, root)
    factors = singular_terms(weighed)
    if sweeps:
        factors = swept(weighed, Terms(factors).cut(rank_of(weight, rank)), sweeps)
        factors = [factor.double() for factor in factors]
    factors[1] = torch.linalg.solve_triangular(root, factors[1].T, upper=False, left=False).T
    return Terms(factors) if moment is None else fit_outputs(weight.flatten(1), moment, factors)


def rank_of(weight: Tensor, part: float) -> int:
    """Return that part of the largest rank, at least one."""
    return max(1, round(part * largest_rank(weight)))


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
    sweeps: int = setting(0, low=0, high=100, step=1, help="Rounds of alternating least squares; they take seconds.")
    objective: str = setting(
        "outputs",
        choices=("outputs", "weights"),
        help="Weigh the input channels as training images use them, or all alike.",
    )
    recalibrate: bool = setting(True, choices=(True, False), help="Measure BatchNorm statistics anew afterwards.")
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training afterwards.")

    def compress(self, model, data=None, watch=None):
        """Return a copy with decomposed convolutions.

        `data`: a `Data`; without one, `objective` is "weights" and nothing is recalibrated. Raises ValueError where a
        weight holds NaN or infinity.
        """
        small = clone(model)
        if self.rank < 1:
            own = (self.rank, self.sweeps) if self.sweeps else ()
            fit = lambda weight, moment: cp_for(weight, moment, *own)
            terms = fitted(model, data, ("CP", *own), self.objective, fit, is_spatial)
            make = lambda name, layer: four_layers(layer, terms[name].cut(rank_of(layer.weight, self.rank)))
            small = replaced(small, make, terms)
            if self.recalibrate:
                recalibrate(small, calibration_batches(model, data))
        return finetune(small, data, self.finetune, watch)
