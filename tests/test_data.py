"""The data sets: splits that do not leak, the same images each time, a clear sentence for what can fail."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import struct
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from workbench.data import DATA_SETS, DataError, load_data
from workbench.data.folder import load_folder
from workbench.data.glyphs import load_glyphs
from workbench.data.public import load_public
from workbench.paths import shipped

CLOSED = "http://127.0.0.1:9/"  # the discard port: refuses at once
ROOT = Path(__file__).resolve().parent.parent
REAL = [Path(p) for p in (os.environ.get("WORKBENCH_DATA"), ROOT.parent / "shared" / "data") if p]


def real(name: str) -> Path:
    """The folder of real data that holds `name`; skips the test where there is none."""
    for folder in REAL:
        if (folder / name).exists():
            return folder
    pytest.skip(f"no {name} here; set WORKBENCH_DATA to a folder that holds it")


def sentence(error) -> str:
    """The message of a DataError, which must be one line that ends as a sentence does."""
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


# -- glyphs


@pytest.fixture(scope="module")
def glyphs():
    return load_data("glyphs")


def test_glyphs_have_the_documented_shape(glyphs):
    assert glyphs.input_shape == (1, 28, 28)
    assert "".join(glyphs.classes) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
    for split in (glyphs.train, glyphs.val, glyphs.test):
        assert split.images.dtype == torch.uint8 and split.images.shape == (len(split), 1, 28, 28)
        assert split.labels.dtype == torch.int64 and split.labels.shape == (len(split),)
        assert split.labels.bincount().tolist() == [len(split) // 47] * 47


def test_no_typeface_family_is_in_two_splits(glyphs):
    train, val, test = (set(split.sources.tolist()) for split in (glyphs.train, glyphs.val, glyphs.test))
    assert not train & val and not train & test and not val & test
    assert len(train | val | test) == len(glyphs.sources) >= 400
    assert len(set(glyphs.sources)) == len(glyphs.sources)
    assert abs(len(test) / len(glyphs.sources) - 0.2) < 0.02 and abs(len(val) / len(glyphs.sources) - 0.1) < 0.02


def test_no_unseen_family_is_drawn_like_a_training_family(glyphs):
    def drawings(split):
        order = split.sources * 47 + split.labels
        flat = split.images[order.argsort()].flatten(1).float()
        flat = torch.nn.functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)
        return flat.view(-1, 47 * 784) / 47**0.5

    for unseen in (glyphs.val, glyphs.test):
        assert (drawings(unseen) @ drawings(glyphs.train).T).max() < 0.96


def test_every_glyph_has_ink_inside_its_margin(glyphs):
    images = torch.cat([split.images for split in (glyphs.train, glyphs.val, glyphs.test)])[:, 0]
    assert images.amax((1, 2)).min() >= 68
    margin = images.clone()
    margin[:, 2:-2, 2:-2] = 0
    assert margin.max() == 0


def test_any_prefix_of_the_glyphs_mixes_classes_and_families(glyphs):
    first = glyphs.val.batch(slice(0, 256))[1]
    assert len(first.unique()) > 40
    assert len(glyphs.val.sources[:256].unique()) > 40


def test_glyphs_are_small_and_read_once(glyphs):
    assert shipped("data", "glyphs.npy.xz").stat().st_size <= 6_000_000
    assert load_data("glyphs") is glyphs


def test_glyphs_are_the_same_each_time(glyphs):
    again = load_glyphs.__wrapped__(None)
    for name in ("train", "val", "test"):
        assert torch.equal(getattr(again, name).images, getattr(glyphs, name).images)
        assert torch.equal(getattr(again, name).labels, getattr(glyphs, name).labels)


def test_every_family_and_its_licence_is_listed(glyphs):
    text = shipped("data", "README.md").read_text(encoding="utf-8")
    listed = text[text.index("<!-- glyphs families -->") :]
    assert all(name.replace("|", " ") in listed for name in glyphs.sources)
    assert f"{len(glyphs.sources)} families" in text


def test_damaged_glyphs_are_reported(monkeypatch, tmp_path):
    (tmp_path / "glyphs.json").write_text("{}")
    (tmp_path / "glyphs.npy.xz").write_bytes(shipped("data", "glyphs.npy.xz").read_bytes()[:1000])
    monkeypatch.setattr("workbench.data.glyphs.shipped", lambda _, name: tmp_path / name)
    with pytest.raises(DataError) as error:
        load_glyphs.__wrapped__(None)
    assert "install workbench again" in sentence(error)


# -- splits


def test_batches_are_normalized_with_the_training_statistics(glyphs):
    images, labels = glyphs.train.batch(slice(None))
    assert images.dtype == torch.float32 and images.shape[1:] == glyphs.input_shape
    assert abs(images.mean()) < 1e-3 and abs(images.std() - 1) < 1e-3
    assert torch.equal(labels, glyphs.train.labels)
    assert glyphs.val.mean == glyphs.test.mean == glyphs.train.mean


def test_batches_cover_the_split_once(glyphs):
    plain = torch.cat([labels for _, labels in glyphs.val.batches(100)])
    shuffled = torch.cat([labels for _, labels in glyphs.val.batches(100, seed=1)])
    assert torch.equal(plain, glyphs.val.labels)
    assert not torch.equal(plain, shuffled) and torch.equal(plain.bincount(), shuffled.bincount())
    again = torch.cat([labels for _, labels in glyphs.val.batches(100, seed=1)])
    assert torch.equal(shuffled, again)


def test_take_is_even_over_the_classes_and_keeps_images_with_labels(glyphs):
    few = glyphs.val.take(100, seed=3)
    counts = few.labels.bincount(minlength=47)
    assert len(few) == 100 and counts.max() - counts.min() <= 1
    assert torch.equal(few.images, glyphs.val.take(100, seed=3).images)
    assert not torch.equal(few.labels, glyphs.val.take(100, seed=4).labels)
    everything = glyphs.val.take(10**9)
    assert len(everything) == len(glyphs.val)
    assert torch.equal(everything.labels.bincount(), glyphs.val.labels.bincount())
    one = few.images[0], few.labels[0], few.sources[0]
    same = [(glyphs.val.images == one[0]).all((1, 2, 3)) & (glyphs.val.sources == one[2])]
    assert one[1] in glyphs.val.labels[same[0]]


def test_example_is_as_long_as_asked(glyphs):
    assert glyphs.example().shape == (1, 1, 28, 28)
    assert glyphs.example(10_000).shape == (10_000, 1, 28, 28)


def test_images_are_resized_on_request():
    data = load_data("glyphs", size=14)
    assert data.input_shape == (1, 14, 14) and data.train.images.dtype == torch.uint8


# -- names


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(DataError) as error:
        load_data("MNSIT")
    assert "did you mean 'mnist'?" in sentence(error) and all(name in str(error.value) for name in DATA_SETS)
    for nonsense in ("", "zzzzzzz", None, 3):
        with pytest.raises(DataError):
            load_data(nonsense)


@pytest.mark.parametrize("size", [0, -1, 2.5, "32", 10**6])
def test_impossible_size(size):
    with pytest.raises(DataError, match="whole number of pixels"):
        load_data("glyphs", size=size)


# -- torchvision


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache folder and no memory of earlier loads."""
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path / "cache"))
    load_public.cache_clear()
    yield tmp_path / "cache"
    load_public.cache_clear()


