"""Time by layer, the machine's roofs, and verdicts on models made on purpose: removing the cause makes them faster."""

import gc
import json
import math
import os
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_runtimes import images, quantized, vgg
from torch import nn

from workbench.profiler import (
    KINDS,
    Latency,
    LatencyModel,
    LayerTime,
    LayerTimes,
    Limits,
    Roofline,
    Taken,
    Verdict,
    compare,
    integer_map,
    latencies,
    layer_costs,
    layer_times,
    limits,
    low_rank_map,
    measure_layers,
    measure_roofline,
    points,
    roofline,
    sparse_map,
    verdicts,
    whole_verdict,
    width_map,
)
from workbench.profiler.roofline import cache_sizes
from workbench.profiler.verdicts import _of_the_whole, layer_verdicts
from workbench.runtimes import Kernel, Prepared, RuntimeFailed, runtime
from workbench.runtimes.base import product_macs
from workbench.runtimes.layers import _profiler_ms, instrumented, layers_inside, parts_of
from workbench.surgery import clone, weighted_layers
from workbench.techniques import Quantization
from workbench.weights import Mask, parametrize_weight

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: its events cannot be read")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """Remember the roofs of this run only, not in the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("platformdirs.user_cache_path", lambda *_: tmp_path_factory.getbasetemp())
        yield


def often(check, tries=4):
    """Return whether `check()` holds in one of a few tries: another process may disturb some of them."""
    return any(check() for _ in range(tries))


def speedup(quick, slow, name, example, quick_example=None):
    """Return how many times more images a second `quick` runs than `slow`, timed in turns."""
    pairs = [(quick, example if quick_example is None else quick_example), (slow, example)]
    ready = [runtime(name).prepare(model, batch) for model, batch in pairs]
    fast, base = latencies(ready, calls=40, budget_s=1.0)
    return fast.images_per_second / base.images_per_second


def by_layer(model, example, name="eager", **options):
    """Return the verdict on the whole and those on the layers, by name."""
    whole, *each = verdicts(model.eval(), example, runtime=name, **options)
    assert whole.layer is None and all(one.kind in KINDS for one in [whole, *each])
    return whole, {one.layer: one for one in each}


def require(name):
    """Skip where ONNX Runtime, the only runtime that need not be there, is not installed."""
    if name == "onnxruntime":
        pytest.importorskip("onnx", reason="onnx is not installed; `pip install 'workbench[onnx]'` adds it.")
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed.")


def tiny_layers(depth=40):
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(16, 16), nn.ReLU())]).eval()


def convolution(channels):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()).eval()


def unpooled(width):
    """Convolutions without max pooling, which really is quicker on the even planes that filters of zeros leave."""
    torch.manual_seed(0)
    shapes = ((1, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
    layers = [part for i, o, stride in shapes for part in (nn.Conv2d(i, o, 3, stride, padding=1), nn.ReLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)).eval()


def sparse(model, kept=0.3):
    model = clone(model)
    for _, layer in weighted_layers(model):
        parametrize_weight(layer, Mask(torch.rand(layer.weight.shape, generator=torch.manual_seed(0)) < kept))
    return model


# --- time by layer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eager", "eager channels-last", "openvino", "onnxruntime"])
def test_layers_and_what_lies_outside_add_up_to_the_whole(name, monkeypatch):
    """On a machine that was not quiet while the whole was timed, layers may add up to twice the whole, not to more."""
    require(name)
    module, totals = sys.modules["workbench.profiler.layers"], []
    times_of = module._times
    monkeypatch.setattr(module, "_times", lambda *given: totals.append(given[-1]) or times_of(*given))

    def close():
        found = layer_times(vgg(32), images(), name)
        assert sum(layer.ms for layer in found.layers) + found.outside_ms == pytest.approx(found.total_ms)
        assert sum(layer.share for layer in found.layers) == pytest.approx(1 - found.outside_ms / found.total_ms)
        json.dumps(found.to_dict())
        low, high = (-1.0, 1.0) if totals[-1].noisy else (-0.1, 0.25 if "eager" in name else 0.6)
        return low < found.outside_ms / found.total_ms < high

    assert often(close, tries=6)


@pytest.mark.parametrize("name", ["eager", "openvino", "onnxruntime"])
def test_layers_carry_the_names_and_costs_of_torch(name):
    require(name)
    model, example = vgg(), images(2)
    found = {layer.name: layer for layer in layer_times(model, example, name).layers}
    for cost in layer_costs(model, example):
        layer = found[cost.name]
        assert (layer.kind, layer.macs, layer.precision) == (cost.kind, 2 * cost.macs, "fp32")
        assert layer.weight_bytes >= 4 * model.get_submodule(cost.name).weight.numel()
        assert layer.activation_bytes > 4 * 2 * math.prod(cost.output_shape[1:])


@pytest.mark.parametrize("name", ["eager", "openvino"])
def test_layers_grow_until_all_calls_are_made_and_can_be_stopped_anywhere(name, monkeypatch):
    monkeypatch.setattr(sys.modules["workbench.profiler.layers"], "FRAME_S", 0.0)
    before, seen = torch.get_num_threads(), []
    for found in measure_layers([vgg(), vgg(16)], images(), name, threads=before + 1, calls=20):
        seen.append(len(found))
        assert torch.get_num_threads() == before and gc.isenabled()
    assert seen[:4] == [0] * 4 and set(seen) == {0, 2} and seen == sorted(seen) and seen.count(2) > 10
    assert [one.layers[-1].macs for one in found] == [32 * 10, 64 * 10]
    running = measure_layers([vgg()], images(), name, threads=before + 1)
    for _ in range(8):
        next(running)
    running.close()
    assert torch.get_num_threads() == before and gc.isenabled()


def test_onnxruntime_tells_its_layers_at_the_end():
    require("onnxruntime")
    *growing, last = measure_layers([vgg()], images(), "onnxruntime", calls=20)
    assert len(growing) > 20 and not any(growing) and last[0].layers


def test_a_slow_layer_is_the_one_that_is_found():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2048), nn.Linear(2048, 2048), nn.Linear(2048, 8))
    found = layer_times(model, torch.zeros(4, 64))
    assert found.slowest(1)[0].name == "2"


