"""Labelled images to train, compress and measure on: `load_data(name)` gives train, val and test splits.

`glyphs` is embedded and needs no network; the others come through torchvision into a cache folder; `folder:PATH` reads
your own images. Every split is shuffled once with a fixed seed, so any prefix of it is a fair sample of it.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import lzma
import os
import shutil
import socket
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workbench.paths import shipped

DATA_SETS = ("glyphs", "mnist", "fashion-mnist", "kmnist", "cifar10")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
SEED = 0
LARGEST_SIDE = 224
DOWNLOAD_TIMEOUT_S = 20


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

    def batch(self, index) -> tuple[Tensor, Tensor]:
        """Normalized float32 images (B, C, H, W) and labels (B,) of a slice or index tensor."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) * 255 for values in (self.mean, self.std))
        return (self.images[index].float() - mean) / std, self.labels[index]

    def batches(self, size: int, seed: int | None = None):
        """Yield normalized batches of at most `size` images, in order, or shuffled if a seed is given."""
        order = torch.arange(len(self)) if seed is None else _permutation(len(self), seed)
        for index in order.split(size):
            yield self.batch(index)

    def take(self, n: int, seed: int = 0) -> Split:
        """At most `n` images, drawn at random so that the classes are as even as their numbers allow."""
        order = _permutation(len(self), seed)
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

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.train.images.shape[1:])

    def example(self, batch: int = 1) -> Tensor:
        """Normalized validation images, float32 (batch, C, H, W)."""
        return self.val.batch(torch.arange(batch) % len(self.val))[0]


def load_data(name: str, size: int | None = None) -> Data:
    """Data by name: one of DATA_SETS, or "folder:PATH" with train/CLASS, test/CLASS and, optional, val/CLASS inside.

    `size` resizes the images to size×size pixels; a folder's default is its most common size, at most 224.
    Raises DataError with one sentence that says what to do. A second call with the same arguments is instant.
    """
    if size is not None and not (isinstance(size, int) and 1 <= size <= 4096):
        raise DataError(f"size={size!r} is no image size; give a whole number of pixels from 1 to 4096, or None.")
    if name.startswith("folder:"):
        path = Path(name.removeprefix("folder:")).expanduser().resolve()
        return _load_folder(path, size, _fingerprint(path))
    if name not in DATA_SETS:
        near = difflib.get_close_matches(name.lower(), DATA_SETS, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"There is no data set {name!r}; {hint}Choose from {', '.join(DATA_SETS)} or folder:PATH.")
    return _load_glyphs(size) if name == "glyphs" else _load_torchvision(name, size, cache_folder())


def cache_folder() -> Path:
    """Where downloads live: $WORKBENCH_DATA, or the platform's cache directory."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("WORKBENCH_DATA") or user_cache_path("workbench")).expanduser().resolve()


# -------------------------------------------------------------------------------------------------- making splits


def _permutation(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def _make(name, title, classes, parts, size=None, sources=()) -> Data:
    """Data from {"train": (images, labels[, sources]), ...}: shuffled, `val` carved from train if absent."""
    if size is not None:
        parts = {key: (_resize(part[0], size), *part[1:]) for key, part in parts.items()}
    if "val" not in parts:
        parts["train"], parts["val"] = _carve(*parts["train"])
    mean, std = _statistics(parts["train"][0])
    splits = {}
    for key, (images, *rest) in parts.items():
        order = _permutation(len(images), SEED)
        splits[key] = Split(images[order], rest[0][order], mean, std, *(extra[order] for extra in rest[1:]))
    return Data(name, title, classes=tuple(classes), sources=tuple(sources), **splits)


def _carve(images: Tensor, labels: Tensor):
    """Take 10 %, at most 5,000, of each class's fair share away from the training images, seeded."""
    part = min(0.1, 5000 / len(labels))
    held = torch.zeros(len(labels), dtype=torch.bool)
    order = _permutation(len(labels), SEED)
    for label in labels.unique():
        mine = order[labels[order] == label]
        held[mine[: max(round(len(mine) * part), int(len(mine) > 1))]] = True
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


# -------------------------------------------------------------------------------------------------- glyphs


