"""Files for other programs: run there, they answer as the model does here, to the image."""

import numpy as np
import pytest
import torch
from test_runtimes import images, quantized, vgg
from torch import nn

import workbench as wb
from workbench.export import ExportError, export_onnx, export_openvino
from workbench.runtimes import runtime
from workbench.surgery import weighted_layers

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed; `pip install -e '.[onnx]'` adds it.")
onnx = pytest.importorskip("onnx")
openvino = pytest.importorskip("openvino")

IMAGES = 300


@pytest.fixture(scope="module")
def model():
    return wb.load_model("glyphs-cnn")


@pytest.fixture(scope="module")
def data():
    return wb.load_data("glyphs")


def in_onnxruntime(path, batch):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]


def in_openvino(path, batch):
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return next(iter(compiled(batch.numpy()).values()))


WAYS = {"onnx": (export_onnx, in_onnxruntime), "xml": (export_openvino, in_openvino)}
SETTINGS = {
    "plain": lambda: wb.LowRank(rank=1.0),
    "channels": lambda: wb.Quantization(),
    "folded": lambda: wb.Quantization(fold=True),
    "groups": lambda: wb.Quantization(granularity="group", weight_bits=4, activation_bits=32),
    "clusters": lambda: wb.WeightClustering(bits=4),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_image_gets_the_same_answer_from_the_file(way, name, model, data, tmp_path):
    """Exported for a batch of two, run on a few hundred: the file takes batches of any size."""
    small = SETTINGS[name]().compress(model, data.train.take(64, seed=0).batch(slice(None))[0])
    export, run = WAYS[way]
    written = export(small, tmp_path / f"small.{way}", data.example(2))
    assert written.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    batch, _ = data.val.batch(slice(0, IMAGES))
    with torch.no_grad():
        expected = small(batch).numpy()
    answers = run(tmp_path / f"small.{way}", batch)
    assert (answers.argmax(1) == expected.argmax(1)).all()
    near = 0.05 if name in ("channels", "folded") else 1e-4  # a rounded input may fall on the level beside
    assert np.abs(answers - expected).max() <= near * np.abs(expected).max()


def test_rounded_weights_are_bytes_in_both_formats(tmp_path):
    plain = vgg(32)
    for way, (export, _) in WAYS.items():
        whole = export(plain, tmp_path / f"whole.{way}", images()).size_bytes
        small = export(quantized(plain), tmp_path / f"small.{way}", images()).size_bytes
        weights = sum(p.numel() for p in plain.parameters() if p.dim() > 1)
        assert 2.7 * weights < whole - small <= 3 * weights


def test_the_codes_in_an_onnx_file_are_those_of_the_model(tmp_path):
    small = quantized(vgg())
    export_onnx(small, tmp_path / "small.onnx", images())
    graph = onnx.load(tmp_path / "small.onnx").graph
    codes = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith("weight.codes")}
    for name, layer in weighted_layers(small):
        held = layer.parametrizations.weight
        expected = torch.quantize_per_channel(
            held.original.detach(), held[0].scale.double(), held[0].zero_point.long(), 0, torch.qint8
        ).int_repr()
        assert codes[f"{name}.weight.codes"].dtype == np.int8
        assert np.array_equal(codes[f"{name}.weight.codes"], expected.numpy())
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == len(codes) and kinds.count("DequantizeLinear") == 2 * len(codes)
    onnx.checker.check_model(onnx.load(tmp_path / "small.onnx"), full_check=True)


def test_onnxruntime_runs_integer_kernels_where_norms_are_folded():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4608, 4))
    prepared = runtime("onnxruntime").prepare(quantized(net), images(2))
    assert "int8" in prepared.precision and any(kernel.implementation == "QLinearConv" for kernel in prepared.kernels)
    plain = runtime("onnxruntime").prepare(net, images(2))
    assert plain.precision == "fp32" and plain.difference < 1e-5
    assert torch.allclose(plain(images(5)), net(images(5)), atol=1e-4)


class Choosing(nn.Module):
    """Goes another way for bright images than for dark ones, so that no file can be right about both."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else torch.nonzero(x).float()


def test_a_failed_export_leaves_what_was_there(tmp_path):
    class Sorting(nn.Module):
        def forward(self, x):
            return torch.linalg.qr(x)[0]

    for way, (export, _) in WAYS.items():
        path = tmp_path / f"old.{way}"
        path.write_text("as before")
        with pytest.raises(ExportError, match=r"fails on an input of shape .1, 5.: RuntimeError"):
            export(Choosing(), path, torch.ones(1, 5))
        assert path.read_text() == "as before" and not list(tmp_path.glob(".export-*"))
    with pytest.raises(ExportError, match="cannot be written as onnx"):
        export_onnx(Sorting(), tmp_path / "qr.onnx", torch.ones(3, 3))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ExportError, match="nowhere"):
        export_onnx(vgg(), tmp_path / "nowhere" / "small.onnx", images())


def test_a_model_in_half_precision_becomes_a_file_in_single(tmp_path):
    half = vgg().half()
    for way, (export, run) in WAYS.items():
        assert export(half, tmp_path / f"half.{way}", images().half()).difference < 1e-4
        answers = run(tmp_path / f"half.{way}", images(3))
        assert answers.dtype == np.float32
        with torch.no_grad():
            assert np.allclose(answers, half.float()(images(3)), atol=1e-3)
        half = half.half()
