"""The file of a model: equal outputs in a fresh process, every byte accounted for, damage always noticed."""

import copy
import errno
import json
import os
import pickle
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from workbench.artifact import ArtifactError, coding, contexts, decode, encode, ledger, load, pack, save, writing
from workbench.artifact.architecture import BUILDABLE, CONTAINERS, build_layer, layer_spec
from workbench.artifact.format import Reader
from workbench.models import build
from workbench.surgery import clone, replace_layer, weighted_layers
from workbench.techniques import Quantization
from workbench.weights import (
    Cast,
    Codebook,
    FakeQuantize,
    InputQuantizer,
    Mask,
    NormalFloat,
    attach_input_quantizer,
    describe,
    parametrize_weight,
    weight_parametrizations,
)

NET = '''
import torch
from torch import nn

class Net(nn.Module):
    """Somebody's own class: convolutions, normalization, a parameter and a buffer of its own, tied weights."""

    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, 12, 3, stride=2)
        self.gain = nn.Parameter(torch.ones(12, 1, 1))
        self.register_buffer("keep", torch.ones(12, 1, 1, dtype=torch.bool))
        self.hidden = nn.Linear(12, 12)
        self.tied = nn.Linear(12, 12, bias=False)
        self.tied.weight = self.hidden.weight
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        x = self.second(x) * self.gain * self.keep
        return self.head(self.tied(torch.relu(self.hidden(x.mean((2, 3))))))
'''
NAMES = {}
exec(NET, NAMES)  # the fresh process imports the same text as a module
Net = NAMES["Net"]

