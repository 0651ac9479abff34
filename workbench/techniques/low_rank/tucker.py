"""Tucker-2 decomposition of convolutions: fewer channels in, a small core, more channels out.

Idea: the kernel of a convolution is a block of outputs × inputs × places. Where its channels repeat one another, both
sides can be written in fewer of them: a 1×1 convolution mixes the inputs down, a core convolution with the same spatial
kernel works between the few channels, and a 1×1 convolution mixes its results up to the outputs. The factors are the
leading singular vectors of the kernel laid out by outputs and by inputs, so that every rank is cut from one
decomposition.

Settings: `rank`, the part of the input and of the output channels that the core keeps. A layer whose three parts would
hold more numbers than it has now is left alone, and so are linear layers, 1×1 and grouped convolutions. `objective`
says what is approximated: "weights", or "outputs", where a direction of the input channels counts as much as 128
training images use it. `recalibrate` measures the statistics of BatchNorm anew. `finetune`, epochs of training
afterwards.

When it helps: convolutions with many channels on both sides. The core shrinks with the product of both ranks, so at the
same rank fewer numbers and multiply-adds are left than with two factors; all parts are dense.

When it does not: without fine-tuning in a compact network, whose channels repeat little: both sides lose at once.
Three kernels are launched where there was one, so small images can become slower. Networks made of 1×1 and depthwise
convolutions have nothing to take. Layers that are pruned, clustered or quantized become dense again.

Source: Kim et al., 2016, arXiv:1511.06530.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.surgery import clone
from workbench.technique import Technique, setting
from workbench.techniques.moments import channel_moment, moment_root
from workbench.techniques.repair import calibration_batches, finetune, recalibrate
from workbench.techniques.replacing import fitted, is_spatial, replaced, thin

Tucker2 = tuple[Tensor, Tensor, Tensor]


def tucker2(weight: Tensor) -> Tucker2:
    """Return `up` (outputs, r0), `core` (r0, r1, ...) and `down` (r1, inputs), whose product is `weight`.

    `weight`: (outputs, inputs, ...). Both factors are orthogonal, their directions in falling order of what they hold:
    cutting them is the truncated higher-order singular value decomposition, whose error is at most √2 of the least.
    Source: De Lathauwer et al., 2000, doi:10.1137/S0895479896305696; computed by tensorly.
    """
    import tensorly
    from tensorly.decomposition import partial_tucker

    full = [min(size, weight.numel() // size) for size in weight.shape[:2]]
    with tensorly.backend_context("numpy", local_threadsafe=True):
        kernel = weight.double().cpu().numpy()
        (core, (up, down)), _ = partial_tucker(kernel, rank=full, modes=[0, 1], n_iter_max=0)
    return tuple(torch.from_numpy(part.copy()).to(weight.device) for part in (up, core, down.T))


def tucker2_for(weight: Tensor, moment: Tensor | None) -> Tucker2:
    """Decompose a kernel, its input channels weighed by how `moment` says they are used; float32."""
    if moment is None:
        return tuple(part.float() for part in tucker2(weight))
    root = moment_root(channel_moment(moment, weight.shape[1]))
    up, core, down = tucker2(torch.einsum("oi...,ij->oj...", weight.double(), root))
    down = torch.linalg.solve_triangular(root, down, upper=False, left=False)
    return up.float(), core.float(), down.float()


def cut_core(factors: Tucker2, rank: float) -> Tucker2:
    """Return the leading part `rank` of both sides, at least one channel on each."""
    up, core, down = factors
    outputs, inputs = (max(1, round(rank * size)) for size in core.shape[:2])
    return up[:, :outputs], core[:outputs, :inputs], down[:inputs]


def three_layers(layer: nn.Module, up: Tensor, core: Tensor, down: Tensor) -> list[nn.Module]:
    """Return the pointwise, core and pointwise convolutions that stand in for `layer`."""
    return [thin(layer, down), thin(layer, core, along="all"), thin(layer, up, last=True)]


@dataclass(frozen=True)
class Tucker(Technique):
    """Write each convolution as a small core between two 1×1 convolutions."""

    family: ClassVar[str] = "low-rank"
    source: ClassVar[str] = "Kim et al., 2016, arXiv:1511.06530"

    rank: float = setting(0.5, low=0.05, high=1.0, step=0.05, unit="of the channels", neutral=1.0)
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
            full = fitted(model, data, "Tucker", self.objective, tucker2_for, is_spatial)
            make = lambda name, layer: three_layers(layer, *cut_core(full[name], self.rank))
            small = replaced(small, make, full)
            if self.recalibrate:
                recalibrate(small, calibration_batches(model, data))
        return finetune(small, data, self.finetune, watch)
