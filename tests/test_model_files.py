"""Models in files of other programs: read, counted and run as they are, refused with a sentence otherwise."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from workbench.data import load_data
from workbench.export import export_onnx, export_openvino
from workbench.models import load_model
from workbench.profiler import profile
from workbench.profiler.layers import layer_times
from workbench.runtimes import RuntimeFailed, read_model_file, runtime
from workbench.subjects import opened

profile_module = sys.modules["workbench.profiler.profile"]  # whose name the function of that name hides

pytest.importorskip("onnx", reason="onnx is not installed; `pip install 'workbench[onnx]'` adds it.")


def small_model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, 5)).eval()


EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A model, and its files by their format."""
    folder, model = tmp_path_factory.mktemp("files"), small_model()
    export_onnx(model, folder / "small.onnx", EXAMPLE)
    export_openvino(model, folder / "small.xml", EXAMPLE)
    return model, {"ONNX": folder / "small.onnx", "OpenVINO IR": folder / "small.xml"}


@pytest.mark.parametrize("kind", ["ONNX", "OpenVINO IR"])
def test_a_file_says_what_it_takes_and_holds(written, kind):
    _, paths = written
    file = read_model_file(paths[kind])
    assert file.format == kind and file.shape == (0, 3, 8, 8) and file.dtype == torch.float32 and not file.fixed_batch
    assert file.example(batch=3).shape == (3, 3, 8, 8) and file.example((4, 3, 8, 8)).shape == (4, 3, 8, 8)
    conv, linear = file.layers(EXAMPLE)
    assert (conv.parameters, conv.macs) == (8 * 27, 8 * 27 * 64) and (linear.parameters, linear.macs) == (160, 160)
    assert file.size_bytes >= 4 * (8 * 27 + 160 + 5) and file.parameters() >= 8 * 27 + 160 + 5


@pytest.mark.parametrize(("kind", "name"), [("ONNX", "openvino"), ("OpenVINO IR", "openvino"), ("ONNX", "onnxruntime")])
def test_a_file_answers_as_the_model_does(written, kind, name):
    if name == "onnxruntime":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed.")
    model, paths = written
    prepared = runtime(name).prepare(read_model_file(paths[kind]), EXAMPLE)
    assert prepared.difference is None and prepared.precision == "fp32"
    with torch.inference_mode():
        torch.testing.assert_close(prepared(EXAMPLE), model(EXAMPLE), rtol=1e-4, atol=1e-4)
    assert prepared.timed() > 0


def test_the_profile_of_a_file_counts_what_the_model_has(written):
    model, paths = written
    ours = profile(read_model_file(paths["OpenVINO IR"]), EXAMPLE, runtimes=["openvino"], calls=10)
    theirs = profile(model, EXAMPLE, runtimes=["openvino"], calls=10)
    assert ours.model.macs == theirs.model.macs and ours.model.peak_activation_bytes is None
    assert ours.model.size_bytes == sum(
        paths["OpenVINO IR"].with_suffix(end).stat().st_size for end in (".xml", ".bin")
    )
    assert ours.runs[0].throughput.batch == 64 and "Activations" not in " ".join(ours.sentences())


def test_a_file_against_the_model_it_was_made_from_is_not_distinguishable(written):
    model, paths = written
    found = profile(read_model_file(paths["ONNX"]), EXAMPLE, model, ["openvino", "eager"], calls=40)
    assert [run.runtime for run in found.runs] == ["openvino"] and "is ONNX" in found.failed["eager"]
    assert 0.5 < found.runs[0].ratio.value < 2


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_layers_of_a_file_have_its_own_names(written, name):
    if name == "onnxruntime":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed.")
    _, paths = written
    file = read_model_file(paths["ONNX"])
    times = layer_times(file, EXAMPLE, name, calls=10)
    counted = {layer.name: layer.macs for layer in file.layers(EXAMPLE)}
    assert {one.name: one.macs for one in times.layers if one.macs} == {n: 2 * macs for n, macs in counted.items()}


