"""What a data set is: three splits of labelled images, and how arrays become one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SEED = 0


class DataError(RuntimeError):
    """The data cannot be had; the message says what is missing and what to do."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 (N, C, H, W) with labels int64 (N,); `mean` and `std` per channel, on the scale 0..1.

    `sources` int64 (N,), where there is one, tells images of different origin apart: the typeface family of a glyph.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sources: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split({len(self):,} images of shape {tuple(self.images.shape[1:])})"

    def batch(self, index) -> tuple[Tensor, Tensor]:
        """Normalized float32 images (B, C, H, W) and labels (B,) of a slice or index tensor."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) * 255 for values in (self.mean, self.std))
        return (self.images[index].float() - mean) / std, self.labels[index]

    def batches(self, size: int, seed: int | None = None):
        """Yield normalized batches of at most `size` images, in order, or shuffled if a seed is given."""
        order = torch.arange(len(self)) if seed is None else permutation(len(self), seed)
        for index in order.split(size):
            yield self.batch(index)

    def take(self, n: int, seed: int = 0) -> Split:
        """At most `n` images, drawn at random so that the classes are as even as their numbers allow."""
        order = permutation(len(self), seed)
        turn = torch.empty_like(order)
        for label in self.labels.unique():
            mine = order[self.labels[order] == label]
            turn[mine] = torch.arange(len(mine))
        return self._select(order[turn[order].argsort(stable=True)[:n]])

    def _select(self, index: Tensor) -> Split:
        sources = None if self.sources is None else self.sources[index]
        return replace(self, images=self.images[index], labels=self.labels[index], sources=sources)


@dataclass(frozen=True, eq=False)
class Data:
    """Three splits of one set of labelled images; `sources` names what `Split.sources` counts."""

    name: str
    title: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    sources: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Data({self.name!r}, train={self.train}, val={self.val}, test={self.test})"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.train.images.shape[1:])

    def example(self, batch: int = 1) -> Tensor:
        """Normalized validation images, or training ones where there are none; float32 (batch, C, H, W)."""
        split = self.val if len(self.val) else self.train
        if len(split) == 0:
            raise ValueError(f"The data set {self.name!r} holds no images: there is no example to show.")
        return split.batch(torch.arange(batch) % len(split))[0]


def permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def make_data(name, title, classes, parts, size=None, sources=()) -> Data:
    """Data from {"train": (images, labels[, sources]), ...}: shuffled, `val` carved from train if absent."""
    if size is not None:
        parts = {key: (_resize(part[0], size), *part[1:]) for key, part in parts.items()}
    if "val" not in parts:
        parts["train"], parts["val"] = _carve(*parts["train"])
    mean, std = _statistics(parts["train"][0])
    splits = {}
    for key, (images, *rest) in parts.items():
        order = permutation(len(images), SEED)
        splits[key] = Split(images[order], rest[0][order], mean, std, *(extra[order] for extra in rest[1:]))
    return Data(name, title, classes=tuple(classes), sources=tuple(sources), **splits)


def _carve(images: Tensor, labels: Tensor):
    """Take 10 %, at most 5,000, of the images away for validation: seeded, every class in its proportion."""
    wanted = min(len(labels) // 10, 5000)
    order = permutation(len(labels), SEED)
    place = torch.empty(len(labels))  # how deep in its class an image stands, 0..1: the first ones are held out
    for label in labels.unique():
        mine = order[labels[order] == label]
        place[mine] = (torch.arange(len(mine)) + 0.5) / len(mine) if len(mine) > 1 else torch.ones(1)
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[place.argsort(stable=True)[: max(wanted, 1)]] = True
    return (images[~held], labels[~held]), (images[held], labels[held])


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel on the scale 0..1, exact, from a histogram of the 256 values."""
    means, stds = [], []
    values = torch.arange(256, dtype=torch.float64) / 255
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(round(mean.item(), 6))
        stds.append(round((share * (values - mean) ** 2).sum().sqrt().clamp(min=1e-3).item(), 6))
    return tuple(means), tuple(stds)


def _resize(images: Tensor, size: int) -> Tensor:
    """Images uint8 (N, C, H, W) to (N, C, size, size), smoothed where that shrinks them."""
    if images.shape[-2:] == (size, size):
        return images
    parts = [
        torch.nn.functional.interpolate(part.float(), (size, size), mode="bilinear", antialias=True)
        for part in images.split(1000)
    ]
    return torch.cat([part.round().clamp(0, 255).byte() for part in parts])


def as_images(data) -> Tensor:
    """(N, H, W) grey or (N, H, W, 3) color -> uint8 (N, C, H, W)."""
    images = torch.as_tensor(data)
    return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()


def one_line(error: Exception) -> str:
    """What an exception says, fit to stand inside a sentence."""
    return " ".join(str(error).split()).strip("<> .:") or type(error).__name__