FRESH = """
import pathlib, sys
import torch
from safetensors.torch import save_file
import workbench as wb
from net import Net
torch.set_num_threads(1)
outputs = {}
for path in pathlib.Path(sys.argv[1]).glob("*.wb"):
    model = wb.load(path, like=Net()) if path.stem.startswith("own") else wb.load(path)
    example = torch.linspace(-1, 1, 2 * 28 * 28).reshape(2, 1, 28, 28).to(next(model.parameters()).dtype)
    with torch.no_grad():
        outputs[path.stem] = model(example)
save_file(outputs, pathlib.Path(sys.argv[1], "outputs.safetensors"))
"""


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def filled(model):
    """Give the model weights, statistics and buffers that no constructor makes."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
        tensor.data = torch.rand(tensor.shape, generator=generator) - 0.4 * (tensor.dim() > 1)
    for buffer in (b for b in model.buffers() if b.dtype == torch.bool):
        buffer.view(-1)[::3] = False
    return model.eval()


def own():
    return filled(Net())


def example(model):
    return torch.linspace(-1, 1, 2 * 28 * 28).reshape(2, 1, 28, 28).to(next(model.parameters()).dtype)


def outputs(model):
    with torch.no_grad():
        return model(example(model))


def masked(model, sparsity=0.6):
    model = clone(model)
    for _, layer in weighted_layers(model):
        size = layer.weight.abs().flatten()
        keep = torch.ones(len(size), dtype=torch.bool)
        keep[size.argsort()[: int(sparsity * len(size))]] = False
        parametrize_weight(layer, Mask(keep.reshape(layer.weight.shape)))
    return model


def quantizer(weight, bits, per_channel=True, symmetric=True):
    """Return the min-max quantizer of a weight."""
    rows = weight.detach().flatten(1) if per_channel else weight.detach().reshape(1, -1)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if symmetric:
        scale, zero = torch.maximum(-low, high) / (2 ** (bits - 1) - 1), torch.zeros(len(rows))
    else:
        scale = (high - low) / (2**bits - 1)
        zero = -(2 ** (bits - 1)) - torch.round(low / scale)
    scale = scale.clamp(min=1e-8)
    axis = 0 if per_channel else None
    return FakeQuantize(scale if per_channel else scale[0], zero if per_channel else zero[0], bits, axis, symmetric)


def quantized(model, bits=8, per_channel=True, symmetric=True, inputs=False):
    model = clone(model)
    for i, (_, layer) in enumerate(weighted_layers(model)):
        parametrize_weight(layer, quantizer(layer.weight, bits, per_channel, symmetric))
        if inputs:
            attach_input_quantizer(layer, InputQuantizer(torch.tensor(0.03 + i / 99), torch.tensor(100 + i)))
    return model


def coded(model, make, names=("weight",)):
    """Stack what `make` returns for a tensor on the tensors of these names in all layers that have them."""
    model = clone(model)
    for layer in list(model.modules()):
        for name in names:
            if isinstance(getattr(layer, name, None), torch.Tensor):
                parametrize_weight(layer, make(getattr(layer, name).detach()), name)
    return model


def codebook(tensor, levels=(-0.4, -0.21, 0.0, 0.17, 0.55)):
    levels = torch.tensor(levels)
    return Codebook(levels, (tensor[..., None] - levels).abs().argmin(-1))


def grouped(tensor, learned=False):
    rows = tensor.reshape(len(tensor), -1)
    scale = torch.stack([part.abs().amax(1) for part in rows.split(4, 1)], 1).clamp(min=1e-6) / 7
    scale = nn.Parameter(scale) if learned else scale
    return FakeQuantize(scale, torch.zeros_like(scale), 4, 0, group_size=4)


def cast(dtype, scaled=None):
    def make(tensor):
        largest = {"tensor": tensor.abs().max, "channel": tensor.reshape(len(tensor), -1).abs().amax}
        scale = None if scaled is None else largest[scaled](*[1] * (scaled == "channel")) / torch.finfo(dtype).max
        return Cast(dtype, scale)

    return make


def normal_float(tensor):
    return NormalFloat(torch.stack([part.abs().max() for part in tensor.reshape(-1).split(16)]), 16)


NORMS = ("weight", "bias", "running_mean", "running_var")


def low_rank(model, name):
    """Replace a 3×3 convolution by two, as a factorization does."""
    model = clone(model)
    layer = model.get_submodule(name)
    first = nn.Conv2d(layer.in_channels, 3, layer.kernel_size, layer.stride, layer.padding, bias=False)
    replace_layer(model, name, nn.Sequential(first, nn.Conv2d(3, layer.out_channels, 1)))
    return model


def narrow(model):
    """Halve the channels between the first two convolutions of `Net`, as channel pruning does."""
    model = clone(model)
    model.first, model.norm, model.second = (
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 12, 3, stride=2),
    )
    return filled(model)


def narrow_by_name(model):
    """Halve the channels of the second convolution of `glyphs-cnn`."""
    model = clone(model)
    before, after = model.features[1][0], model.features[2][0]
    half = before.out_channels // 2
    slim = nn.Conv2d(before.in_channels, half, 3, before.stride, 1, bias=False)
    replace_layer(model, "features.1.0", filled(slim))
    replace_layer(model, "features.1.1", filled(nn.BatchNorm2d(half)))
    replace_layer(model, "features.2.0", filled(nn.Conv2d(half, after.out_channels, 3, after.stride, 1, bias=False)))
    return model


def plain_sequential():
    first, second = nn.Linear(49, 10), nn.Linear(10, 10)
    layers = [nn.MaxPool2d((4, 4)), nn.Flatten(), first, nn.GELU(), second, nn.LayerNorm((10,)), second, nn.Softmax(-1)]
    return filled(nn.Sequential(*layers))


def cases():
    yield "own-plain", own()
    yield "own-masked", masked(own())
    yield "own-all-masked", masked(own(), 1.0)
    for bits in (2, 3, 4, 8):
        for per_channel in (False, True):
            for symmetric in (False, True):
                name = f"own-{bits}-bits-{'channel' if per_channel else 'tensor'}-{'sym' if symmetric else 'asym'}"
                yield name, quantized(own(), bits, per_channel, symmetric)
                yield f"{name}-inputs", quantized(own(), bits, per_channel, symmetric, inputs=True)
    yield "own-masked-then-quantized", quantized(masked(own()), 4, symmetric=False, inputs=True)
    yield "own-quantized-then-masked", masked(quantized(own(), 4, symmetric=False))
    yield "own-low-rank", low_rank(own(), "second")
    yield "own-low-rank-quantized", quantized(low_rank(own(), "second"), inputs=True)
    yield "own-narrow", narrow(own())
    yield "own-narrow-masked-quantized", quantized(masked(narrow(own())), 4)
    yield "own-half", own().half()
    yield "own-clustered", coded(own(), codebook)
    yield "own-masked-clustered", coded(masked(own(), 0.9), codebook)
    yield "own-clustered-masked", masked(coded(own(), codebook), 0.9)
    yield "own-no-zero-level-masked", masked(coded(own(), lambda t: codebook(t, (-0.4, 0.3, 0.5))), 0.9)
    yield "own-half-clustered", coded(own().half(), lambda t: codebook(t.float()))
    yield "own-in-groups", coded(own(), grouped)
    yield "own-masked-in-groups-learned", coded(masked(own()), lambda t: grouped(t, learned=True))
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        for scaled in (None, "tensor", "channel"):
            name = f"own-{str(dtype).removeprefix('torch.')}-{scaled}"
            yield name, coded(masked(own()) if scaled else own(), cast(dtype, scaled))
    yield "own-normal-float", coded(own(), normal_float)
    yield "own-masked-normal-float", masked(coded(own(), normal_float))
    yield "own-biases-and-norms", coded(own(), codebook, NORMS)
    yield "own-biases-and-norms-cast", masked(coded(own(), cast(torch.float16), NORMS))
    yield "lenet-5-sparse", coded(masked(filled(build("lenet-5", seed=0)), 0.993), codebook, ("weight", "bias"))
    yield "own-bfloat16-masked", masked(own().bfloat16())
    yield "own-double", own().double()
    yield "sequential", plain_sequential()
    yield "sequential-quantized", quantized(plain_sequential(), 5, inputs=True)
    for name in ("glyphs-cnn", "lenet-300-100", "lenet-5"):
        yield name, filled(build(name, width=0.5, seed=0))
    glyphs = filled(build("glyphs-cnn", seed=0))
    yield "glyphs-cnn-quantized", quantized(glyphs, inputs=True)
    yield "glyphs-cnn-narrow", narrow_by_name(glyphs)
    yield "glyphs-cnn-low-rank", quantized(masked(low_rank(glyphs, "features.3.0")), 4)


CASES = dict(cases())


@pytest.fixture(scope="module")
def fresh_outputs(tmp_path_factory):
    """Return what a fresh process computes with the files of all cases."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "net.py").write_text(NET)
    for name, model in CASES.items():
        assert save(model, folder / f"{name}.wb") == (folder / f"{name}.wb").stat().st_size
    path = os.pathsep.join([str(folder), *sys.path])
    subprocess.run([sys.executable, "-c", FRESH, str(folder)], check=True, env={**os.environ, "PYTHONPATH": path})
    return load_file(folder / "outputs.safetensors")