@pytest.fixture
def offline(monkeypatch):
    from torchvision import datasets

    for kind in (datasets.MNIST, datasets.FashionMNIST, datasets.KMNIST):
        monkeypatch.setattr(kind, "mirrors", [CLOSED])
    monkeypatch.setattr(datasets.CIFAR10, "url", CLOSED + "cifar-10-python.tar.gz")


def test_real_mnist(monkeypatch):
    folder = real("MNIST/raw")
    before = sorted(folder.iterdir())
    monkeypatch.setenv("WORKBENCH_DATA", str(folder))
    data = load_data("mnist")
    assert (len(data.train), len(data.val), len(data.test)) == (55_000, 5_000, 10_000)
    assert data.classes == tuple("0123456789") and data.input_shape == (1, 28, 28)
    assert data.train.mean[0] == pytest.approx(0.1307, abs=5e-4) and data.train.std[0] == pytest.approx(
        0.3081, abs=5e-4
    )
    share = data.val.labels.bincount() / 5_000 - data.train.labels.bincount() / 55_000
    assert share.abs().max() < 1e-3
    assert data.test.labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert load_data("mnist") is data and sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist", "cifar10"])
def test_no_network(name, cache, offline):
    with pytest.raises(DataError) as error:
        load_data(name)
    text = sentence(error)
    assert "could not be downloaded" in text and str(cache) in text and "glyphs" in text
    assert not any(cache.iterdir())


