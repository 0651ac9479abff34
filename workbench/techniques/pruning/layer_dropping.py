"""Layer dropping: take whole blocks out of the network, those first that its answers miss least.

Idea: in a network of many blocks whose input and output have the same shape, each block only adds a correction to
what flows through. Put the identity in its place, and the network still runs. Run some training images without each
block in turn, measure how far the outputs move, and drop the blocks that move them least.

Settings: `sparsity`, the part of the blocks that can be dropped which is dropped. `recalibrate` measures BatchNorm
statistics anew on 64 training images. `finetune`, epochs of training afterwards. A block is a child of an
`nn.Sequential` or `nn.ModuleList` that holds weights and keeps the shape; of blocks inside blocks the outermost
counts, except where it is a row of several blocks itself.

When it helps: latency. A layer that is gone costs no time on any runtime, not even that of starting a kernel, and
file and memory shrink with it. Deep residual networks and transformers have blocks to spare.

When it does not: shallow networks, in which each layer does work of its own, and without fine-tuning. Blocks that
change the shape cannot go, so a network such as LeNet has nothing to drop. Each block is judged with all others in
place: two that stand in for one another may both look spare. Fan et al. train with random blocks missing first, which
makes dropping cheaper; here the model is taken as it is.

Sources: Fan et al., 2020 (LayerDrop), arXiv:1909.11556; choice by what changes least: Men et al., 2024 (ShortGPT),
arXiv:2403.03853.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.surgery import clone, identity, remembered, replace_layer, weighted_layers
from workbench.technique import Technique, setting
from workbench.techniques.repair import calibration_batches, finetune, recalibrate
from workbench.weights import finite_weight


def output_change(before: Tensor, after: Tensor) -> float:
    """Return the squared distance between two outputs of one shape, as part of the first one's squared length."""
    before, after = before.float(), after.float()
    return ((after - before).square().sum() / before.square().sum().clamp_min(1e-30)).item()


def droppable(model: nn.Module, inputs: list[Tensor]) -> list[str]:
    """Return the names of the blocks that keep the shape of what flows through them, in the order of definition.

    `inputs`: batches on which the model runs. Blocks that stand at several places of the model are left out.
    """
    kept_shape = _shape_keepers(model, inputs)
    names = [name for name in _children_in_rows(model) if name in kept_shape]
    rows = {name for name in names if sum(_is_child(other, name) for other in names) > 1}
    blocks = [name for name in names if name not in rows]
    return [name for name in blocks if not any(_is_inside(name, other) for other in blocks)]


def _is_inside(name: str, other: str) -> bool:
    return name.startswith(other + ".")


def _is_child(name: str, parent: str) -> bool:
    return name.rpartition(".")[0] == parent


def _children_in_rows(model: nn.Module) -> list[str]:
    """Return the names of all children of Sequential and ModuleList that hold weights and have only one name."""
    every = [layer for _, layer in model.named_modules(remove_duplicate=False)]
    found = []
    for name, layer in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0]) if name else None
        alone = sum(layer is other for other in every) == 1
        if isinstance(parent, (nn.Sequential, nn.ModuleList)) and alone and weighted_layers(layer):
            found.append(name)
    return found


def _shape_keepers(model: nn.Module, inputs: list[Tensor]) -> set[str]:
    """Return the names of layers that were called with one tensor and returned one of the same shape, every time."""
    verdicts: dict[str, bool] = {}

    def look(name):
        def hook(layer, args, options, result):
            plain = len(args) == 1 and not options and isinstance(args[0], Tensor) and isinstance(result, Tensor)
            same = plain and args[0].shape == result.shape and args[0].dtype == result.dtype
            verdicts[name] = verdicts.get(name, True) and same

        return hook

    handles = [layer.register_forward_hook(look(name), with_kwargs=True) for name, layer in model.named_modules()]
    try:
        with torch.no_grad():
            model(inputs[0][:1])
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, same in verdicts.items() if same}


def drop_changes(model: nn.Module, names: list[str], inputs: list[Tensor]) -> dict[str, float]:
    """Return by name how far the model's output moves on `inputs` without that block; what cannot run is left out."""
    with torch.no_grad():
        before = torch.cat([model(images) for images in inputs])
    changes = {}
    for name in names:
        without = clone(model)
        replace_layer(without, name, nn.Identity())
        try:
            with torch.no_grad():
                after = torch.cat([without(images) for images in inputs])
        except (AttributeError, TypeError):  # the model's code reaches into the block
            continue
        changes[name] = output_change(before, after)
    return changes


@dataclass(frozen=True)
class LayerDropping(Technique):
    """Take out the blocks whose removal changes the model's outputs least."""

    family: ClassVar[str] = "pruning"
    source: ClassVar[str] = "Fan et al., 2020, arXiv:1909.11556"

    sparsity: float = setting(0.5, low=0.0, high=1.0, step=0.05, unit="of droppable blocks removed", neutral=0.0)
    recalibrate: bool = setting(True, choices=(True, False), help="Measure BatchNorm statistics anew after dropping.")
    finetune: int = setting(0, low=0, high=10, step=1, unit="epochs", neutral=0, help="Training after dropping.")

    def compress(self, model, data=None, watch=None):
        """Return a copy in which the identity stands for the blocks dropped.

        `data`: a `Data`, or one batch of images. Raises ValueError without images, for NaN in a weight, or if the model
        has no block that can be dropped.
        """
        small = clone(model)
        if self.sparsity > 0:
            order = self.order(model, data)
            for name in order[: round(self.sparsity * len(order))]:
                replace_layer(small, name, nn.Identity())
            if self.recalibrate:
                recalibrate(small, calibration_batches(model, data))
        return finetune(small, data, self.finetune, watch)

    def order(self, model: nn.Module, data: Any) -> list[str]:
        """Return the names of the blocks that can be dropped, the one that is missed least first."""
        changes, _ = remembered(model, ("drop changes", identity(data)), lambda: (_changes(model, data), data))
        return sorted(changes, key=changes.get)


def _changes(model: nn.Module, data: Any) -> dict[str, float]:
    for name, layer in weighted_layers(model):
        finite_weight(name, layer.weight.detach())
    inputs = [data] if isinstance(data, Tensor) else calibration_batches(model, data)
    if not inputs:
        raise ValueError(
            "LayerDropping runs the model without each block, so it needs images: pass a data set from load_data, "
            "or a batch of images."
        )
    whole = clone(model)
    changes = drop_changes(whole, droppable(whole, inputs), inputs)
    if not changes:
        raise ValueError(
            f"LayerDropping found no block to drop in {type(model).__name__}: no child of a Sequential or ModuleList "
            "holds weights and returns the shape that it takes. Prune its channels or weights instead."
        )
    return changes