def test_what_hangs_on_a_layer_is_timed_beside_it():
    found = layer_times(quantized(vgg()), images())
    names = [layer.name for layer in found.layers]
    assert "0.input_quantizer" in names and names.index("0.input_quantizer") < names.index("0")


def test_integer_kernels_take_a_quarter_of_the_bytes():
    plain, small = (layer_times(model, images(), "openvino") for model in (vgg(32), quantized(vgg(32))))
    weights = lambda times, name: next(layer.weight_bytes for layer in times.layers if layer.name == name)
    assert small.precision == "int8"
    assert weights(plain, "4") > 3 * weights(small, "4")


class Attention(nn.Module):
    """Two blocks of a transformer, for images: runtimes put operations of their own into such a model."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(2)))
        self.last = nn.Linear(32, 8)

    def forward(self, x):
        return self.last(self.blocks(x.flatten(1).unflatten(1, (-1, 32))).mean(1))


@pytest.mark.parametrize("name", ["eager", "openvino", "onnxruntime"])
def test_a_transformer_shows_its_layers(name):
    require(name)
    torch.manual_seed(0)
    model, example = Attention().eval(), torch.rand(2, 1, 16, 16)
    assert runtime(name).prepare(model, example).difference < 1e-4
    found = {layer.name: layer for layer in layer_times(model, example, name, calls=20).layers}
    inside = {"blocks.0", "blocks.1"} if name == "eager" else {"blocks.0.linear1", "blocks.1.linear2"}
    assert inside | {"last"} <= found.keys()  # torch runs a whole block as one operation
    assert found["last"].macs == 2 * 32 * 8 and all(layer.ms >= 0 for layer in found.values())
    if name != "eager":  # what attention multiplies by has as many outputs as `linear2`, and fewer weights
        held = {cost.name: (2 * cost.macs, 4 * cost.weights) for cost in layer_costs(model, example) if cost.macs}
        assert {name: found[name].macs for name in held} == {name: macs for name, (macs, _) in held.items()}
        assert all(nbytes <= found[name].weight_bytes < 1.5 * nbytes for name, (_, nbytes) in held.items())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    "left, right, outputs, summed",
    [
        ((3, 4), (4, 5), (3, 5), 4),
        ((2, 3, 4), (2, 5, 4), (2, 3, 5), 4),  # transposed on the way
        ((7, 3, 4), (4, 5), (7, 3, 5), 4),  # one right factor for all
        ((2, 6, 50, 64), (2, 6, 64, 50), (2, 6, 50, 50), 64),
    ],
)
def test_a_product_s_multiply_adds_follow_from_its_shapes(left, right, outputs, summed):
    assert product_macs(left, right, outputs) == math.prod(outputs) * summed


class Products(nn.Module):
    """Two products of what is computed, as attention has them, and one by weights that are no layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16, 24))

    def forward(self, x):
        x = x.flatten(1, 2)
        alike = torch.tanh(torch.sin(x) @ torch.cos(x).transpose(1, 2))
        return (alike @ x) @ self.weight


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_products_that_are_no_layer_are_counted(name):
    require(name)
    torch.manual_seed(0)
    found = layer_times(Products().eval(), torch.rand(2, 1, 16, 16), name, calls=20).layers
    assert sorted(layer.macs for layer in found if layer.macs) == sorted([2 * 16**3, 2 * 16**3, 2 * 16 * 16 * 24])


