"""What brings accuracy back after a cut: fresh BatchNorm statistics, and a few epochs of training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.data import Split
from workbench.surgery import clone, identity, remembered

CALIBRATION_IMAGES = 128  # 512 gain less than a point more and cost four times the wait
BATCH = 64
LEARNING_RATE = 1e-3  # a tenth of what training from scratch uses: the weights are already good
SEED = 0


def finetune(model: nn.Module, data: Any, epochs: int, watch=None, **options) -> nn.Module:
    """Train `model` in place for `epochs` and return it in eval mode; `watch(step)` returning False stops early.

    `options` go to `fit`. Raises ValueError if there are epochs to train but `data` holds no training images, or the
    weights are not float32.
    """
    if epochs == 0:
        return model.eval()
    if not hasattr(data, "train"):
        raise ValueError("Fine-tuning needs training images: pass a data set from load_data, or train no epochs.")
    other = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if other is not None:
        raise ValueError(f"Fine-tuning needs weights in float32, and this model holds {other}: call model.float().")
    from workbench.training import fit

    steps = fit(model, data, **{"epochs": epochs, "learning_rate": LEARNING_RATE, "seed": SEED, **options})
    for step in steps:
        if watch is not None and watch(step) is False:
            steps.close()
    return model.eval()


class Trainings:
    """Several trainings that look like one: steps are numbered through, and one stop stops all that follow."""

    def __init__(self, watch, epochs: int):
        self.watch, self.epochs, self.done, self.stopped = watch, epochs, 0, False

    def finetune(self, model: nn.Module, data: Any, epochs: int, **options) -> nn.Module:
        """Do as `finetune` does, or nothing after a stop."""
        if self.stopped:
            return model.eval()
        finetune(model, data, epochs, lambda step: self._tell(step, epochs), **options)
        self.done += epochs
        return model

    def _tell(self, step, epochs: int) -> bool:
        each = step.steps // epochs
        numbered = replace(
            step, step=step.step + self.done * each, steps=self.epochs * each, epoch=step.epoch + self.done
        )
        self.stopped = self.watch is not None and self.watch(numbered) is False
        return not self.stopped


def recalibrate(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """Measure the running mean and variance of every BatchNorm anew, in place; weights stay as they are.

    `batches`: float tensors (B, C, H, W), each of at least two images, of which the first is used: a slider waits for
    this, and a second batch of 64 gains nothing beyond the noise. After a cut the statistics of the full network no
    longer fit the smaller one. A norm that is used several times gets the mean of what it saw, one that does not run
    keeps what it had. Source: Li et al., 2020 (EagleEye), arXiv:2007.02491.
    """
    if not batches:
        return model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(norm.momentum, clone(norm).state_dict()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over its calls on this batch
        norm.train()
    with torch.no_grad(), _channels_last(model):
        model(batches[0])
    for norm, (momentum, state) in zip(norms, before, strict=True):
        norm.momentum = momentum
        if norm.num_batches_tracked == 0:
            norm.load_state_dict(state)
    return model.eval()


@contextlib.contextmanager
def _channels_last(model: nn.Module) -> Iterator[None]:
    """Lay kernels of convolutions out channels last inside the block: the processor is quicker with these."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    for layer in layers:
        layer.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for layer in layers:
            layer.to(memory_format=torch.contiguous_format)


def training_images(data: Any) -> Split:
    """Return the training images of a data set; raises TypeError where it is none, ValueError where it has none."""
    if not hasattr(data, "train"):
        kind = type(data).__name__
        raise TypeError(f"Data is a {kind} here, not a data set: pass what load_data returns, or a batch of images.")
    if len(data.train) == 0:
        raise ValueError(f"The data set {data.name!r} has no training images: pass one that has some.")
    return data.train


def calibration_batches(model: nn.Module, data: Any) -> list[Tensor]:
    """Return 128 training images in two batches of the model's type and device; none for a batch, or without data.

    Raises ValueError or TypeError as `training_images` does.
    """
    if data is None or isinstance(data, (Tensor, tuple, list)):
        return []

    def draw():
        sample = training_images(data).take(CALIBRATION_IMAGES, seed=0)
        first = next(model.parameters(), torch.empty(0))
        batches = [images.to(first.device, first.dtype) for images, _ in sample.batches(BATCH) if len(images) > 1]
        return data, batches  # holding the data keeps its id from being given to another

    return remembered(model, ("calibration images", identity(data)), draw)[1]