def test_unwritable_cache(monkeypatch, tmp_path, offline):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError) as error:
        load_data("kmnist")
    assert "set WORKBENCH_DATA" in sentence(error)


def idx(array: np.ndarray) -> bytes:
    """An array in MNIST's file format."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A local mirror with a small MNIST; yields the folder that it serves."""
    from torchvision.datasets import MNIST

    folder, resources = tmp_path / "mirror", []
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, *shape in (("train", 60), ("t10k", 20)):
        for part, array in (
            ("images-idx3", generator.integers(0, 256, (*shape, 28, 28))),
            ("labels-idx1", np.arange(*shape) % 10),
        ):
            packed = gzip.compress(idx(array), mtime=0)
            (folder / f"{name}-{part}-ubyte.gz").write_bytes(packed)
            resources.append((f"{name}-{part}-ubyte.gz", hashlib.md5(packed).hexdigest()))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{running.server_port}/"])
        monkeypatch.setattr(MNIST, "resources", resources)
        yield folder
        running.shutdown()


def test_download_arrives_whole(cache, server):
    data = load_data("mnist")
    assert (len(data.train), len(data.val), len(data.test)) == (54, 6, 20)
    assert [p.name for p in cache.iterdir()] == ["MNIST"]


def test_half_a_download_never_counts(cache, server):
    last = server / "t10k-labels-idx1-ubyte.gz"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as error:
        load_data("mnist")
    sentence(error)
    assert not any(cache.iterdir())
    last.write_bytes(whole)
    assert len(load_data("mnist").test) == 20


def test_damaged_files_in_the_cache_are_fetched_again(cache, server):
    load_data("mnist")
    load_public.cache_clear()
    images = cache / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    assert len(load_data("mnist").train) == 54
    assert len(images.read_bytes()) == 16 + 60 * 784