class Functional(nn.Module):
    """Nearly all work is done by calls that are no layer."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(64, 8)

    def forward(self, x):
        for _ in range(20):
            x = torch.sin(x) @ x.transpose(1, 2)
        return self.last(x)


def test_work_outside_of_layers_is_not_blamed_on_a_layer():
    found, example = [], torch.rand(4, 64, 64) / 64
    assert often(lambda: found.append(by_layer(Functional(), example)[0]) or found[-1].kind == "uncounted work")
    assert "% of" in found[-1].evidence and "go by in calls that are no layer" in found[-1].evidence


@pytest.mark.parametrize("bits, options", [(8, {}), (4, {"granularity": "group", "activation_bits": 32})])
def test_kernels_have_the_names_of_torch_where_weights_are_read_from_codes(bits, options):
    model = Quantization(weight_bits=bits, **options).compress(vgg(32), images(8))
    found = runtime("openvino").prepare(model, images(2)).kernels
    assert [kernel.layer for kernel in found] == [name for name, _ in weighted_layers(model)]


def test_attention_is_one_layer_and_containers_are_none():
    model = nn.Sequential(nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)}), nn.Sequential(nn.Linear(16, 4)))
    assert [name for name, _ in layers_inside(model)] == ["0.attention", "1.0"]


def odd_widths():
    """Layers whose channels fill no block of 16, one of them in groups, and a linear layer that multiplies rows."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 20, 3, padding=1, groups=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(2), nn.Linear(784, 8)).eval()


def test_onnxruntime_s_kernels_have_the_names_of_torch_where_it_fuses_fills_up_and_rounds():
    require("onnxruntime")
    costs = {cost.name: (cost.kind, 2 * cost.macs) for cost in layer_costs(odd_widths(), images(2))}
    for model in (odd_widths(), quantized(odd_widths())):
        found = {one.name: one for one in layer_times(model, images(2), "onnxruntime", calls=20).layers}
        assert {name: (found[name].kind, found[name].macs) for name in costs} == costs
        kernels = runtime("onnxruntime").prepare(model, images(2)).kernels
        assert [kernel.layer for kernel in kernels] == list(costs)
        assert [kernel.precision for kernel in kernels] == [found[name].precision for name in costs]
    assert (found["0"].precision, found["0"].kernel) == ("int8", "QLinearConv")
    assert found["0"].weight_bytes < 4 * 90 <= found["2"].weight_bytes  # the second runs in fp32, from codes
    assert {"QuantizeLinear", "DequantizeLinear"} < {one.kind for one in found.values()}


def test_the_profiler_s_own_work_is_taken_off():
    require("onnxruntime")
    empty = nn.Sequential(*(nn.Linear(1, 1) for _ in range(40))).eval()

    def close():
        _profiler_ms.cache_clear()  # measured once in a process, and then perhaps disturbed
        found = layer_times(empty, torch.zeros(1, 1), "onnxruntime")
        return sum(layer.ms for layer in found.layers) < found.total_ms

    assert often(close, tries=12)


def test_stopped_profiles_leave_no_files(tmp_path, monkeypatch):
    require("onnxruntime")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    copy = instrumented(runtime("onnxruntime").prepare(vgg(), images()))
    copy.run()
    assert list(tmp_path.rglob("profile*"))
    del copy
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_runtime_without_layers_says_so():
    prepared = Prepared(runtime("eager"), images(), 1)
    with pytest.raises(RuntimeFailed, match="does not show its layers; choose one of openvino, eager, cuda, onnxrunti"):
        instrumented(prepared)


@needs_gpu
def test_events_time_the_layers_on_a_gpu():
    found = layer_times(vgg(64), images(64), "cuda")
    assert all(layer.ms > 0 for layer in found.layers)
    assert found.slowest(1)[0].kind == "Conv2d"