def test_a_file_with_a_fixed_batch_is_measured_at_that_batch(tmp_path):
    path = tmp_path / "fixed.onnx"
    model = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, 192)), nn.Linear(192, 4)).eval()
    torch.onnx.export(model, (EXAMPLE[:1],), path, dynamo=False, input_names=["pixels"])
    file = read_model_file(path)
    assert file.fixed_batch == 1 and file.input_name == "pixels"
    found = profile(file, file.example(), runtimes=["openvino"], calls=10)
    assert found.runs[0].throughput.batch == 1
    with pytest.raises(ValueError, match=r"takes inputs of shape \(1, 3, 8, 8\)"):
        file.example((2, 3, 8, 8))


def test_a_file_that_leaves_sizes_open_asks_for_them(tmp_path):
    path = tmp_path / "open.onnx"
    axes = {"x": {0: "batch", 2: "height", 3: "width"}}
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    torch.onnx.export(
        model, (EXAMPLE,), path, dynamo=False, input_names=["x"], dynamic_axes=axes, opset_version=17
    )  # fmt: skip
    with pytest.raises(ValueError, match="--input"):
        read_model_file(path).example()
    assert read_model_file(path).example((1, 3, 16, 16)).shape == (1, 3, 16, 16)


def test_integers_go_in_as_integers(tmp_path):
    path = tmp_path / "words.onnx"
    model = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(24, 3)).eval()
    torch.onnx.export(model, (torch.zeros(1, 6, dtype=torch.int64),), path, dynamo=False)
    file = read_model_file(path)
    assert file.dtype == torch.int64
    prepared = runtime("openvino").prepare(file, file.example())
    assert np.isfinite(prepared(file.example()).numpy()).all()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.onnx", None, "no model file"),
        ("noise.onnx", b"not a model" * 20, "cannot be read as ONNX"),
        ("noise.xml", b"not a model" * 20, "cannot be read as OpenVINO IR"),
        ("weights.pt", b"", "ends in .onnx or .xml"),
    ],
)
def test_what_is_no_model_is_refused_with_its_name(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RuntimeFailed, match=says) as refused:
        read_model_file(path)
    assert name in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_an_ir_without_its_weights_is_refused(written, tmp_path):
    _, paths = written
    alone = tmp_path / "alone.xml"
    alone.write_bytes(paths["OpenVINO IR"].read_bytes())
    with pytest.raises(RuntimeFailed, match=r"\.bin"):
        read_model_file(alone)


def test_a_runtime_that_reads_no_such_file_says_so(written):
    _, paths = written
    with pytest.raises(RuntimeFailed, match="eager runs torch models"):
        runtime("eager").prepare(read_model_file(paths["ONNX"]), EXAMPLE)
    if runtime("onnxruntime").available()[0]:
        with pytest.raises(RuntimeFailed, match="reads ONNX"):
            runtime("onnxruntime").prepare(read_model_file(paths["OpenVINO IR"]), EXAMPLE)


def test_another_shape_than_the_file_s_is_refused(written):
    _, paths = written
    with pytest.raises(RuntimeFailed, match="does not work for inputs of shape"):
        runtime("openvino").prepare(read_model_file(paths["ONNX"]), torch.zeros(1, 4, 8, 8))