# --- the model comes back ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_computes_the_same(fresh_outputs, name):
    expected = outputs(CASES[name])
    assert expected.abs().sum() > 0 or name == "own-all-masked"
    assert torch.equal(fresh_outputs[name], expected)


def like_for(name):
    return Net() if name.startswith("own") else None


@pytest.mark.parametrize("name", CASES)
def test_layers_masks_and_quantizers_come_back(name):
    model, loaded = CASES[name], decode(encode(CASES[name]), like_for(name))
    assert not loaded.training
    for (_, before), (_, after) in zip(weighted_layers(model), weighted_layers(loaded), strict=True):
        assert torch.equal(before.weight, after.weight) and before.weight.dtype == after.weight.dtype
        assert list(map(type, weight_parametrizations(before))) == list(map(type, weight_parametrizations(after)))
        assert describe(before).kind == describe(after).kind
        assert hasattr(before, "input_quantizer") == hasattr(after, "input_quantizer")
        assert before.extra_repr() == after.extra_repr()
    for before, after in zip(input_quantizers(model), input_quantizers(loaded), strict=True):
        assert before.scale == after.scale and before.zero_point == after.zero_point
    for before, after in zip(weight_quantizers(model), weight_quantizers(loaded), strict=True):
        assert (before.bits, before.axis, before.symmetric) == (after.bits, after.axis, after.symmetric)
        assert torch.equal(before.step, after.scale) and before.group_size == after.group_size
        assert torch.equal(before.zero_point, after.zero_point)
    assert getattr(loaded, "architecture", None) == getattr(model, "architecture", None)


def weight_quantizers(model):
    return [module for module in model.modules() if isinstance(module, FakeQuantize)]


def input_quantizers(model):
    return [layer.input_quantizer for _, layer in weighted_layers(model) if hasattr(layer, "input_quantizer")]


@pytest.mark.parametrize("name", CASES)
def test_saving_what_was_loaded_gives_the_same_file(name):
    data = encode(CASES[name])
    assert encode(decode(data, like_for(name))) == data


def test_a_loaded_codebook_still_trains_and_stays_tied():
    model = own()
    book = codebook(model.hidden.weight)
    for layer in (model.hidden, model.tied):
        parametrize_weight(layer, Codebook(book.levels, book.assigned))
    loaded = decode(encode(model), Net())
    levels = [layer.parametrizations.weight[0].levels for layer in (loaded.hidden, loaded.tied)]
    assert levels[0] is levels[1] and torch.equal(levels[0], book.levels)
    loaded(example(loaded)).sum().backward()
    assert levels[0].grad.abs().sum() > 0


def test_a_loaded_quantized_model_still_gets_integer_kernels():
    ov = pytest.importorskip("openvino")
    model = CASES["own-8-bits-channel-sym-inputs"]
    kernels = []
    for each in (model, decode(encode(model), Net())):
        converted = ov.convert_model(each, example_input=example(each), input=[2, 1, 28, 28])
        compiled = ov.compile_model(converted, "CPU", {"INFERENCE_NUM_THREADS": 1})
        ops = compiled.get_runtime_model().get_ops()
        kernels.append([op.get_rt_info()["runtimePrecision"].astype(str) for op in ops])
    assert kernels[0] == kernels[1]
    assert "i8" in kernels[1] or "u8" in kernels[1]


def test_tied_weights_are_stored_once_and_stay_tied():
    model = own()
    rows = {row.name: row for row in ledger(model).rows}
    assert rows["tied.weight"].chosen == "tied" and rows["tied.weight"].total_bytes == 0
    loaded = decode(encode(model), Net())
    assert loaded.tied.weight is loaded.hidden.weight


