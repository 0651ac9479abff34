import statistics
import threading
import time

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from workbench.runtimes import (
    RUNTIMES,
    RuntimeFailed,
    available_runtimes,
    bake,
    is_fake_quantized,
    runtime,
    threads,
)
from workbench.runtimes import openvino as openvino_runtime
from workbench.surgery import clone, weighted_layers
from workbench.weights import FakeQuantize, InputQuantizer, Mask, attach_input_quantizer, parametrize_weight


def vgg(width=8, classes=10):
    torch.manual_seed(0)
    layers, inputs = [], 1
    for channels in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        inputs = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)).eval()


def quantized(model, bits=8, activations=True):
    """Quantize by hand, symmetric per channel, inputs by their range on one batch."""
    model, ranges = clone(model), {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: ranges.__setitem__(layer, args[0].aminmax()))
        for _, layer in weighted_layers(model)
    ]
    with torch.no_grad():
        model(images(16))
    for hook in hooks:
        hook.remove()
    for _, layer in weighted_layers(model):
        scale = layer.weight.detach().flatten(1).abs().amax(1) / (2 ** (bits - 1) - 1)
        parametrize_weight(layer, FakeQuantize(scale, torch.zeros_like(scale), bits, axis=0))
        if activations:
            low, high = min(float(ranges[layer][0]), 0.0), float(ranges[layer][1])
            step = (high - low) / 255
            attach_input_quantizer(layer, InputQuantizer(torch.tensor(step), torch.tensor(round(-low / step))))
    return model


def images(count=1, seed=0):
    return torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def outputs(model, batch):
    with torch.no_grad():
        return model(batch)


def test_names_are_those_of_the_design():
    names = ["eager", "eager channels-last", "openvino", "onnxruntime"]
    names += ["cuda", "cuda tf32", "cuda half", "cuda bfloat16", "cuda graph", "cuda 2:4"]
    assert [one.name for one in RUNTIMES] == names
    assert runtime("openvino") is RUNTIMES[2]
    with pytest.raises(ValueError, match="choose one of eager"):
        runtime("abacus")


TOLERANCE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 2e-2, "bf16": 1e-1}
ANY_MODEL = [one for one in available_runtimes() if one.for_baseline() is one]  # the others take compressed ones only


@pytest.mark.parametrize("one", ANY_MODEL, ids=lambda one: one.name)
@pytest.mark.parametrize("batch", [1, 5])
def test_every_runtime_gives_the_outputs_of_the_model(one, batch):
    model = vgg()
    prepared = one.prepare(model, images(batch))
    tolerance = TOLERANCE[prepared.precision]
    for size in (batch, 3):  # also batches of another shape than the example
        expected = outputs(model, images(size, seed=1))
        assert torch.allclose(prepared(images(size, seed=1)), expected, rtol=tolerance, atol=tolerance)
    assert prepared.difference < tolerance
    assert one.name in prepared.describe() and prepared.precision in prepared.describe()


def test_openvino_runs_int8_kernels_whose_outputs_equal_the_fake_quantized_ones():
    model = quantized(vgg())
    prepared = runtime("openvino").prepare(model, images(8))
    assert prepared.precision == "int8"
    assert [kernel.layer for kernel in prepared.kernels] == [name for name, _ in weighted_layers(model)]
    assert all(kernel.precision == "int8" and "I8" in kernel.implementation.upper() for kernel in prepared.kernels)
    expected = outputs(model, images(8))
    # A sum that lands on a rounding tie may fall to the other side: one step of one activation, seen in the last layer.
    assert torch.allclose(prepared(images(8)), expected, atol=2e-3 * float(expected.abs().max()))


def test_openvino_runs_fp32_where_nothing_is_quantized_and_never_bf16_unasked():
    prepared = runtime("openvino").prepare(vgg(), images())
    assert prepared.precision == "fp32"
    assert {kernel.precision for kernel in prepared.kernels} == {"fp32"}


def test_openvino_names_what_runs_when_only_the_weights_are_quantized():
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    prepared = runtime("openvino").prepare(quantized(model, activations=False), images())
    assert prepared.precision == "fp32"
    assert "no layer runs an int8 kernel" in prepared.note


def test_openvino_names_a_mixture():
    model = vgg()
    half = quantized(model)
    for name, layer in weighted_layers(half)[2:]:
        half.set_submodule(name, model.get_submodule(name))
        assert layer is not half.get_submodule(name)
    assert runtime("openvino").prepare(half, images()).precision == "mixed int8/fp32"


@pytest.mark.parametrize("make", [vgg, lambda: quantized(vgg()), lambda: quantized(vgg(), 4, activations=False)])
def test_the_quick_conversion_compiles_to_the_kernels_of_the_official_one(make, monkeypatch):
    model = make()
    quick = runtime("openvino").prepare(model, images())
    asked = []

    def refuse(traced, example, shape):
        asked.append(example.shape)
        raise RuntimeError("not this way")

    monkeypatch.setattr(openvino_runtime, "_convert_directly", refuse)
    official = runtime("openvino").prepare(model, images())
    assert asked
    assert quick.kernels == official.kernels
    assert torch.allclose(quick(images()), official(images()), atol=1e-6)