def graph_file(path, nodes, constants, takes=("x", "float32", ("batch", 16, 16)), gives=("y",)):
    """Write an ONNX file of nodes, each (kind, inputs, output), and of constants, arrays by their names."""
    from onnx import TensorProto, helper, numpy_helper, save

    name, dtype, shape = takes
    kind = getattr(TensorProto, {"float32": "FLOAT", "float64": "DOUBLE", "bfloat16": "BFLOAT16"}[dtype])
    outputs = [helper.make_tensor_value_info(one, kind, ("batch", *shape[1:])) for one in gives]
    graph = helper.make_graph(
        [helper.make_node(kind, inputs.split(), [output], output) for kind, inputs, output in nodes],
        "graph",
        [helper.make_tensor_value_info(name, kind, shape)],
        outputs,
        [numpy_helper.from_array(values, held) for held, values in constants.items()],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("takes", "gives", "says"),
    [
        (("x", "float32", ("batch", 16)), ("y", "z"), r"has 2 outputs \(y, z\); models of one can"),
        (("x", "float32", ()), ("y",), "takes a single number"),
        (("x", "bfloat16", ("batch", 16)), ("y",), "takes numbers of type bf16; export it for one of f32, "),
    ],
)
def test_files_that_cannot_be_profiled_are_refused(tmp_path, takes, gives, says):
    path = graph_file(tmp_path / "a.onnx", [("Neg", "x", "y"), ("Neg", "y", "z")], {}, takes, gives)
    with pytest.raises(RuntimeFailed, match=says):
        read_model_file(path)


@pytest.mark.parametrize(("dtype", "precision"), [("float64", "fp64"), ("float32", "fp32")])
def test_kernels_of_floats_have_the_type_of_their_tensors(tmp_path, dtype, precision):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed.")
    nodes = [("MatMul", "x w", "product"), ("Tanh", "product", "bent"), ("MatMul", "bent bent", "y")]
    path = graph_file(tmp_path / "a.onnx", nodes, {"w": np.eye(16, dtype=dtype)}, ("x", dtype, ("batch", 16, 16)))
    file = read_model_file(path)
    prepared = runtime("onnxruntime").prepare(file, file.example())
    assert prepared.precision == precision and [kernel.precision for kernel in prepared.kernels] == [precision] * 2


def test_weights_in_a_second_file_are_counted_once(tmp_path):
    import onnx

    nodes, square = [("MatMul", "x v", "z"), ("MatMul", "z w", "y")], np.ones((16, 16), np.float32)
    whole = onnx.load(graph_file(tmp_path / "whole.onnx", nodes, {"v": square, "w": square}))
    onnx.save(whole, tmp_path / "apart.onnx", save_as_external_data=True, location="apart.data", size_threshold=0)
    beside = (tmp_path / "apart.data").stat().st_size
    assert read_model_file(tmp_path / "apart.onnx").size_bytes == (tmp_path / "apart.onnx").stat().st_size + beside
    assert beside >= 2 * square.nbytes


TENTH = np.where(np.arange(256).reshape(16, 16) % 10, 0, 3).astype(np.float32)  # 26 weights of 256 are not 0
STEP, ZERO = np.float32(0.5), np.uint8(128)


@pytest.mark.parametrize(
    ("nodes", "constants", "nonzero"),
    [
        ([("MatMul", "x w", "y")], {"w": TENTH}, 26),
        ([("MatMul", "w x", "y")], {"w": TENTH}, 26),
        ([("Transpose", "w", "v"), ("MatMul", "x v", "y")], {"w": TENTH}, 26),
        (
            [("DequantizeLinear", "w s z", "v"), ("MatMul", "x v", "y")],
            {"w": (TENTH + 128).astype(np.uint8), "s": STEP, "z": ZERO},
            26,
        ),
        (
            [("QuantizeLinear", "w s z", "q"), ("DequantizeLinear", "q s z", "v"), ("MatMul", "x v", "y")],
            {"w": TENTH + np.float32(0.1), "s": STEP, "z": ZERO},  # a tenth is rounded to 0
            26,
        ),
        ([("Mul", "s x", "v"), ("MatMul", "x v", "y")], {"s": STEP}, None),  # attention: a scaled product of inputs
        ([("Add", "w x", "v"), ("MatMul", "x v", "y")], {"w": TENTH}, None),
        ([("MatMul", "w w", "v"), ("Mul", "x v", "y")], {"w": TENTH}, None),  # computed once, before any image
    ],
    ids=["plain", "first", "transposed", "codes", "rounded", "scaled", "added", "folded"],
)
def test_weights_are_what_no_input_has_a_part_in(tmp_path, nodes, constants, nonzero):
    file = read_model_file(graph_file(tmp_path / "a.onnx", nodes, constants))
    found = [(one.parameters, one.nonzero, one.macs) for one in file.layers(file.example(batch=2))]
    assert found == ([] if nonzero is None else [(256, nonzero, 16**3)])