def test_a_layer_used_twice_stays_one_layer():
    loaded = decode(encode(plain_sequential()))
    assert loaded[4] is loaded[6]
    apart = plain_sequential()
    apart[6] = filled(nn.Linear(10, 10))
    assert torch.equal(outputs(decode(encode(apart), like=plain_sequential())), outputs(apart))


def test_weights_that_share_a_tensor_but_not_a_mask_are_stored_apart():
    model = own()
    parametrize_weight(model.tied, Mask(torch.eye(12)))
    assert torch.equal(outputs(decode(encode(model), Net())), outputs(model))


def test_weights_that_a_quantizer_cannot_express_are_stored_as_they_are():
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 3))
    zero_out_of_range = FakeQuantize(torch.tensor(0.01), torch.tensor(500), 8, None, symmetric=False)
    parametrize_weight(model[1], zero_out_of_range)
    parametrize_weight(model[1], Mask(torch.rand(3, 784) > 0.5))
    assert ledger(model).rows[1].kind == "masked"
    assert torch.equal(outputs(decode(encode(model))), outputs(model))


def test_nan_and_infinite_weights_come_back_bit_by_bit():
    model = nn.Linear(4, 2)
    model.weight.data = torch.tensor([[float("nan"), -0.0, 0.0, float("inf")], [1.0, -1e-45, 0.0, 0.0]])
    assert decode(encode(quantized(masked(model)))).weight.shape == (2, 4)
    loaded = decode(encode(model))
    assert torch.equal(loaded.weight.view(torch.int32), model.weight.view(torch.int32))


def test_unknown_parametrizations_are_stored_as_the_values_they_give():
    model = plain_sequential()
    parametrize.register_parametrization(model[2], "weight", nn.Tanh())
    assert torch.equal(outputs(decode(encode(model))), outputs(model))


def test_a_compressed_model_may_serve_as_like():
    model = own()
    loaded = decode(encode(model), like=quantized(masked(model), inputs=True))
    assert torch.equal(outputs(loaded), outputs(model)) and not weight_quantizers(loaded)


def test_like_is_left_untouched():
    like = Net()
    before = copy.deepcopy(like.state_dict())
    decode(encode(low_rank(own(), "second")), like)
    assert all(torch.equal(value, before[key]) for key, value in like.state_dict().items())
    assert isinstance(like.second, nn.Conv2d)


def test_models_without_any_tensor_and_with_empty_tensors():
    assert isinstance(decode(encode(nn.Sequential(nn.Flatten(), nn.ReLU())))[1], nn.ReLU)
    assert decode(encode(nn.Sequential(nn.Embedding(3, 2)))) is not None
    assert len(decode(encode(nn.Sequential()))) == 0


ARGUMENTS = {
    "Linear": [3, 2, {"bias": False}],
    "Embedding": [5, 3, {"padding_idx": 1}],
    "LayerNorm": [[3, 3], {"eps": 0.1, "bias": False}],
    "GroupNorm": [2, 4, {"affine": False}],
    "LeakyReLU": [{"negative_slope": 0.2}],
    "PReLU": [{"num_parameters": 3}],
    "Hardtanh": [{"min_val": -2.0}],
    "Flatten": [{"start_dim": 0}],
    "Upsample": [{"scale_factor": 2.0, "mode": "bilinear", "align_corners": True}],
    "PixelShuffle": [2],
    "Softmax": [{"dim": 1}],
    "Dropout": [{"p": 0.25}],
}
BY_PREFIX = {
    "ConvTranspose": [4, 6, [3, 2, 1], {"stride": 2, "output_padding": 1, "groups": 2}],
    "Conv": [4, 6, [3, 2, 1], {"padding": "same", "dilation": 2, "groups": 2, "bias": False}],
    "BatchNorm": [4, {"eps": 0.1, "momentum": None}],
    "InstanceNorm": [4, {"affine": True}],
    "MaxPool": [3, {"stride": 2, "ceil_mode": True}],
    "AvgPool": [3, {"stride": 2, "padding": 1}],
    "Adaptive": [[2, 1, 1]],
    "Pad": [[1, 2, 3, 4]],
}


def arguments_of(name):
    found = (args for key, args in BY_PREFIX.items() if name.startswith(key) or key in name.removesuffix("2d")[-3:])
    args = ARGUMENTS.get(name) or next(found, [])
    if not name.startswith(("Conv", "Adaptive")):
        return copy.deepcopy(args)
    dimensions = int(name[-2])
    return [arg[:dimensions] if isinstance(arg, list) else copy.copy(arg) for arg in args]


@pytest.mark.parametrize("name", [name for name, kind in BUILDABLE.items() if kind not in CONTAINERS])
def test_every_buildable_layer_is_described_by_what_builds_it(name):
    layer = build_layer([name, *arguments_of(name)])
    again = build_layer(json.loads(json.dumps(layer_spec(layer))))
    assert layer_spec(layer)[0] == name
    assert repr(again) == repr(layer)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in layer.state_dict().items()}


