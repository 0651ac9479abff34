"""What the inputs of a layer look like: what it is given, the vectors its weight meets, and their second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.surgery import weighted_layers
from workbench.weights import finite_weight


def watch_inputs(model: nn.Module, batches: Iterable[Tensor], note: Callable[[str, nn.Module, Tensor], None]) -> None:
    """Run `batches` through `model` without gradients; `note(name, layer, x)` gets each input of a weighted layer.

    Raises ValueError where an input holds NaN or infinity, of which nothing can be learned.
    """

    def hook(name):
        def look(layer, args, named):
            x = (*args, *named.values())[0].detach()
            if not x.isfinite().all():
                _refuse(model, name)
            note(name, layer, x)

        return look

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in weighted_layers(model)]
    try:
        with torch.no_grad():
            for images in batches:
                model(images)
    finally:
        for handle in handles:
            handle.remove()


def _refuse(model: nn.Module, name: str) -> None:
    for one, layer in weighted_layers(model):
        finite_weight(one, layer.weight.detach())
    raise ValueError(
        f"The input of layer {name!r} holds NaN or infinity on the images that it is calibrated with: look for such "
        "values in the images."
    )


def second_moments(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """Return the mean of x·xᵀ over all inputs x that each layer's weight is multiplied with; float64 (n, n) by name.

    For a convolution, x is the patch under the kernel. Layers other than linear ones and zero-padded 2-D convolutions
    are left out. Raises ValueError where an input is not finite.
    """
    sums, counts = {}, {}

    def note(name, layer, x):
        if has_input_rows(layer):
            rows = input_rows(layer, x).float()
            sums[name] = sums.get(name, 0) + (rows.T @ rows).double()
            counts[name] = counts.get(name, 0) + len(rows)

    watch_inputs(model, (part for batch in batches for part in batch.split(16)), note)
    return {name: total / counts[name] for name, total in sums.items()}


def has_input_rows(layer: nn.Module) -> bool:
    """Return whether `input_rows` knows the layer: linear ones, and zero-padded 2-D convolutions of one group."""
    plain = isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear) or (plain and layer.groups == 1)


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Return the vectors that the flattened weight is multiplied with, one a row."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    shape = {"dilation": layer.dilation, "padding": layer.padding, "stride": layer.stride}
    return F.unfold(x, layer.kernel_size, **shape).transpose(1, 2).flatten(0, 1)


def channel_moment(moment: Tensor, channels: int) -> Tensor:
    """Return the second moment of the channels alone, (channels, channels): the mean over the places of the kernel.

    `moment`: (channels · places, channels · places), as `second_moments` gives it.
    """
    places = len(moment) // channels
    return moment.view(channels, places, channels, places).diagonal(dim1=1, dim2=3).mean(-1)


def moment_root(moment: Tensor) -> Tensor:
    """Return the lower triangle L with L·Lᵀ = `moment` (..., n, n), lifted a little so that it can be inverted."""
    diagonal = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = 1e-4 * diagonal.clamp_min(1e-12)  # inputs that never occur must not divide by zero
    return torch.linalg.cholesky(moment + ridge * torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device))