def test_weights_of_several_products_at_once_are_multiplied_once_each(tmp_path):
    weights, takes = np.ones((4, 16, 8), np.float32), ("x", "float32", ("batch", 4, 16, 16))
    file = read_model_file(graph_file(tmp_path / "a.onnx", [("MatMul", "x w", "y")], {"w": weights}, takes))
    assert [one.macs for one in file.layers(file.example(batch=2))] == [4 * 16 * 16 * 8]


def test_products_of_inputs_that_are_rounded_on_the_way_are_integer_kernels(tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed.")
    from onnxruntime.quantization import quantize_dynamic

    plain = graph_file(tmp_path / "plain.onnx", [("MatMul", "x w", "y")], {"w": np.eye(16, dtype=np.float32)})
    quantize_dynamic(plain, tmp_path / "rounded.onnx")
    file = read_model_file(tmp_path / "rounded.onnx")
    (kernel,) = runtime("onnxruntime").prepare(file, file.example()).kernels
    assert kernel.precision == "int8" and "MatMul" in kernel.implementation


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """The shipped network, its data, and its ONNX file."""
    model, path = load_model("glyphs-cnn"), tmp_path_factory.mktemp("shipped") / "glyphs.onnx"
    data = load_data("glyphs")
    export_onnx(model, path, data.example(2))
    return model, data, path


def test_right_answers_of_a_file_are_those_of_the_model(shipped):
    model, data, path = shipped
    found = profile(read_model_file(path), data, model, ["openvino"], calls=6, throughput_batch=2)
    assert found.model.accuracy.total == found.baseline.accuracy.total == len(data.val) > 500
    assert found.model.accuracy == found.baseline.accuracy and torch.equal(found.model.hits, found.baseline.hits)
    assert found.model.accuracy.percent > 80 and "alidation accuracy is" in " ".join(found.sentences())


def test_right_answers_are_counted_on_the_runtime_named(shipped, monkeypatch):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed.")
    model, data, path = shipped
    few = replace(data, val=data.val.take(100))
    monkeypatch.setattr(runtime("openvino"), "_prepare_file", lambda *_: pytest.fail("it was not asked for"))
    right = torch.cat(list(_answers_of(read_model_file(path), few.val, "onnxruntime")))
    with torch.inference_mode():
        assert torch.equal(right, model(few.val.batch(slice(None))[0]).argmax(1))


def _answers_of(file, split, name):
    for predicted, _ in profile_module._answers(file, split, [runtime(name)]):
        yield predicted


def test_a_file_of_one_fixed_batch_answers_the_rest_too(shipped, tmp_path):
    model, data, _ = shipped
    path = tmp_path / "seven.onnx"
    torch.onnx.export(model, (data.example(7),), path, dynamo=False)
    split, file = data.val.take(30), read_model_file(path)
    assert file.fixed_batch == 7
    with torch.inference_mode():
        expected = model(split.batch(slice(None))[0]).argmax(1)
    assert torch.equal(torch.cat(list(_answers_of(file, split, "openvino"))), expected)


def test_images_that_do_not_fit_into_a_file_are_refused(written):
    _, paths = written
    with pytest.raises(ValueError, match="takes inputs of shape"):
        opened(str(paths["ONNX"]), data="glyphs")


def test_a_file_that_none_of_the_runtimes_runs_says_why(written):
    _, paths = written
    with pytest.raises(RuntimeFailed, match=r"run this model\. The runtime eager runs torch models"):
        profile_module._first_that_runs(read_model_file(paths["ONNX"]), EXAMPLE, [runtime("eager")])