def test_interrupted_download_leaves_nothing(cache, monkeypatch):
    from torchvision.datasets import MNIST

    def interrupt(self):
        Path(self.raw_folder).mkdir(parents=True)
        (Path(self.raw_folder) / "train-images-idx3-ubyte").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(MNIST, "download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_data("mnist")
    assert not any(cache.iterdir())


# -- folders


def paint(path: Path, color, size=(8, 6), mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    """Ten training and two test images each of two classes, 8×6 pixels."""
    load_folder.cache_clear()
    for i in range(10):
        paint(tmp_path / f"train/cat/{i}.png", (200, i, 0))
        paint(tmp_path / f"train/dog/{i}.jpg", (0, i, 200))
    for i in range(2):
        paint(tmp_path / f"test/cat/{i}.png", (200, i, 0))
        paint(tmp_path / f"test/dog/{i}.png", (0, i, 200))
    return tmp_path


def test_folder(folder):
    data = load_data(f"folder:{folder}")
    assert data.classes == ("cat", "dog") and data.input_shape == (3, 6, 8) and data.title == folder.name
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 4)
    assert data.val.labels.bincount().tolist() == [1, 1]
    red = data.test.images[:, 0].float().mean((1, 2))
    assert torch.equal(red > 100, data.test.labels == 0)
    assert load_data(f"folder:{folder}") is data


def test_folder_with_its_own_val_sizes_and_kinds(folder):
    paint(folder / "val/cat/0.bmp", 90, (30, 10), "L")
    paint(folder / "val/cat/1.gif", 1, (5, 50), "P")
    paint(folder / "val/dog/0.png", (1, 2, 3, 4), (6, 8), "RGBA")
    paint(folder / "val/dog/1.png", 65535, (6, 8), "I;16")
    data = load_data(f"folder:{folder}")
    assert (len(data.train), len(data.val)) == (20, 4) and data.val.images.shape == (4, 3, 6, 8)
    assert (data.val.images == 255).all((1, 2, 3)).sum() == 1  # 16 bits of white are white
    assert load_data(f"folder:{folder}", size=12).input_shape == (3, 12, 12)


def test_grey_folder_has_one_channel_and_large_images_shrink(tmp_path):
    for part in ("train", "test"):
        for i in range(3):
            paint(tmp_path / part / "a" / f"{i}.png", i, (448, 100), "L")
    assert load_data(f"folder:{tmp_path}").input_shape == (1, 50, 224)


def test_new_images_are_noticed(folder):
    before = load_data(f"folder:{folder}")
    paint(folder / "test/cat/new.png", (0, 0, 0))
    assert len(load_data(f"folder:{folder}").test) == len(before.test) + 1


def test_real_cifar10_jpeg(tmp_path):
    with zipfile.ZipFile(real("cifar10-jpeg.zip") / "cifar10-jpeg.zip") as archive:
        names = [n for n in archive.namelist() if n.endswith(".jpg")]
        archive.extractall(tmp_path, names[::100])
    top = next(p for p in (tmp_path, *tmp_path.iterdir()) if (p / "train").is_dir())
    data = load_data(f"folder:{top}")
    assert data.input_shape == (3, 32, 32) and len(data.classes) == 10
    assert len(data.train) + len(data.val) == 500 and len(data.test) == 100
    assert data.train.mean == pytest.approx((0.491, 0.482, 0.447), abs=0.03)


def broken(folder: Path, how: str) -> str:
    """Spoil the folder in one way; returns what the message must name."""
    if how == "missing":
        return str(folder / "nowhere")
    if how == "file":
        (folder / "pictures.zip").write_bytes(b"PK")
        return str(folder / "pictures.zip")
    if how == "no test":
        (folder / "test").rename(folder / "exam")
        return "test/"
    if how == "stranger":
        paint(folder / "test/bird/0.png", (0, 0, 0))
        return "'bird'"
    if how == "truncated":
        path = folder / "train/dog/3.jpg"
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:700])
        return str(path)
    if how == "no image":
        (folder / "train/cat/5.png").write_text("not an image")
        return str(folder / "train/cat/5.png")
    if how == "empty class":
        (folder / "train/bird").mkdir()
        return str(folder / "train/bird")
    if how == "no classes":
        for file in (folder / "train").rglob("*.*"):
            file.unlink()
        for empty in (folder / "train").iterdir():
            empty.rmdir()
        return "train/CLASS/"
    raise AssertionError(how)


@pytest.mark.parametrize(
    "how", ["missing", "file", "no test", "stranger", "truncated", "no image", "empty class", "no classes"]
)
def test_a_spoiled_folder_is_named_in_one_sentence(folder, how):
    named = broken(folder, how)
    path = named if how in ("missing", "file") else folder
    with pytest.raises(DataError) as error:
        load_data(f"folder:{path}")
    assert named in sentence(error)


def test_more_images_than_memory(folder, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda _: 50)
    with pytest.raises(DataError) as error:
        load_data(f"folder:{folder}")
    assert "size=64" in sentence(error)
