"""Depthwise separable convolutions: filter each channel by itself, then mix the channels.

Idea: an ordinary convolution filters in space and mixes channels at once. Done one after the other, as in MobileNet,
the same takes a k×k filter for each input channel and a 1×1 convolution over all. Each input channel's part of the
kernel, outputs × places, is written by its leading singular vectors: the filters; how they are mixed is then fitted.

Settings: `multiplier`, filters for each input channel: a k×k kernel has at most k·k different ones, which would leave
it exact. A layer whose two parts would hold more numbers than it has now is left alone, and so are linear layers, 1×1
and grouped convolutions. `objective` says what is approximated: "weights", or the layer's "outputs" on 128 training
images. `recalibrate` measures the statistics of BatchNorm anew. `finetune`, epochs of training afterwards.

When it helps: convolutions with many channels, before a fine-tuning. Fitted to the outputs it starts from far better
answers than a MobileNet that starts at random.

When it does not: with one filter for each channel and without fine-tuning: a trained kernel has more to say about an
input than one pattern. Multiply-adds fall further than time does, since a depthwise kernel reads as much memory as it
computes. The first layer of a network has too few input channels to gain. Layers that are pruned, clustered or
quantized become dense again.

Sources: Howard et al., 2017, arXiv:1704.04861; from trained weights Guo et al., 2018, arXiv:1802.00939.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.surgery import clone
from workbench.technique import Technique, setting
from workbench.techniques.moments import moment_root
from workbench.techniques.repair import calibration_batches, finetune, recalibrate
from workbench.techniques.replacing import fitted, is_spatial, replaced, thin

MOST = 4


def channel_filters(weight: Tensor, moment: Tensor | None, most: int) -> Tensor:
    """Return the filters (inputs, most, places) that write each input channel's part of `weight` best.

    `weight`: (outputs, inputs, places), float64. With `moment` (inputs · places, squared), best for the outputs that
    the channel alone makes; else for the weight: the filters of a channel are then orthonormal. Fewer than `most` come
    back where the kernel has fewer.
    """
    _, inputs, places = weight.shape
    slices = weight.transpose(0, 1)
    if moment is None:
        return torch.linalg.svd(slices, full_matrices=False).Vh[:, :most]
    blocks = moment.view(inputs, places, inputs, places).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    roots = moment_root(blocks)
    right = torch.linalg.svd(slices @ roots, full_matrices=False).Vh[:, :most]
    return torch.linalg.solve_triangular(roots, right, upper=False, left=False)


def mixtures(weight: Tensor, moment: Tensor | None, filters: Tensor) -> list[Tensor]:
    """Return the pointwise weights (outputs, inputs, m) that fit the first m `filters` best, for m = 1, 2, ….

    Least squares over all channels together. The filters are taken in the order of m, so that the equations of each m
    are the first ones of the next, and one Cholesky factor solves them all. Shapes as in `channel_filters`.
    """
    outputs, inputs, places = weight.shape
    most = filters.shape[1]
    if moment is None:
        return [(weight.transpose(0, 1) @ filters[:, :m].mT).transpose(0, 1) for m in range(1, most + 1)]
    moment = moment.view(inputs, places, inputs, places)
    seen = torch.einsum("imt,itjs->mijs", filters, moment)
    normal = torch.einsum("mijs,jns->minj", seen, filters).reshape(most * inputs, most * inputs)
    target = seen.reshape(most * inputs, -1) @ weight.flatten(1).T
    root = moment_root(normal)
    half = torch.linalg.solve_triangular(root, target, upper=False)
    sizes = [m * inputs for m in range(1, most + 1)]
    solved = [torch.linalg.solve_triangular(root[:n, :n].mT, half[:n], upper=True) for n in sizes]
    return [x.view(m, inputs, outputs).permute(2, 1, 0) for m, x in enumerate(solved, 1)]


def separated(weight: Tensor, moment: Tensor | None, most: int = MOST) -> tuple[Tensor, list[Tensor]]:
    """Return the filters (inputs, most, places) and the mixtures (outputs, inputs, m) for m = 1 … `most`, float32."""
    kernel = weight.double().flatten(2)
    filters = channel_filters(kernel, moment, most)
    return filters.float(), [mixture.float() for mixture in mixtures(kernel, moment, filters)]


def two_layers(layer: nn.Module, filters: Tensor, mixture: Tensor) -> list[nn.Module]:
    """Return the depthwise and the pointwise convolution that stand in for `layer`."""
    inputs, multiplier = mixture.shape[1:]
    kernels = filters[:, :multiplier].reshape(inputs * multiplier, 1, *layer.kernel_size)
    return [thin(layer, kernels, along="all", groups=inputs), thin(layer, mixture.flatten(1), last=True)]


@dataclass(frozen=True)
class DepthwiseSeparable(Technique):
    """Put a depthwise and a pointwise convolution where an ordinary one was."""

    family: ClassVar[str] = "topology"
    source: ClassVar[str] = "Howard et al., 2017, arXiv:1704.04861; Guo et al., 2018, arXiv:1802.00939"

    multiplier: int = setting(2, low=1, high=MOST, step=1, unit="filters per input channel", neutral=9)
    objective: str = setting(
        "outputs",
        choices=("outputs", "weights"),
        help="Approximate a layer's outputs on training images, or its weight.",
    )
    recalibrate: bool = setting(True, choices=(True, False), help="Measure BatchNorm statistics anew afterwards.")
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training afterwards.")

    def compress(self, model, data=None, watch=None):
        """Return a copy with separable convolutions; a multiplier of 9, the neutral one, leaves all as they are.

        `data`: a `Data`; without one, `objective` is "weights" and nothing is recalibrated. Raises ValueError where a
        weight holds NaN or infinity.
        """
        small = clone(model)
        if self.multiplier <= MOST:
            parts = fitted(model, data, "separable", self.objective, separated, is_spatial)
            mixture = lambda found: found[min(self.multiplier, len(found)) - 1]
            make = lambda name, layer: two_layers(layer, parts[name][0], mixture(parts[name][1]))
            small = replaced(small, make, parts)
            if self.recalibrate:
                recalibrate(small, calibration_batches(model, data))
        return finetune(small, data, self.finetune, watch)
