"""Public data sets through torchvision, which downloads and verifies them."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from workbench.data.splits import Data, DataError, as_images, make_data, one_line

DOWNLOAD_TIMEOUT_S = 20

PUBLIC = {  # name: (class, title, folder that torchvision makes, class names if its own are long)
    "mnist": ("MNIST", "MNIST", "MNIST", tuple("0123456789")),
    "fashion-mnist": ("FashionMNIST", "Fashion-MNIST", "FashionMNIST", None),
    "kmnist": ("KMNIST", "KMNIST", "KMNIST", None),
    "cifar10": ("CIFAR10", "CIFAR-10", "cifar-10-batches-py", None),
}


@lru_cache(maxsize=4)
def load_public(name: str, size: int | None, cache: Path) -> Data:
    """A public data set, read from the cache folder; downloaded there if it is absent or damaged."""
    import torchvision

    attribute, title, folder, classes = PUBLIC[name]
    kind = getattr(torchvision.datasets, attribute)
    found = _read(kind, cache)
    if found is None:
        _download(kind, title, folder, cache)
        found = _read(kind, cache)
    if found is None:
        raise DataError(f"The files of {title} in {cache / folder} cannot be read; delete that folder and try again.")
    parts = {key: (as_images(part.data), torch.as_tensor(part.targets)) for key, part in found.items()}
    return make_data(name, title, classes or found["train"].classes, parts, size)


def _read(kind, root: Path) -> dict | None:
    """Both parts of a torchvision data set, or None if it is absent, incomplete or damaged."""
    try:
        found = {"train": kind(root, train=True, download=False), "test": kind(root, train=False, download=False)}
    except Exception:  # torchvision reports a damaged file in many ways; all mean: not usable
        return None
    return found if all(len(part.data) == len(part.targets) > 0 for part in found.values()) else None


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
            f"{title} could not be downloaded ({one_line(error)}); check the network and try again, or put its "
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