# --- roofs ---------------------------------------------------------------------------------------------------------


def test_roofs_are_measured_once_and_then_remembered(monkeypatch):
    first = roofline()
    assert first.peaks["fp32"] > 0 and first.bandwidths["memory"] > 0
    module = sys.modules["workbench.profiler.roofline"]  # the package's attribute of that name is the function
    monkeypatch.setattr(module, "measure_roofline", lambda threads, device: pytest.fail("measured again"))
    assert roofline() == first


def test_roofs_of_the_day_before_are_measured_again(monkeypatch):
    first = roofline()
    module = sys.modules["workbench.profiler.roofline"]
    os.utime(module._remembered_at(1, "cpu"), (0, time.time() - 25 * 3600))
    again = replace(first, peaks={"fp32": 1.0})
    monkeypatch.setattr(module, "measure_roofline", lambda threads, device: iter([again]))
    monkeypatch.setattr(module.Path, "write_text", lambda *_, **__: None)  # the made-up roofs are not kept
    assert roofline() == again


def test_measuring_roofs_yields_what_is_known_so_far():
    running = measure_roofline()
    known = [len(next(running).tried) for _ in range(3)]
    running.close()
    assert known == [1, 2, 3]


def test_nearer_levels_are_quicker():
    found = roofline()
    levels = [level for level in ("L1", "L2", "memory") if level in found.bandwidths]
    rates = [found.bandwidths[level] for level in levels]
    assert rates == sorted(rates, reverse=True)


def test_a_roof_is_the_lower_of_two_and_data_rests_in_the_nearest_level():
    roofs = Roofline({"fp32": 100.0}, {"L1": 50.0, "memory": 10.0}, 1, "", {}, {"L1": 1000, "L2": 10_000})
    assert roofs.attainable(1) == 10 and roofs.attainable(1, level="L1") == 50 and roofs.attainable(1000) == 100
    assert [roofs.level(size) for size in (500, 1000, 5000)] == ["L1", "L1", "memory"]


def test_cache_sizes_are_read(tmp_path):
    for index, (kind, level, size) in enumerate([("Data", 1, "48K"), ("Instruction", 1, "32K"), ("Unified", 2, "2M")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("type", kind), ("level", level), ("size", size)):
            (folder / name).write_text(f"{value}\n")
    assert cache_sizes(str(tmp_path)) == {"L1": 48 * 1024, "L2": 2 * 2**20}
    assert cache_sizes(str(tmp_path / "missing")) == {}


def test_layers_become_points_under_the_roofs():
    found = layer_times(vgg(32), images(4))
    shown = points(found)
    assert [point.name for point in shown] == [name for name, _ in weighted_layers(vgg(32))]
    one = next(layer for layer in found.layers if layer.name == "4")
    assert shown[1].gflops == pytest.approx(2 * one.macs / (one.ms / 1000) / 1e9)
    assert shown[1].intensity == pytest.approx(2 * one.macs / (one.weight_bytes + one.activation_bytes))


# --- verdicts on models made on purpose ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["eager", "openvino"])
def test_tiny_layers_are_launch_bound_and_more_images_a_call_help(name):
    example = torch.zeros(1, 16)
    whole, each = by_layer(tiny_layers(), example, name)
    assert whole.kind == "launch-bound" and {one.kind for one in each.values()} == {"launch-bound"}
    assert often(lambda: speedup(tiny_layers(), tiny_layers(), name, example, torch.zeros(16, 16)) > 4)


@pytest.mark.parametrize("name", ["eager", "openvino"])
def test_a_call_and_its_empty_layers_take_about_as_long_as_a_model_of_tiny_ones(name):
    def ratio():
        times = layer_times(tiny_layers(), torch.zeros(1, 16), name)
        return limits(name).starts_ms(layer.kind for layer in times.layers) / times.total_ms

    assert limits(name).call_ms > 0
    assert often(lambda: 0.6 < ratio() < 1.5)


def test_what_every_call_costs_is_no_uncounted_work():
    layer = LayerTime("a", "Linear", 0.001, 0.1, 0, 64, 64, "fp32", "")
    found = LayerTimes((layer,), 0.01, 0.009, "openvino", "fp32", 1, 1, False)
    known = Limits(roofline(), {"ReLU": 0.001}, "openvino", 1)
    whole = lambda known: _of_the_whole(found, [Verdict("a", "launch-bound", "It takes 1 µs.")], known)
    assert whole(known).kind == "uncounted work" and whole(replace(known, call_ms=0.006)).kind == "launch-bound"


def test_pooling_is_no_limit_of_the_machine_and_another_kernel_helps():
    pool, example = nn.Sequential(nn.MaxPool2d(3, 2, 1)).eval(), torch.rand(1, 64, 56, 56)
    whole, each = by_layer(pool, example)
    assert whole.kind == each["0"].kind == "uncounted work" and "is not counted" in each["0"].evidence
    ready = [runtime(name).prepare(pool, example) for name in ("openvino", "eager")]
    assert often(lambda: compare(*latencies(ready, calls=40)).value > 2)


def test_a_kernel_far_below_the_roofs_is_inefficient_and_another_helps():
    """torch's kernel for few channels in three dimensions reaches a tenth of the roofs; OpenVINO's is quicker."""
    torch.manual_seed(0)
    model, example = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1)).eval(), torch.rand(1, 4, 8, 16, 16)
    whole, each = by_layer(model, example)
    assert whole.kind == each["0"].kind == "inefficient kernel" and "another runtime" in whole.advice
    ready = [runtime(name).prepare(model, example) for name in ("openvino", "eager")]
    assert often(lambda: compare(*latencies(ready, calls=40)).value > 1.5)