# --- every byte is accounted for ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_ledger_sums_to_the_file(name):
    data, account = pack(CASES[name])
    assert account.total_bytes == len(data) == sum(account.parts().values())
    assert sum(row.total_bytes for row in account.rows) + account.header_bytes == len(data)
    for row in account.rows:
        if row.candidates:
            assert row.candidates[row.chosen] == row.total_bytes == min(row.candidates.values())


def test_the_ledger_of_a_plain_model():
    model = filled(build("lenet-300-100"))
    account = ledger(model)
    assert account.parameters == 266_610 and account.fp32_bytes == account.formula_bytes == 4 * 266_610
    assert account.total_bytes - account.fp32_bytes == account.header_bytes < 100
    assert account.ratio == pytest.approx(1, abs=1e-3)
    assert [row["name"] for row in account.to_rows()][:2] == ["1.bias", "1.weight"]
    assert "1,066,440" in str(account) and "header" in str(account)


def test_the_formula_counts_bits_times_weights():
    rows = {row.name: row for row in ledger(quantized(masked(filled(build("lenet-5")), 0.75), 4)).rows}
    assert rows["5.weight"].formula_bytes == 400_000 * 4 // 8 // 4
    assert rows["5.weight"].fp32_bytes == 1_600_000 and rows["5.weight"].parameters == 400_000


def test_size_falls_with_bits_and_with_sparsity():
    model = filled(build("lenet-300-100", width=0.5))
    bits = [len(encode(quantized(model, b))) for b in (8, 7, 6, 5, 4, 3, 2)]
    assert bits == sorted(bits, reverse=True) and len(set(bits)) == 7
    for stacked in (lambda m: m, lambda m: quantized(m, 8), lambda m: quantized(m, 2)):
        sizes = [len(encode(stacked(masked(model, s / 20)))) for s in range(10, 21)]
        assert sizes == sorted(sizes, reverse=True)


def test_ninety_percent_zeros_make_the_file_six_times_smaller():
    assert ledger(masked(filled(build("glyphs-cnn")), 0.9)).ratio > 6


def test_eight_bits_make_the_file_nearly_four_times_smaller():
    assert ledger(quantized(filled(build("glyphs-cnn")), 8, inputs=True)).ratio > 3.8


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("own-clustered", "clustered"),
        ("own-in-groups", "quantized"),
        ("own-float16-None", "cast"),
        ("own-normal-float", "normal-float"),
    ],
)
def test_the_ledger_names_the_kind_and_counts_levels_and_scales_as_tables(case, kind):
    row = next(row for row in ledger(CASES[case]).rows if row.name == "second.weight")
    assert row.kind == kind and bool(row.table_bytes) == (kind != "cast")


def test_a_sparse_model_of_a_known_name_has_almost_no_overhead():
    account = ledger(CASES["lenet-5-sparse"])
    assert account.header_bytes < 50 and account.total_bytes < 6000


def test_levels_and_scales_take_the_shortest_exact_form():
    bytes_of = lambda levels: ledger(coded(nn.Linear(40, 40), lambda t: codebook(t, levels))).rows[1].table_bytes
    steps, half, full = (torch.tensor([-0.3, -0.1, 0.1, 0.2]) * s for s in (1, 1, 1))
    steps, half = (steps * 64).round() / 64, half.half().float()
    assert bytes_of(steps.tolist()) < bytes_of(half.tolist()) < bytes_of(full.tolist())


# --- codings, against numpy and against Shannon ---------------------------------------------------------------------


@given(st.integers(0, 12), st.data())
def test_packing_is_what_numpy_packs(width, data):
    codes = data.draw(arrays(np.int32, st.integers(0, 60), elements=st.integers(0, 2**width - 1)))
    bits = np.array([int(b) for code in codes for b in np.binary_repr(code, width)[:width] if width], np.uint8)
    packed = coding.pack_bits(codes, width)
    assert packed == np.packbits(bits).tobytes() and len(packed) == coding.packed_size(len(codes), width)
    assert np.array_equal(coding.unpack_bits(packed, len(codes), width), codes)


@given(arrays(np.int32, st.integers(1, 300), elements=st.integers(-128, 127)), st.sampled_from([0, 5, -128]))
def test_symbols_come_back_in_every_form(symbols, zero):
    check_every_form(
        symbols,
        lambda stream: coding.code_symbols(symbols, zero, (len(symbols),), stream),
        lambda reader, form, stream: coding.read_symbols(reader, form, (len(symbols),), zero, stream),
    )