@lru_cache(maxsize=4)
def _load_glyphs(size: int | None) -> Data:
    """The embedded letters and digits; the file's layout is described in data/README.md."""
    index, levels = shipped("data", "glyphs.json"), shipped("data", "glyphs.npy.xz")
    try:
        families = json.loads(index.read_text(encoding="utf-8"))
        stack = np.load(io.BytesIO(lzma.decompress(levels.read_bytes())), allow_pickle=False)
    except (OSError, ValueError, lzma.LZMAError, EOFError) as error:
        raise DataError(
            f"The embedded glyphs in {index.parent} are damaged ({error}); install workbench again."
        ) from error
    classes, rows = families["classes"], families["families"]
    images = torch.from_numpy(stack * np.uint8(17))  # (families, classes, 28, 28), levels 0..15 -> 0..255
    parts = {}
    for key in ("train", "val", "test"):
        mine = torch.tensor([i for i, row in enumerate(rows) if row["split"] == key])
        labels = torch.arange(len(classes)).repeat(len(mine))
        parts[key] = (images[mine].flatten(0, 1).unsqueeze(1), labels, mine.repeat_interleave(len(classes)))
    return _make("glyphs", "Glyphs", classes, parts, size, [row["name"] for row in rows])


# -------------------------------------------------------------------------------------------------- torchvision


_TORCHVISION = {  # name: (class, title, folder that torchvision makes, class names if its own are long)
    "mnist": ("MNIST", "MNIST", "MNIST", tuple("0123456789")),
    "fashion-mnist": ("FashionMNIST", "Fashion-MNIST", "FashionMNIST", None),
    "kmnist": ("KMNIST", "KMNIST", "KMNIST", None),
    "cifar10": ("CIFAR10", "CIFAR-10", "cifar-10-batches-py", None),
}


@lru_cache(maxsize=4)
def _load_torchvision(name: str, size: int | None, cache: Path) -> Data:
    """A public data set, read from the cache folder; downloaded there if it is absent or damaged."""
    import torchvision

    attribute, title, folder, classes = _TORCHVISION[name]
    kind = getattr(torchvision.datasets, attribute)
    found = _read(kind, cache)
    if found is None:
        _download(kind, title, folder, cache)
        found = _read(kind, cache)
    if found is None:
        raise DataError(f"The files of {title} in {cache / folder} cannot be read; delete that folder and try again.")
    parts = {key: (_as_images(part.data), torch.as_tensor(part.targets)) for key, part in found.items()}
    return _make(name, title, classes or found["train"].classes, parts, size)


def _read(kind, root: Path) -> dict | None:
    """Both parts of a torchvision data set, or None if it is absent, incomplete or damaged."""
    try:
        found = {"train": kind(root, train=True, download=False), "test": kind(root, train=False, download=False)}
    except Exception:  # torchvision reports a damaged file in many ways; all mean: not usable
        return None
    return found if all(len(part.data) == len(part.targets) > 0 for part in found.values()) else None


def _as_images(data) -> Tensor:
    """(N, H, W) grey or (N, H, W, 3) color -> uint8 (N, C, H, W)."""
    images = torch.as_tensor(data)
    return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()


def _download(kind, title: str, folder: str, cache: Path) -> None:
    """Let torchvision download and verify into a temporary folder; move it into the cache only when it is whole."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".download-", dir=cache))
    except OSError as error:
        raise DataError(
            f"{title} is not in {cache}, and that folder cannot be written ({error.strerror}); "
            "set WORKBENCH_DATA to a folder that can be."
        ) from error
    try:
        with _patience(DOWNLOAD_TIMEOUT_S), contextlib.redirect_stdout(io.StringIO()):
            kind(part, train=True, download=True)
        if _read(kind, part) is None:
            raise RuntimeError("what came is incomplete")
        shutil.rmtree(cache / folder, ignore_errors=True)
        os.replace(part / folder, cache / folder)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(
            f"{title} could not be downloaded ({str(error).strip(': ')}); check the network and try again, or put its "
            f"files into {cache / folder}. The data set 'glyphs' needs no network."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _patience(seconds: float):
    """Give up on a silent server after `seconds`; urllib alone would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