@pytest.mark.parametrize("name", ["eager", "openvino"])
def test_a_wide_linear_layer_at_batch_1_is_memory_bound_and_fewer_bytes_help(name):
    wide, example = nn.Sequential(nn.Linear(4096, 4096)).eval(), torch.zeros(1, 4096)
    whole, each = by_layer(wide, example, name)
    assert whole.kind == each["0"].kind == "memory-bound"
    factors = nn.Sequential(nn.Linear(4096, 256, bias=False), nn.Linear(256, 4096)).eval()
    assert often(lambda: speedup(factors, wide, name, example) > 2)
    assert often(lambda: speedup(wide, wide, name, example, torch.zeros(8, 4096)) > 2)


@pytest.mark.parametrize("name", ["eager", "openvino"])
def test_a_large_convolution_at_batch_64_is_compute_bound_and_fewer_operations_help(name):
    example = torch.zeros(64, 64, 14, 14)
    whole, each = by_layer(convolution(64), example, name)
    assert whole.kind == each["0"].kind == "compute-bound"
    assert often(lambda: speedup(convolution(32), convolution(64), name, example, example[:, :32].contiguous()) > 1.5)


def test_a_4_bit_convolution_has_no_kernel_and_8_bits_with_integer_inputs_help():
    model = vgg(32)
    four, eight = quantized(model, 4, activations=False), quantized(model, 8)
    whole, each = by_layer(four, images(), "openvino", baseline=model)
    assert whole.kind == each["4"].kind == "no kernel" and "4-bit" in whole.evidence
    assert often(lambda: speedup(eight, four, "openvino", images()) > 1.2)


def test_4_bits_that_run_in_int8_are_named():
    _, each = by_layer(quantized(vgg(32), 4), images(), "openvino")
    assert each["4"].kind == "no kernel" and "computes them in int8" in each["4"].evidence


def test_rounded_weights_alone_fall_back_to_fp32_and_rounding_inputs_helps():
    model = vgg(32)
    weights, both = quantized(model, 8, activations=False), quantized(model, 8)
    whole, each = by_layer(weights, images(), "openvino", baseline=model)
    assert whole.kind == each["4"].kind == "fell back to fp32" and "Round the inputs too" in whole.advice
    assert often(lambda: speedup(both, weights, "openvino", images()) > 1.2)
    assert often(lambda: by_layer(both, images(), "openvino", baseline=model)[0].kind == "faster")


@pytest.mark.parametrize("name", ["eager", "openvino"])
def test_single_zeros_have_no_kernel_and_removing_channels_helps(name):
    model = unpooled(32)
    whole, each = by_layer(sparse(model), images(), name, baseline=model)
    assert whole.kind == each["4"].kind == "no kernel" and "zero" in whole.evidence
    assert often(lambda: speedup(unpooled(16), sparse(model), name, images()) > 1.2)