def test_eager_bakes_masks_and_rounding_and_says_that_rounding_is_simulated():
    model = quantized(vgg())
    layer = weighted_layers(model)[1][1]
    parametrize_weight(layer, Mask(torch.rand(layer.weight.shape) > 0.5))
    prepared = runtime("eager").prepare(model, images())
    assert not any(parametrize.is_parametrized(one) for one in prepared.model.modules())
    assert prepared.precision == "fp32" and "simulated" in prepared.note
    assert torch.equal(prepared(images(3)), outputs(model, images(3)))
    assert runtime("eager").prepare(vgg(), images()).note == ""


def test_baking_leaves_the_original_parametrized():
    model = quantized(vgg())
    baked = bake(model)
    assert is_fake_quantized(model)
    assert all(parametrize.is_parametrized(layer, "weight") for _, layer in weighted_layers(model))
    assert torch.equal(outputs(baked, images()), outputs(model, images()))
    assert model[0].weight.shape == baked[0].weight.shape


def test_preparing_does_not_touch_a_model_in_training():
    model = vgg().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for one in ANY_MODEL:
        one.prepare(model, images(4))
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_raises_gives_one_clear_sentence():
    with pytest.raises(RuntimeFailed, match=r"fails on an input of shape \(1, 1, 28, 28\): RuntimeError"):
        runtime("eager").prepare(nn.Linear(3, 2), images())


@pytest.mark.parametrize("one", ANY_MODEL, ids=lambda one: one.name)
def test_a_model_of_whole_numbers_gets_whole_numbers(one):
    torch.manual_seed(0)
    words = torch.randint(0, 10, (4, 6))
    prepared = one.prepare(nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(24, 3)).eval(), words)
    assert prepared.difference < TOLERANCE[prepared.precision] and prepared(words).shape == (4, 3)
    assert prepared.timed() > 0


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x.flatten(1)[:, : self.calls]


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Foreign(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x).flatten(1)  # OpenVINO has no such operation


@pytest.mark.parametrize(
    "model, message", [(Growing(), "changing shape, .1, 1. and .1, 2."), (Pair(), "returns a tuple; wrap it")]
)
def test_outputs_that_cannot_be_measured_are_named(model, message):
    with pytest.raises(RuntimeFailed, match=message):
        runtime("eager").prepare(model, images())


def test_a_runtime_that_cannot_convert_says_so_and_the_others_go_on():
    with pytest.raises(RuntimeFailed, match=r"The runtime openvino cannot run this model: \w+"):
        runtime("openvino").prepare(Foreign(), images())
    assert runtime("eager").prepare(Foreign(), images())(images()).shape == (1, 784)


def test_a_failed_export_says_why_in_one_line_and_writes_no_graph(capfd):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed.")
    with pytest.raises(RuntimeFailed, match=r"onnxruntime cannot run this model: .*adaptive_avg_pool2d"):
        runtime("onnxruntime").prepare(nn.Sequential(nn.AdaptiveAvgPool2d(5), nn.Flatten()), images())
    assert capfd.readouterr().out == ""


def test_threads_are_put_back_also_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
    with pytest.raises(RuntimeFailed, match="at least one thread"):
        runtime("eager").prepare(vgg(), images(), threads=0)


def test_only_one_measurement_at_a_time():
    entered = threading.Event()

    def other():
        with threads(1):
            entered.set()

    with threads(1):
        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.1)
    thread.join(5)
    assert entered.is_set()


def test_branches_of_a_residual_block_keep_their_names():
    """Both end in as many values, and the compiled model may run the short one first."""
    from torchvision.models.resnet import BasicBlock

    from workbench.profiler.layers import layer_times

    short = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), BasicBlock(16, 32, 2, short)).eval()
    found = {one.name: one.weight_bytes for one in layer_times(model, torch.randn(1, 3, 16, 16), "openvino").layers}
    for name, count in {"1.conv1": 4608, "1.conv2": 9216, "1.downsample.0": 512}.items():
        assert 4 * count <= found[name] < 4 * count + 4 * 2 * 32  # the folded BatchNorm adds biases


def test_onnxruntime_rests_between_calls():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed.")
    prepared = runtime("onnxruntime").prepare(vgg(16), images(8), threads=2)

    def busy_after_a_call():
        prepared.run()
        wall, processor = time.perf_counter(), time.process_time()
        time.sleep(0.03)
        return (time.process_time() - processor) / (time.perf_counter() - wall)

    assert statistics.median(busy_after_a_call() for _ in range(9)) < 0.1  # of the sleep; spinning takes about half