@given(arrays(np.uint32, st.integers(0, 100), elements=st.sampled_from([0, 0, 0, 1, 2**31, 2**32 - 1])))
def test_words_come_back_in_every_form(words):
    check_every_form(
        words,
        lambda stream: coding.code_words(words, (len(words),), stream),
        lambda reader, form, stream: coding.read_words(reader, form, (len(words),), words.dtype, stream),
    )


def check_every_form(values, write, read):
    """Force each form in turn by making `min` prefer it."""
    for form in coding.FORMS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coding, "min", lambda sizes, key, form=form: prefer(sizes, key, form), raising=False)
            code, sizes, stream = write(contexts.Stream())
        assert sizes[code.form] == len(code) == len(bytes(code)) + stream.size
        reader, played = Reader(bytes(code)), contexts.read_stream(bytes(stream))
        assert np.array_equal(read(reader, code.form, played), values) and not len(reader) and played.is_empty()


def prefer(sizes, key, form):
    if not isinstance(sizes, dict):
        return min(sizes, key=key)
    return form if form in sizes else "fixed"


MATRICES = st.tuples(st.integers(1, 12), st.integers(1, 40)).flatmap(
    lambda shape: arrays(np.int32, shape, elements=st.sampled_from([0, 0, 0, 0, 1, -1, 7, -255, 255]))
)