@pytest.mark.parametrize("name, odd", [("eager", 33), ("openvino", 17)])
def test_an_odd_width_is_unaligned_and_one_channel_less_helps(name, odd):
    example, even = torch.zeros(1, odd, 28, 28), torch.zeros(1, odd - 1, 28, 28)
    assert often(lambda: by_layer(convolution(odd), example, name)[1]["0"].kind == "unaligned width")
    quick = lambda: speedup(convolution(odd - 1), convolution(odd), name, example, even)
    assert often(lambda: quick() > 1.1 * (odd / (odd - 1)) ** 2)
    assert "unaligned width" not in [one.kind for one in by_layer(convolution(odd - 1), even, name)[1].values()]


def test_simulated_rounding_is_conversion_overhead_and_leaving_it_out_helps():
    model = nn.Sequential(*[nn.Conv2d(1, 1, 3, padding=1) for _ in range(6)]).eval()
    rounded = quantized(model)
    _, each = by_layer(rounded, images())
    assert {one.kind for name, one in each.items() if "input_quantizer" in name} == {"conversion overhead"}
    assert often(lambda: speedup(model, rounded, "eager", images()) > 1.2)


# --- the whole, from what was already measured ---------------------------------------------------------------------


def taken(model, latency, kernels=()):
    return Taken.of(model, latency, layer_costs(model, images()), kernels)


def judged(model, baseline, name="openvino", known=None):
    ready = [runtime(name).prepare(one, images()) for one in (model, baseline)]
    now, before = latencies(ready, calls=60)
    kernels = [one.kernels for one in ready]
    return whole_verdict(taken(model, now, kernels[0]), taken(baseline, before, kernels[1]), known)


def test_the_same_model_is_inside_the_noise():
    assert often(lambda: judged(vgg(), vgg()).kind == "inside the noise")


def test_a_faster_model_is_said_to_be_faster_and_why():
    found = []
    assert often(lambda: found.append(judged(vgg(8), vgg(32))) or found[-1].kind == "faster")
    assert "fewer multiply-adds" in found[-1].evidence and found[-1].advice == ""
    assert often(lambda: "compute in int8" in judged(quantized(vgg(32)), vgg(32)).evidence)


def test_zeros_that_no_kernel_skips_are_not_said_to_make_it_faster():
    model, took = vgg(), lambda ms: Latency(((ms,),) * 40, "eager", "fp32", 1, 1, 1)
    sparse = replace(taken(model, took(1.0)), zeros=0.9)
    found = whole_verdict(sparse, taken(model, took(1.2)))
    assert found.kind == "faster" and "no kernel skips its zeros" in found.evidence
    assert "zeros" not in whole_verdict(taken(model, took(1.0)), taken(model, took(1.2))).evidence


def rounded(bits, kernels, inputs=True):
    """Judge a model whose layers are rounded to so many bits and run such kernels, beside the one it was made from."""
    model = vgg()
    latency = Latency(((1.0,),), "openvino", "fp32", 1, 1, 1)
    found = [Kernel(name, precision, "") for name, precision in kernels.items()]
    inputs = frozenset(bits if inputs is True else inputs)
    now = replace(taken(model, latency, found), bits=bits, rounded_inputs=inputs)
    return whole_verdict(now, taken(model, latency))


def test_the_bits_and_inputs_blamed_are_those_of_the_layers_without_an_integer_kernel():
    found = rounded({"1": 4, "2": 8}, {"1": "int8", "2": "fp32"}, inputs=["1"])
    assert "rounded to 8 bits" in found.evidence and "4-bit" not in found.evidence
    assert found.kind == "fell back to fp32" and "Round the inputs too" in found.advice
    found = rounded({"1": 8, "2": 8, "3": 8}, {"1": "int8", "2": "fp32", "3": "fp32"})
    assert found.kind == "no kernel" and "no integer kernel for 2 layers" in found.evidence
    assert "Round" not in found.advice and "Try another runtime" in found.advice
    assert "4 bits and computes them in int8" in rounded({"1": 4, "2": 8}, {"1": "int8", "2": "int8"}).evidence


def test_a_rounded_layer_without_a_kernel_is_not_told_to_round_its_inputs():
    """ONNX Runtime multiplies a rounded convolution in groups in fp32, and the layers around it in int8."""
    require("onnxruntime")
    model = odd_widths()
    whole, each = by_layer(quantized(model), images(2), "onnxruntime", baseline=model)
    assert each["2"].kind == "no kernel" and "Weights and inputs are rounded" in each["2"].evidence
    assert "Round" not in each["2"].advice and "Round" not in whole.advice