# -------------------------------------------------------------------------------------------------- your own folder


def _folders(path: Path) -> list[Path]:
    """The visible folders in `path`, by name."""
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _fingerprint(path: Path) -> tuple:
    """Changes when an image is added or removed, so that a changed folder is read again."""
    folders = [c for part in ("train", "val", "test") if (path / part).is_dir() for c in _folders(path / part)]
    return tuple((str(folder), folder.stat().st_mtime_ns) for folder in folders)


@lru_cache(maxsize=4)
def _load_folder(path: Path, size: int | None, fingerprint: tuple) -> Data:
    """Images in train/CLASS/*, test/CLASS/* and, if there, val/CLASS/*."""
    for part in ("train", "test"):
        if not (path / part).is_dir():
            what = f"has no folder {part}/" if path.is_dir() else "does not exist"
            raise DataError(
                f"The folder {path} {what}; it must hold train/CLASS/*.png and test/CLASS/*.png (or .jpg …)."
            )
    classes = [folder.name for folder in _folders(path / "train")]
    if not classes:
        raise DataError(f"{path / 'train'} has no class folders; put the images of each class into train/CLASS/.")
    found = {part: _files(path / part, classes) for part in ("train", "val", "test") if (path / part).is_dir()}
    shape, mode = _common_format([file for file, _ in found["train"]], size)
    parts = {part: _decode(files, shape, mode) for part, files in found.items()}
    return _make(f"folder:{path}", path.name, classes, parts)


def _files(path: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """(file, label) of every image below `path`; every class folder must be known and hold at least one."""
    found = []
    for folder in _folders(path):
        if folder.name not in classes:
            raise DataError(
                f"The class {folder.name!r} is in {path} but not in {path.parent / 'train'}; add training images for "
                "it, or remove the folder."
            )
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
        if not files:
            raise DataError(f"{folder} holds no image ({' '.join(SUFFIXES)}); add some, or remove the folder.")
        found += [(file, classes.index(folder.name)) for file in files]
    if not found:
        raise DataError(f"{path} has no class folders; put the images of each class into {path.name}/CLASS/.")
    return found


def _open(file: Path):
    from PIL import Image

    try:
        return Image.open(file)
    except OSError as error:
        raise DataError(f"The image {file} cannot be read ({error}); replace or remove it.") from error


def _common_format(files: list[Path], size: int | None) -> tuple[tuple[int, int], str]:
    """The most common (width, height), longer side at most 224, and "L" if all are grey, else "RGB"."""
    sizes, grey = Counter(), True
    for file in files[:: max(1, len(files) // 1000)]:
        with _open(file) as image:
            sizes[image.size] += 1
            grey = grey and image.mode in ("1", "L", "LA", "I", "I;16", "F")
    common = max(sizes, key=lambda s: (sizes[s], s))
    shrink = min(1, LARGEST_SIDE / max(common))
    shape = (size, size) if size else tuple(max(1, round(n * shrink)) for n in common)
    return shape, "L" if grey else "RGB"


def _decode(files: list[tuple[Path, int]], shape: tuple[int, int], mode: str) -> tuple[Tensor, Tensor]:
    """All images as uint8 (N, C, H, W), scaled and cropped at the center to one shape, and labels (N,)."""
    from PIL import ImageOps
    from tqdm.auto import tqdm

    images = np.empty((len(files), shape[1], shape[0], len(mode)), dtype=np.uint8)

    def read(i):
        with _open(files[i][0]) as image:
            try:
                image.draft(mode, shape)
                pixels = image.convert(mode)
            except (OSError, ValueError, SyntaxError) as error:
                raise DataError(
                    f"The image {files[i][0]} cannot be decoded ({error}); replace or remove it."
                ) from error
        images[i] = np.asarray(ImageOps.fit(pixels, shape) if pixels.size != shape else pixels).reshape(images[i].shape)

    with ThreadPoolExecutor(4) as pool:
        for _ in tqdm(pool.map(read, range(len(files))), "Reading images", len(files), leave=False, delay=1):
            pass
    return _as_images(images), torch.tensor([label for _, label in files])