def through_contexts(levels, few):
    """Write a matrix and read it back, with at most `few` numbers coded one by one; return it and the bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contexts, "FEW", few)
        trial = coding.Trial.of(levels.shape, levels.reshape(-1), contexts.Stream(), with_values=True)
        played = contexts.read_stream(bytes(trial.stream))
        assert sum(trial.streamed) == trial.stream.size
        return coding._read_context(played, levels.shape).reshape(levels.shape), trial.stream.size, played


@given(MATRICES, st.sampled_from([0, 5, 3072]))
def test_a_matrix_comes_back_through_its_contexts(levels, few):
    found, _, played = through_contexts(levels, few)
    assert np.array_equal(found, levels) and played.is_empty()


@pytest.mark.parametrize("shape", [(2**11, 2**10), (3, 0)])
def test_shapes_that_take_too_long_are_refused_in_reading(shape):
    with pytest.raises(ArtifactError, match="coded by its structure, which is not done"):
        contexts.code_places(contexts.Player(contexts.read_stream(b"")), shape)


@pytest.mark.parametrize("few", [0, 3072])
def test_rows_and_columns_that_differ_take_fewer_bits_than_their_entropy(few):
    generator = np.random.default_rng(0)
    chance = np.outer(generator.exponential(size=200) ** 2, generator.exponential(size=300) ** 2) * 0.01
    levels = (generator.random(chance.shape) < chance).astype(np.int32)
    part = levels.mean()
    entropy_bytes = -(part * np.log2(part) + (1 - part) * np.log2(1 - part)) * levels.size / 8
    assert through_contexts(levels, few)[1] < 0.85 * entropy_bytes


def test_a_matrix_without_structure_takes_little_more_than_its_entropy():
    levels = (np.random.default_rng(0).random((300, 300)) < 0.02).astype(np.int32)
    entropy_bytes = -(0.02 * np.log2(0.02) + 0.98 * np.log2(0.98)) * levels.size / 8
    assert through_contexts(levels, 3072)[1] < 1.05 * entropy_bytes


@pytest.mark.parametrize("spread", (0.3, 1, 3, 12, 40))
def test_entropy_coding_comes_close_to_the_entropy(spread):
    symbols = np.random.default_rng(0).laplace(0, spread, 100_000).round().clip(-127, 127).astype(np.int32)
    shares = np.unique(symbols, return_counts=True)[1] / len(symbols)
    entropy_bytes = -(shares * np.log2(shares)).sum() * len(symbols) / 8
    table, stream = coding.entropy_encode(symbols, *coding.histogram(symbols))
    assert entropy_bytes < len(stream) + 4 < 1.01 * entropy_bytes + 12
    assert len(table) < 260


def test_files_of_today_are_read_tomorrow():
    """A later version of a library must not change what an old file means."""
    symbols = (np.arange(90, dtype=np.int32) ** 2 // 7 % 11) ** 2 // 12 - 3
    table, stream = coding.entropy_encode(symbols, *coding.histogram(symbols))
    assert (table + stream).hex() == GOLDEN_STREAM
    assert np.array_equal(coding.entropy_decode(Reader(bytes.fromhex(GOLDEN_STREAM)), 90), symbols)
    model = decode(bytes.fromhex(GOLDEN_FILE))
    assert torch.equal(model[0].weight, golden_model()[0].weight)
    assert encode(golden_model()).hex() == GOLDEN_FILE
    levels = ((np.arange(600) ** 2 // 7 % 31 == 0) * (np.arange(600) % 5 - 7)).astype(np.int32).reshape(20, 30)
    for few, stream in GOLDEN_CONTEXTS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(contexts, "FEW", few)
            trial = coding.Trial.of(levels.shape, levels.reshape(-1), contexts.Stream(), with_values=True)
        assert bytes(trial.stream).hex() == stream
    assert model(torch.ones(1, 6)).tolist() == golden_model()(torch.ones(1, 6)).tolist()


def golden_model():
    model = nn.Sequential(nn.Linear(6, 2))
    model[0].weight.data = (torch.arange(12.0) % 5 - 2).reshape(2, 6) / 4
    model[0].bias.data = torch.tensor([0.5, -0.25])
    parametrize_weight(model[0], Mask(torch.arange(12).reshape(2, 6) % 3 > 0))
    parametrize_weight(model[0], FakeQuantize(torch.tensor([0.25, 0.5]), torch.tensor([0, 1]), 3, 0, symmetric=False))
    attach_input_quantizer(model[0], InputQuantizer(torch.tensor(0.125), torch.tensor(7)))
    return model.eval()


GOLDEN_STREAM = "fdff0813237d68e01db30560fd4f511b70be99325b95f97a5765b63c6e55358c20f73e5b4447"
GOLDEN_FILE = (
    "574202197aab46710c86a363418415c25766c01001ea853bc830b6160000000000003f000080be259202fe03b80001feff024c20710000"
    "003e07b9e9c5d4"
)
GOLDEN_CONTEXTS = {
    0: "fc6c4881df97b1f82edf2b42722d9efe8d1f8fc8b2cfa8e6d96802fc8f0854caaade00446908308f088e78d4bc3da001",
    3072: "171dfab05cb58ff0d03deaf20d01524688b4ed5b14fb88b15d4358450b4d1154e11b6e51ad3e7c48b80608",
}


# --- damage, foreign files, wrong models ----------------------------------------------------------------------------

SMALL = encode(quantized(masked(own(), 0.3), 4, symmetric=False, inputs=True))


@settings(max_examples=300)
@given(st.integers(0, len(SMALL) - 1), st.integers(1, 255))
def test_any_changed_byte_is_noticed(position, change):
    data = bytearray(SMALL)
    data[position] ^= change
    with pytest.raises(ArtifactError):
        decode(bytes(data), own())


@given(st.integers(0, len(SMALL) - 1))
def test_any_truncation_is_noticed(length):
    with pytest.raises(ArtifactError):
        decode(SMALL[:length], own())


def with_checksum(content):
    return content + zlib.crc32(content).to_bytes(4, "little")


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_forged_file_gives_a_model_or_a_clear_error(data):
    """With a correct checksum anything can be claimed; nothing but ArtifactError may come out of it."""
    forged = bytearray(data.draw(st.sampled_from([SMALL, *SMALL_FILES]))[:-4])
    for _ in range(data.draw(st.integers(1, 3))):
        forged[data.draw(st.integers(3, len(forged) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(decode(with_checksum(bytes(forged)), data.draw(st.sampled_from([None, own()]))), nn.Module)
    except ArtifactError as error:
        assert str(error)


SMALL_FILES = [
    encode(CASES["own-masked-clustered"]),
    encode(CASES["own-masked-normal-float"]),
    encode(CASES["own-float8_e4m3fn-channel"]),
    encode(CASES["own-masked-in-groups-learned"]),
    encode(CASES["lenet-5-sparse"]),
    encode(golden_model()),
    encode(masked(plain_sequential())),
    encode(quantized(filled(build("glyphs-cnn", width=0.05)), 4, inputs=True)),
]


def claim(header):
    text = json.dumps(header).encode()
    return with_checksum(b"WB\x02" + writing.varint(len(text) + 1) + b"j" + text)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"layers": {"": ["system", "echo"]}}, "not one that a file may build"),
        ({"layers": {"": ["Linear", 2**40, 2**40]}}, "more than a file may hold|no sense"),
        ({"layers": {"": ["Linear", 2**20, 2**20]}}, "more than a file may hold"),
        ({"layers": {"": ["own", "Net", {"w": [2**60, 2**60]}]}}, "more than a file may hold"),
        ({"layers": {"": ["Linear", 3]}}, "do not fit"),
        ({"layers": {"": ["Linear", 3, 3, {"__class__": 1}]}}, "do not fit"),
        ({"layers": {"": ["Linear", -3, 3]}}, "no sense"),
        ({"layers": {"0": ["ReLU"]}}, "no sense"),
        ({"layers": {"": ["Sequential", "0"], "0": ["same", ""]}}, "inside itself"),
        ({"layers": {str(i): ["ReLU"] for i in range(70_000)}}, "layers, more than"),
        ({"layers": [1]}, "not a description"),
        ({"layers": {"": 3}}, "no sense"),
        ({"model": {"name": "glyphs-cnn", "width": 1e5, "classes": 47}}, "another version|more than"),
        ({"model": {"name": "nothing"}}, "no sense"),
        ({}, "."),
    ],
)
def test_absurd_claims_are_refused(header, words):
    with pytest.raises(ArtifactError, match=words):
        decode(claim(header))


def test_a_deflated_bomb_is_refused():
    shrink = zlib.compressobj(9, wbits=-15)
    bomb = b"z" + shrink.compress(b" " * 2**26) + shrink.flush()
    with pytest.raises(ArtifactError, match="header"):
        decode(with_checksum(b"WB\x02" + writing.varint(len(bomb)) + bomb))


def test_a_file_of_the_first_format_says_so():
    with pytest.raises(ArtifactError, match=r"format 1, .* save the model again"):
        decode(b"WBNCH" + SMALL)


def test_a_later_format_asks_for_an_update():
    with pytest.raises(ArtifactError, match="update workbench"):
        decode(with_checksum(b"WB\x03" + SMALL[3:-4]))


def test_foreign_files_and_other_paths(tmp_path):
    (tmp_path / "empty.wb").touch()
    (tmp_path / "foreign.wb").write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    (tmp_path / "magic.wb").write_bytes(b"WB")
    found = {"empty": "it is empty", "foreign": "not a model saved", "magic": "damaged", "missing": "No such file"}
    for name, words in found.items():
        with pytest.raises(ArtifactError, match=rf"{name}\.wb cannot be loaded: .*{words}"):
            load(tmp_path / f"{name}.wb")
    with pytest.raises(ArtifactError, match="not a file"):
        load(tmp_path)
    with pytest.raises(ArtifactError, match="not a file"):
        load("/dev/zero" if os.path.exists("/dev/zero") else tmp_path)


def test_a_class_of_ones_own_needs_like(tmp_path):
    save(own(), tmp_path / "own.wb")
    with pytest.raises(ArtifactError, match=r"holds a Net, a class of your own; pass .* like=Net\(\)"):
        load(tmp_path / "own.wb")
    with pytest.raises(ArtifactError, match="pass an instance"):
        load(tmp_path / "own.wb", like=Net)
    save(nn.Sequential(nn.ReLU(), own()), tmp_path / "inside.wb")
    with pytest.raises(ArtifactError, match="layer '1' is a Net"):
        load(tmp_path / "inside.wb")


def other(**layers):
    model = Net()
    for name, layer in layers.items():
        setattr(model, name, layer)
    return model


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (lambda: nn.Linear(2, 2), r"the model itself is Net.* in the file but Linear\(2, 2\)"),
        (lambda: other(norm=nn.ReLU()), r"layer 'norm' is BatchNorm2d\(8\) in the file but ReLU"),
        (lambda: other(extra=nn.ReLU()), "layer 'extra' is in the given model but not in the file"),
        (lambda: other(gain=nn.Parameter(torch.ones(3))), "the model itself is Net"),
    ],
)
def test_like_of_another_architecture_names_the_first_difference(like, words):
    with pytest.raises(ArtifactError, match=words):
        decode(encode(own()), like())


def test_a_layer_that_like_lacks_is_named():
    model = own()
    model.late = nn.Linear(3, 3)
    with pytest.raises(ArtifactError, match=r"layer 'late' \(Linear\(3, 3\)\) is in the file but not in the given"):
        decode(encode(model), own())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("model.pt", "not a model"),
        (nn.Sequential(nn.LazyLinear(3)), "run the model once"),
        (nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.complex64))]), "complex64"),
    ],
)
def test_models_that_cannot_be_saved_say_why(model, words, tmp_path):
    with pytest.raises(ArtifactError, match=words):
        save(model, tmp_path / "model.wb")
    assert not list(tmp_path.iterdir())


# --- saving is all or nothing ---------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "model.wb"
    save(golden_model(), path)
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(ArtifactError, match=r"model\.wb cannot be written: No space left on device\. What was there"):
        save(own(), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.wb"]


def test_a_real_limit_on_the_disk(tmp_path):
    resource = pytest.importorskip("resource", reason="file size limits are a POSIX matter")
    path = tmp_path / "model.wb"
    save(golden_model(), path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ArtifactError, match=r"cannot be written: .* unharmed"):
            save(own(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.wb"]


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be written: No such file or directory"):
        save(golden_model(), tmp_path / "nowhere" / "model.wb")
    with pytest.raises(ArtifactError, match="cannot be written"):
        save(golden_model(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_saving_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "link.wb").symlink_to(tmp_path / "real.wb")
    save(golden_model(), tmp_path / "link.wb")
    assert (tmp_path / "link.wb").is_symlink() and load(tmp_path / "real.wb") is not None


def test_loading_like_a_compressed_model_leaves_that_model_whole(tmp_path):
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    x = torch.randn(4, 8)
    small = Quantization(weight_bits=4).compress(net, x)
    expected = small(x)
    save(small, tmp_path / "small.wb")
    assert torch.equal(load(tmp_path / "small.wb", like=small)(x), expected)
    assert torch.equal(small(x), expected)