def test_zeros_are_counted_among_weights_without_biases():
    """A depthwise layer of 1×1 has as many biases as weights; they are no part of what is zero or not."""
    model = nn.Sequential(nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 1, groups=8)).eval()
    assert taken(model, None).zeros == 0
    with torch.no_grad():
        model[0].weight.zero_()
    assert taken(model, None).zeros == 0.5


def slower(model, baseline, known=None, layers=(), ms=2.0):
    """Judge two models as if the first had taken twice as long."""
    from test_profiler import taken as rounds

    now, before = rounds(*[(ms,)] * 8), rounds(*[(1.0,)] * 8)
    return whole_verdict(taken(model, now), taken(baseline, before), known, layers)


def test_fewer_operations_that_do_not_pay_are_blamed_on_nothing_that_was_not_measured():
    square = nn.Sequential(nn.Flatten(), nn.Linear(784, 64)).eval()
    factors = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.Linear(16, 64)).eval()
    odd = nn.Sequential(nn.Flatten(), nn.Linear(784, 51)).eval()
    for model in (factors, odd):
        found = slower(model, square)
        assert found.kind == "slower" and "its layers tell" in found.advice
        assert "start" not in str(found) and "multiple" not in str(found)
        assert slower(model, square, ms=1.0).kind == "inside the noise"
    assert slower(square, square).kind == "slower" and slower(square, square).advice == ""


def test_starts_and_odd_widths_are_blamed_where_they_were_measured():
    square = nn.Sequential(nn.Flatten(), nn.Linear(784, 64)).eval()
    odd = nn.Sequential(nn.Flatten(), nn.Linear(784, 51)).eval()
    starts = lambda ms: Limits(roofline(), {"ReLU": ms, "Linear": ms}, "eager", 1)
    found = slower(odd, square, starts(1.5))
    assert found.kind == "launch-bound" and "starting a call and 1 empty layer takes 1.5 ms here" in found.evidence
    assert slower(odd, square, starts(0.5)).kind == "slower"  # a quarter of the 2 ms explains little
    width = Verdict("1", "unaligned width", "1 takes 2 ms with 51 and 0.5 ms with 48.", "Round its widths.")
    found = slower(odd, square, starts(0.5), [Verdict("0", "memory-bound", "It moves."), width])
    assert found.kind == "unaligned width" and width.evidence in found.evidence and found.advice == width.advice
    assert slower(odd, square, starts(0.5), [Verdict("0", "memory-bound", "It moves.")]).advice.startswith(
        "Ask the verdicts"
    )


def test_a_verdict_needs_latencies_of_one_run():
    ready = runtime("eager").prepare(vgg(), images())
    separate = [taken(vgg(), latencies([ready], calls=20)[0]) for _ in range(2)]
    with pytest.raises(ValueError, match="measure both in one call"):
        whole_verdict(*separate)


def test_a_verdict_reads_as_sentences():
    one = Verdict("conv1", "memory-bound", "conv1 takes 1 ms.", "Store it in fewer bits.")
    assert str(one) == "conv1 takes 1 ms. Store it in fewer bits."
    assert json.loads(json.dumps(one.to_dict()))["kind"] == "memory-bound"


# --- win and lose --------------------------------------------------------------------------------------------------


def test_maps_grow_cell_by_cell_and_stop_when_closed():
    growing = sparse_map(sparsities=(0.5, 0.99), batches=(8,), size=256)
    first = next(growing)
    assert np.isfinite(first.ratio[0, 0]) and np.isnan(first.ratio[0, 1])
    last = next(growing)
    assert np.isnan(first.ratio[0, 1]) and np.isfinite(last.ratio).all()
    assert (last.low <= last.ratio).all() and (last.ratio <= last.high).all()
    assert json.loads(json.dumps(first.to_dict()))["ratio"][0][1] is None
    growing.close()


def test_more_zeros_and_lower_ranks_win_more():
    def grows():
        *_, zeros = sparse_map(sparsities=(0.5, 0.99), batches=(64,), size=512)
        *_, ranks = low_rank_map(ranks=(0.05, 1.0), sizes=(1024,))
        return zeros.ratio[0, 1] > 2 * zeros.ratio[0, 0] and ranks.ratio[0, 0] > 2 > 1.2 > ranks.ratio[0, 1]

    assert often(grows)


def test_integer_kernels_win_and_full_blocks_of_channels_waste_nothing():
    def holds():
        *_, integers = integer_map(bits=(8,), widths=(64,))
        *_, widths = width_map(widths=(64, 65), sides=(14,))
        return integers.ratio[0, 0] > 1.2 and 1.1 * widths.ratio[0, 1] < widths.ratio[0, 0]

    assert often(holds)


