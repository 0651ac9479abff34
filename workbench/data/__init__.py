"""Labelled images to train, compress and measure on: `load_data(name)` gives train, val and test splits.

`glyphs` is embedded and needs no network; the others come through torchvision into a cache folder; `folder:PATH` reads
your own images. Every split is shuffled once with a fixed seed, so any prefix of it is a fair sample of it.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from workbench.data.folder import fingerprint, load_folder
from workbench.data.glyphs import load_glyphs
from workbench.data.public import load_public
from workbench.data.splits import Data, DataError, Split

__all__ = ["DATA_SETS", "Data", "DataError", "Split", "cache_folder", "load_data"]

DATA_SETS = ("glyphs", "mnist", "fashion-mnist", "kmnist", "cifar10")


def load_data(name: str, size: int | None = None) -> Data:
    """Data by name: one of DATA_SETS, or "folder:PATH" with train/CLASS, test/CLASS and, optional, val/CLASS inside.

    `size` resizes the images to size×size pixels; a folder's default is its most common size, at most 224.
    Raises DataError with one sentence that says what to do. A second call with the same arguments is instant.
    """
    if size is not None and not (isinstance(size, int) and 1 <= size <= 4096):
        raise DataError(f"size={size!r} is no image size; give a whole number of pixels from 1 to 4096, or None.")
    if isinstance(name, str) and name.startswith("folder:"):
        path = Path(name.removeprefix("folder:")).expanduser().resolve()
        return load_folder(path, size, fingerprint(path))
    if name not in DATA_SETS:
        near = difflib.get_close_matches(str(name).lower(), DATA_SETS, 1, 0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"There is no data set {name!r}; {hint}Choose from {', '.join(DATA_SETS)} or folder:PATH.")
    return load_glyphs(size) if name == "glyphs" else load_public(name, size, cache_folder())


def cache_folder() -> Path:
    """Where downloads live: $WORKBENCH_DATA, or the platform's cache directory."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("WORKBENCH_DATA") or user_cache_path("workbench")).expanduser().resolve()
