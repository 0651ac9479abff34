"""Your own images: a folder with train/CLASS/*.png and test/CLASS/*.png (any common image format, any size)."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from workbench.data.splits import Data, DataError, as_images, make_data, one_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
LARGEST_SIDE = 224


def _folders(path: Path) -> list[Path]:
    """The visible folders in `path`, by name."""
    try:
        return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise DataError(f"The folder {path} cannot be read ({error.strerror}); check its permissions.") from error


def fingerprint(path: Path) -> tuple:
    """Changes when an image is added or removed, so that a changed folder is read again."""
    folders = [c for part in ("train", "val", "test") if (path / part).is_dir() for c in _folders(path / part)]
    return tuple((str(folder), folder.stat().st_mtime_ns) for folder in folders)


@lru_cache(maxsize=4)
def load_folder(path: Path, size: int | None, fingerprint: tuple) -> Data:
    """Images in train/CLASS/*, test/CLASS/* and, if there, val/CLASS/*."""
    for part in ("train", "test"):
        if not (path / part).is_dir():
            what = f"has no folder {part}/" if path.is_dir() else "is a file" if path.exists() else "does not exist"
            raise DataError(
                f"The folder {path} {what}; it must hold train/CLASS/*.png and test/CLASS/*.png (or .jpg …)."
            )
    classes = [folder.name for folder in _folders(path / "train")]
    if not classes:
        raise DataError(f"{path / 'train'} has no class folders; put the images of each class into train/CLASS/.")
    found = {part: _files(path / part, classes) for part in ("train", "val", "test") if (path / part).is_dir()}
    shape, mode = _common_format([file for file, _ in found["train"]], size)
    _check_memory(sum(map(len, found.values())) * shape[0] * shape[1] * len(mode), path)
    parts = {part: _decode(files, shape, mode) for part, files in found.items()}
    return make_data(f"folder:{path}", path.name, classes, parts)


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


def _check_memory(needed: int, path: Path) -> None:
    """Refuse what would fill more than half of this machine's memory."""
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not every system tells
        if needed > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
            raise DataError(
                f"The images in {path} would take {needed / 1e9:.1f} GB, more than half of this machine's memory; "
                "pass a smaller size, such as size=64."
            )


@contextlib.contextmanager
def _open(file: Path):
    """An image opened with Pillow; whatever goes wrong with it names the file."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = "it is damaged, or no image" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)
        raise DataError(f"The image {file} cannot be read ({why}); replace or remove it.") from error


def _common_format(files: list[Path], size: int | None) -> tuple[tuple[int, int], str]:
    """The most common (width, height), longer side at most 224, and "L" if all are grey, else "RGB"."""
    sizes, grey = Counter(), True
    for file in files[:: max(1, len(files) // 1000)]:
        with _open(file) as image:
            sizes[image.size] += 1
            grey = grey and image.mode.split(";")[0] in ("1", "L", "LA", "I", "F")
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
            image.draft(mode, shape)  # lets the JPEG decoder shrink large photographs while it decodes
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):
                upright = upright.point(
                    lambda value: value * (1 / 256)
                )  # 16 bits, of which convert would keep the low 8
            pixels = upright.convert(mode)
            pixels = pixels if pixels.size == shape else ImageOps.fit(pixels, shape)
            images[i] = np.asarray(pixels).reshape(images[i].shape)

    with ThreadPoolExecutor(4) as pool:
        try:
            for _ in tqdm(pool.map(read, range(len(files))), "Reading images", len(files), leave=False, delay=1):
                pass
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, do not decode the rest
    return as_images(images), torch.tensor([label for _, label in files])