def test_a_cell_that_cannot_run_stays_empty():
    tables = list(integer_map(bits=(8,), widths=(8,), name="cuda"))
    assert tables == [] or torch.cuda.is_available()


# --- predicted before measured -------------------------------------------------------------------------------------


class Machine:
    """A machine on which a layer takes known times: 10 µs, 5 µs for each million multiply-adds, 2 µs outside."""

    def times(self, model, example):
        parts = [part for part in parts_of(model, example) if part.macs]
        layers = tuple(
            LayerTime(part.name, part.kind, 0.01 + 0.005 * part.macs / 1e6, 0.0, part.macs, 0, 0, "fp32", "")
            for part in parts
        )
        total = sum(layer.ms for layer in layers) + 0.002
        return LayerTimes(layers, total, 0.002, "eager", "fp32", len(example), 1, False)


def test_costs_of_a_known_machine_are_found_and_carry_to_other_sizes():
    machine, example = Machine(), images(2)
    fitted = LatencyModel("eager", threads=1, batch=2)
    for width in (16, 32, 64):
        fitted.learn(vgg(width), example, machine.times(vgg(width), example))
    for width in (24, 40, 56):
        measured = machine.times(vgg(width), example).total_ms
        fitted.track(fitted.predict_ms(vgg(width), example), measured)
    assert len(fitted.errors) == 3 and fitted.median_error < 0.1


def test_layers_of_an_unknown_kind_leave_a_prediction_finite():
    fitted = LatencyModel("eager", threads=1, batch=1)
    fitted.learn(vgg(), images(), Machine().times(vgg(), images()))
    model = nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.Flatten())
    assert 0 <= fitted.predict_ms(model, images()) < math.inf


def test_a_larger_model_is_predicted_to_take_longer_and_rounding_on_openvino_to_be_quicker():
    models = [vgg(16), vgg(32), vgg(64), quantized(vgg(16)), quantized(vgg(32)), quantized(vgg(64))]
    fitted = LatencyModel.fit(models, images(), "openvino", calls=20)
    assert fitted.median_error is None
    assert fitted.predict_ms(vgg(24), images()) < fitted.predict_ms(vgg(48), images())
    assert fitted.predict_ms(quantized(vgg(48)), images()) < fitted.predict_ms(vgg(48), images())


def test_errors_are_tracked():
    fitted = LatencyModel("eager", threads=1, batch=1)
    assert fitted.track(1.1, 1.0) == pytest.approx(0.1)
    fitted.track(0.5, 1.0), fitted.track(1.0, 1.0)
    assert fitted.median_error == pytest.approx(0.1)


def test_a_layer_too_quick_for_the_clock_is_said_to_be_so():
    quick = LayerTime("pool", "Reduce", 0.0, 0.0, 0, 0, 100, "fp32", "")
    found = LayerTimes((quick,), 1.0, 1.0, "openvino", "fp32", 1, 1, False)
    known = Limits(roofline(), {"ReLU": 0.001}, "openvino", 1)
    (said,) = layer_verdicts(nn.Identity(), torch.zeros(1, 3, 4, 4), found, known)
    assert "less than the runtime's clock tells" in said.evidence and "0 µs;" not in said.evidence


def started(kind, ms):
    """Judge a model of three layers of that kind, 1 µs each, where an empty layer takes `ms` on this machine."""
    each = [LayerTime(name, kind, 0.001, 0.1, 0, 64, 64, "fp32", "") for name in "abc"]
    found = LayerTimes(tuple(each), 0.01, 0.007, "eager", "fp32", 1, 1, False)
    known = Limits(roofline(), {"ReLU": ms, "Linear": ms}, "eager", 1)
    said = layer_verdicts(nn.Identity(), torch.zeros(1, 3, 4, 4), found, known)
    return said[0].evidence, _of_the_whole(found, said, known).evidence


def test_starting_a_layer_is_said_to_be_measured_for_the_kinds_that_were():
    assert "starting an empty Linear alone takes 10 µs here" in started("Linear", 0.01)[0]
    assert "starting an empty layer alone takes 10 µs here" in started("LayerNorm", 0.01)[0]


def test_starts_that_add_up_to_more_than_the_whole_are_shown_as_measured():
    whole = started("Linear", 0.01)[1]
    assert "launch-bound" in whole
    assert "starting a call and 3 empty layers takes 30 µs here, and the whole model 10 µs" in whole
