"""Pointwise convolutions for spatial ones, and a squeeze before those that stay.

Idea: a 1×1 convolution has a ninth of the numbers of a 3×3 one, and many 3×3 convolutions of a network can be spared:
these are two of SqueezeNet's strategies. The convolutions that a 1×1 convolution answers for best on training images
are replaced first. Those that stay get a 1×1 convolution before them that squeezes their input channels.

Settings: `replaced`, the part of the spatial convolutions that become 1×1, least harm first. `squeeze`, the part of
the input channels that reaches each of the others; a layer that would grow by it is left alone. `objective`: with
"outputs" both are fitted to the layer's outputs on 128 training images, with "weights" the middle of the kernel is
taken and the kernel's channels are squeezed by its singular vectors. `recalibrate` measures the statistics of BatchNorm
anew. `finetune`, epochs of training afterwards. Linear, grouped and 1×1 layers stay, and kernels of an even size.

When it helps: late layers, whose images are small and hold little to look at around a place; and as the start of a
fine-tuning. All layers stay dense, and 1×1 convolutions are the quickest there are.

When it does not: without fine-tuning. A place no longer sees its neighbours, which nothing afterwards brings back: each
replaced layer narrows what the network sees, and replacing all of them leaves it nearly blind to shape. Layers that
are pruned, clustered or quantized become dense again.

Source: Iandola et al., 2016, arXiv:1602.07360.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from workbench.surgery import clone
from workbench.technique import Technique, setting
from workbench.techniques.low_rank.svd import Factors, cut, factors_for
from workbench.techniques.moments import channel_moment, moment_root
from workbench.techniques.repair import calibration_batches, finetune, recalibrate
from workbench.techniques.replacing import fitted, is_spatial, replaced, thin


def pointwise_fit(weight: Tensor, moment: Tensor | None) -> tuple[Tensor, float]:
    """Return the pointwise weight (outputs, inputs) that answers most like `weight`, and the part of it that is lost.

    `weight`: (outputs, inputs, places), the middle place being the one that stays. `moment`: second moment of the
    patches, (inputs · places, squared), or None, for which all patches are alike and the middle of the kernel is best.
    The loss is the mean squared difference of the outputs over their mean square: 0 to 1.
    """
    _, inputs, places = weight.shape
    kernel = weight.double()
    if moment is None:
        middle = kernel[:, :, places // 2]
        return middle.float(), _lost(middle.square().sum(), kernel.square().sum())
    seen = moment.view(inputs * places, inputs, places)[:, :, places // 2]
    root = moment_root(seen.view(inputs, places, inputs)[:, places // 2])
    target = kernel.flatten(1) @ seen
    fit = torch.cholesky_solve(target.T, root).T
    return fit.float(), _lost((fit * target).sum(), ((kernel.flatten(1) @ moment) * kernel.flatten(1)).sum())


def _lost(kept: Tensor, whole: Tensor) -> float:
    """Return the part of `whole` that is not kept; of nothing, nothing is lost."""
    return 1 - float(kept / whole) if whole > 1e-30 else 0.0


def squeeze_factors(weight: Tensor, moment: Tensor | None) -> Factors:
    """Decompose `weight` (outputs, inputs, places) by its inputs: cut, the factors are the kernel and the squeeze."""
    by_inputs = weight.transpose(1, 2).flatten(0, 1)
    return factors_for(by_inputs, None if moment is None else channel_moment(moment, weight.shape[1]))


def margins(layer: nn.Module) -> list[int] | None:
    """Return how far the places that the middle of the kernel reads reach beyond the image, for each axis.

    Negative where they end inside it, 0 for the usual padding. None where no 1×1 layer gives the same image size: an
    even kernel, or a margin that zeros and a cut of a 2-D image cannot make.
    """
    reach = [d * (k // 2) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
    padding = {"same": reach, "valid": [0] * len(reach)}.get(layer.padding, layer.padding)
    edges = [p - r for p, r in zip(padding, reach, strict=True)]
    odd = all(size % 2 for size in layer.kernel_size)
    can_pad = isinstance(layer, nn.Conv2d) and (layer.padding_mode == "zeros" or max(edges) <= 0)
    return edges if odd and (can_pad or not any(edges)) else None


def pointwise_layers(layer: nn.Module, weight: Tensor) -> list[nn.Module]:
    """Return the 1×1 layer that reads the middle place of each patch of `layer`, after a cut or zeros where needed."""
    made = thin(layer, weight, last=True)
    made.stride = layer.stride
    edges = margins(layer)
    return [nn.ZeroPad2d((edges[1], edges[1], edges[0], edges[0])), made] if any(edges) else [made]


def squeezed_layers(layer: nn.Module, factors: Factors, part: float) -> list[nn.Module]:
    """Return the squeeze and the spatial convolution of fewer inputs that stand in for `layer`."""
    left, right = cut(factors, max(1, round(part * layer.in_channels)))
    kernel = left.view(layer.out_channels, -1, left.shape[1]).transpose(1, 2)
    kernel = kernel.reshape(*kernel.shape[:2], *layer.kernel_size)
    return [thin(layer, right), thin(layer, kernel, along="all", last=True)]


def _fit(weight: Tensor, moment: Tensor | None) -> tuple[Tensor, float, Factors]:
    kernel = weight.flatten(2)
    return (*pointwise_fit(kernel, moment), squeeze_factors(kernel, moment))


@dataclass(frozen=True)
class PointwiseConvolution(Technique):
    """Put 1×1 convolutions where spatial ones do least, and squeeze what reaches the others."""

    family: ClassVar[str] = "topology"
    source: ClassVar[str] = "Iandola et al., 2016, arXiv:1602.07360"

    replaced: float = setting(0.5, low=0.0, high=1.0, step=0.05, unit="of the convolutions", neutral=0.0)
    squeeze: float = setting(0.5, low=0.05, high=1.0, step=0.05, unit="of the input channels", neutral=1.0)
    objective: str = setting(
        "outputs",
        choices=("outputs", "weights"),
        help="Approximate a layer's outputs on training images, or its weight.",
    )
    recalibrate: bool = setting(True, choices=(True, False), help="Measure BatchNorm statistics anew afterwards.")
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training afterwards.")

    def compress(self, model, data=None, watch=None):
        """Return a copy in which 1×1 convolutions, and squeezed ones, stand where spatial convolutions were.

        `data`: a `Data`; without one, `objective` is "weights" and nothing is recalibrated. Raises ValueError where a
        weight holds NaN or infinity.
        """
        small = clone(model)
        if self.replaced > 0 or self.squeeze < 1:
            fits = fitted(model, data, "pointwise", self.objective, _fit, is_spatial)
            least = sorted((fits[name][1], name) for name in fits if margins(small.get_submodule(name)) is not None)
            pointwise = {name for _, name in least[: round(self.replaced * len(least))]}
            squeezed = [name for name in fits if name not in pointwise and self.squeeze < 1]
            small = replaced(small, lambda name, layer: pointwise_layers(layer, fits[name][0]), pointwise)
            small = replaced(small, lambda name, layer: squeezed_layers(layer, fits[name][2], self.squeeze), squeezed)
            if self.recalibrate:
                recalibrate(small, calibration_batches(model, data))
        return finetune(small, data, self.finetune, watch)
