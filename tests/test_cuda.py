"""The GPU's runtimes: what can be known without a GPU, and, marked `needs_gpu`, what runs on one."""

import copy
import json
import runpy
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_profiler import taken as rounds
from test_runtimes import TOLERANCE, images, outputs, quantized, vgg
from torch import nn

from workbench.cli.main import parser as cli_parser
from workbench.panel import lesson
from workbench.profiler import (
    latencies,
    layer_costs,
    layer_times,
    limits,
    memory,
    profile,
    roofline,
    software_first,
    verdicts,
    whole_verdict,
)
from workbench.profiler.comparison import profile_record, read_profiles, write_profiles
from workbench.profiler.gpu import COPY_BYTES, copies
from workbench.profiler.layers import LayerTime
from workbench.profiler.verdicts import Taken, _missing_kernel
from workbench.reports import investigate
from workbench.runtimes import RUNTIMES, SPARSE_KERNEL, Kernel, RuntimeFailed, bake, runtime
from workbench.runtimes.cuda import (
    LEAST_FLUSH_BYTES,
    Cuda,
    PreparedGraph,
    _tf32_switches,
    computing_in,
    flush_bytes,
    lacking,
)
from workbench.runtimes.layers import instrumented, parts_of
from workbench.runtimes.sparse import (
    MULTIPLE,
    SparseLayer,
    is_two_four,
    require_sparse,
    sparse_refusals,
    sparsified,
)
from workbench.subjects import Subject
from workbench.surgery import clone, weighted_layers
from workbench.techniques import SemiStructuredPruning

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the CUDA runtimes cannot be run")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: nothing is refused")
ON_GPU = [one.name for one in RUNTIMES if one.device == "cuda"]
DENSE = [name for name in ON_GPU if name != "cuda 2:4"]
CASES = {"cuda": "fp32", "cuda tf32": "tf32", "cuda half": "fp16", "cuda bfloat16": "bf16", "cuda graph": "fp16"}
SCRIPT = Path(__file__).parent.parent / "scripts" / "make_gpu_records.py"


def two_four(model):
    return SemiStructuredPruning().compress(model)


def wide(classes=10):
    """Return layers that suit the sparse kernel, but for their zeros, and one that does not."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 1, stride=2), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, classes)]
    return nn.Sequential(*layers).eval()


# --- names and refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_GPU)
@without_gpu
def test_each_says_why_it_is_not_there(name):
    assert runtime(name).available() == (False, "no GPU here")
    with pytest.raises(RuntimeFailed, match=f"{name} cannot be used: no GPU here"):
        runtime(name).prepare(vgg(), images())


def test_the_label_names_what_computes():
    assert {name: runtime(name).precision for name in ON_GPU} == {**CASES, "cuda 2:4": "fp16"}
    assert runtime("cuda tf32").dtype == runtime("cuda").dtype == torch.float32


def test_an_older_gpu_is_named_with_what_it_lacks():
    assert lacking((7, 5), (8, 0), "Tesla T4") == "Tesla T4 has compute capability 7.5, and this takes 8.0 or later"
    assert lacking((8, 0), (8, 0), "A100") == lacking((10, 0), (8, 9), "B200") == ""
    assert {name for name in ON_GPU if runtime(name).needs > (7, 5)} == {"cuda tf32", "cuda bfloat16", "cuda 2:4"}


def test_a_torch_without_cusparselt_is_named(monkeypatch):
    monkeypatch.setattr(Cuda, "available", lambda self: (True, ""))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert runtime("cuda 2:4").available() == (
        False,
        "this torch was built without cuSPARSELt, which has the sparse kernels",
    )


@without_gpu
def test_the_roofs_of_a_gpu_that_is_not_there_are_refused():
    with pytest.raises(RuntimeFailed, match="cannot be measured: no GPU here"):
        roofline(device="cuda")


def test_copies_stay_in_the_cache_or_leave_it():
    found = copies(50 * 2**20)
    assert 2 * found["L2"] <= 50 * 2**20 < found["memory"] and copies(0) == {"memory": COPY_BYTES}
    assert copies(2**30)["memory"] >= 2 * 2**30


@without_gpu
def test_the_script_refuses_without_a_gpu(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(SCRIPT)])
    with pytest.raises(SystemExit, match="no GPU here"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_s_profiles_are_kept_a_line_each_and_shown_with_gpu_and_day(tmp_path):
    profiled = runpy.run_path(str(SCRIPT))["profiled"]
    file, found = tmp_path / "gpu.jsonl", profiled("shufflenet_v2_x0_5", ["eager"], calls=2, batch=2, pixels=32)
    assert "No record of a GPU is shipped yet" in lesson.gpu_records(file).data and read_profiles(file) == []
    line = json.loads(json.dumps(profile_record(found, name="shufflenet_v2_x0_5")))
    (row,) = line["runtimes"]
    line["environment"]["gpu"] = "NVIDIA A100"
    line["runtimes"] = [
        row | {"runtime": "cuda"},
        row | {"runtime": "cuda 2:4", "kernels": [["fc", "fp16", SPARSE_KERNEL]]},
    ]
    write_profiles(file, [line, line | {"name": "another"}])
    assert read_profiles(file)[0] == line
    shown = lesson.gpu_records(file).data
    assert f"**NVIDIA A100, {line['saved'][:10]}**" in shown and "not on this machine" in shown
    dense, sparse = f"{row['baseline_median_ms']:.3f} ms", f"{row['median_ms']:.3f} ms"
    assert f"| shufflenet_v2_x0_5 | {dense}," in shown and f"| — | {sparse}," in shown
    file.write_text("{}\n")
    with pytest.raises(ValueError, match=r"line 1 of .* is not a saved profile"):
        read_profiles(file)


# --- switches ------------------------------------------------------------------------------------------------------


def test_all_switches_of_tf32_are_set_and_put_back():
    switches = _tf32_switches()
    assert {id(torch.backends.cuda.matmul)} < {id(place) for place, *_ in switches}
    now = lambda: [getattr(place, name) for place, name, *_ in switches]
    before = now(), torch.backends.cudnn.benchmark
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for precision in ("fp32", "tf32", "fp16"):
            with pytest.raises(ZeroDivisionError), computing_in(precision):
                assert now() == [on if precision == "tf32" else off for *_, off, on in switches]
                assert torch.backends.cudnn.benchmark
                raise ZeroDivisionError
            assert (now(), torch.backends.cudnn.benchmark) == before


def test_a_user_of_the_old_switches_can_still_read_them():
    old = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        with computing_in("fp32"):
            assert next(getattr(place, name) for place, name, *_ in _tf32_switches()) in ("ieee", False)
        assert torch.backends.cuda.matmul.allow_tf32 is True
    finally:
        torch.backends.cuda.matmul.allow_tf32 = old


# --- the flushed cache ---------------------------------------------------------------------------------------------


def test_a_flush_writes_twice_the_cache():
    assert flush_bytes(50 * 2**20) == 100 * 2**20 and flush_bytes(0) == LEAST_FLUSH_BYTES


def test_flushing_is_a_copy_and_reaches_the_baseline():
    one, sparse = runtime("cuda graph").flushing(), runtime("cuda 2:4").flushing()
    assert one.flush_l2 and one.name == "cuda graph" and type(one) is type(runtime("cuda graph"))
    assert sparse.for_baseline().flush_l2 and sparse.for_baseline().name == "cuda half"
    assert not any(runtime(name).flush_l2 for name in ON_GPU)


def test_a_profile_takes_the_option_where_there_is_nothing_to_flush():
    found = profile(vgg(), images(), runtimes=["eager"], calls=5, throughput_batch=2, flush_l2=True)
    assert "flushed" not in " ".join(found.sentences())


def test_the_command_line_has_the_option():
    read = lambda *flags: cli_parser([]).parse_args(["profile", "glyphs-cnn", *flags])
    assert read("--flush-l2").flush_l2 and not read().flush_l2


def test_the_sentences_of_a_profile_tell_the_note_and_the_baseline_s_runtime():
    found = profile(vgg(), images(), baseline=vgg(), runtimes=["eager"], calls=20, throughput_batch=2)
    note = "the L2 cache is flushed before each call"
    latency = replace(found.runs[0].latency, runtime="cuda 2:4")
    run = replace(found.runs[0], runtime="cuda 2:4", device="cuda", note=note, latency=latency)
    said = " ".join(replace(found, runs=(run,)).sentences())
    assert f"On cuda 2:4 {note}." in said and "the baseline on eager" in said and "the baseline there" not in said


# --- 2:4 -----------------------------------------------------------------------------------------------------------


def test_two_of_four_is_counted_in_each_group():
    row = torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 3]])
    assert is_two_four(row) and is_two_four(torch.zeros(2, 8))
    assert not is_two_four(torch.tensor([[1.0, 2, 3, 0, 0, 0, 0, 0]]))  # half of the row, and not of its first four
    assert not is_two_four(row[:, :6]) and not is_two_four(torch.ones(4, 4))


def test_a_reason_is_given_for_each_layer():
    model = two_four(wide(classes=47))
    dense = wide()
    assert sparse_refusals(bake(model)) == {
        "0": "neither linear nor a plain 1×1 convolution",
        "2": "",
        "6": "",
        "8": f"of a width that is no multiple of {MULTIPLE}",
    }
    assert set(sparse_refusals(dense).values()) == {"neither linear nor a plain 1×1 convolution", "not 2:4 sparse"}


def test_layers_that_others_read_or_hook_stay_dense():
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    attention.out_proj.weight.data.zero_()
    assert sparse_refusals(nn.Sequential(attention)) == {"0.out_proj": "read by the module around it"}
    rounded = quantized(nn.Sequential(nn.Flatten(), nn.Linear(784, 32)))
    rounded[1].parametrizations.weight.original.data.zero_()
    assert set(sparse_refusals(bake(rounded)).values()) == {"rounding their inputs or otherwise hooked"}
    alone = nn.Linear(32, 32)
    alone.weight.data.zero_()
    assert sparse_refusals(alone) == {"": "the whole model, with no module around it"}


def test_torch_takes_the_multiples_that_are_asked_for():
    table = torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[torch.float16]
    assert (table.sparse_min_rows, table.sparse_min_cols) == (MULTIPLE, MULTIPLE)


def test_without_a_sparse_layer_the_technique_is_named():
    with pytest.raises(RuntimeFailed) as refused:
        require_sparse(sparse_refusals(wide()))
    said = str(refused.value)
    assert "its layers that multiply are not 2:4 sparse (3), neither linear nor" in said
    assert "SemiStructuredPruning makes weights 2:4 sparse" in said and "cuda half" in said
    with pytest.raises(RuntimeFailed, match="it has none that multiplies"):
        require_sparse({})


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(32, 16), (5, 32)),
        (nn.Linear(32, 16, bias=False), (2, 7, 32)),
        (nn.Conv2d(32, 16, 1), (2, 32, 5, 7)),
        (nn.Conv2d(32, 16, 1, stride=(2, 3), bias=False), (2, 32, 9, 8)),
    ],
)
def test_a_sparse_layer_computes_what_the_layer_did(layer, shape):
    layer, x = layer.requires_grad_(False), torch.randn(shape)
    same = SparseLayer(layer, pack=lambda weight: weight)
    turned = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    for given in (x, turned, *([x.to(memory_format=torch.channels_last)] if x.dim() == 4 else [])):
        assert torch.allclose(same(given), layer(given), atol=1e-5)
        assert torch.allclose(copy.deepcopy(same)(given), layer(given), atol=1e-5)
    assert list(same.parameters()) == [] and same.weight_bytes == sum(p.nbytes for p in layer.parameters())


def test_sparse_layers_stand_where_dense_ones_stood_and_are_counted_alike():
    model = bake(two_four(wide()))
    dense, x = clone(model), images(3)
    kernels = sparsified(model, sparse_refusals(model), pack=lambda weight: weight)
    assert [kernel.implementation == SPARSE_KERNEL for kernel in kernels] == [False, True, True, False]
    assert [kernel.layer for kernel in kernels] == [name for name, _ in weighted_layers(dense)]
    assert torch.allclose(outputs(model, x), outputs(dense, x), atol=1e-5)
    before, after = ({part.name: part for part in parts_of(one, x)} for one in (dense, model))
    for name in ("2", "6"):
        same = replace(after[name], precision="fp32", implementation=before[name].implementation)
        assert same == before[name] and after[name].implementation == SPARSE_KERNEL


def test_a_baseline_is_measured_on_dense_kernels():
    assert runtime("cuda 2:4").for_baseline() is runtime("cuda half")
    assert runtime("eager").for_baseline() is runtime("eager")


def test_verdicts_read_which_layers_skip_zeros():
    dense, sparse = wide(), two_four(wide())
    slow, quick = rounds(*[(2.0,)] * 8), rounds(*[(1.0,)] * 8)
    kernels = [Kernel("2", "fp16", SPARSE_KERNEL), Kernel("0", "fp16", "dense")]
    judge = lambda now, kernels, then: whole_verdict(
        Taken.of(sparse, now, layer_costs(sparse, images()), kernels),
        Taken.of(dense, then, layer_costs(dense, images())),
    )
    assert judge(slow, [], quick).kind == "no kernel" and judge(slow, kernels, quick).kind == "slower"
    assert "1 of 2 layers run 2:4 sparse kernels, and yet" in judge(slow, kernels, quick).evidence
    assert "1 of 2 layers run 2:4 sparse kernels" in judge(quick, kernels, slow).evidence
    layer = LayerTime("2", "Conv2d", 1.0, 0.5, 1, 1, 1, "fp16", SPARSE_KERNEL)
    assert _missing_kernel(layer, sparse[2], "cuda 2:4") is None
    assert _missing_kernel(replace(layer, kernel="Conv2d"), sparse[2], "cuda half")[0] == "no kernel"


def test_a_graph_shows_no_layers_and_says_where_to_look():
    graph = object.__new__(PreparedGraph)
    graph.runtime = "cuda graph"
    with pytest.raises(RuntimeFailed, match=r"cuda graph launches all layers as one .* choose cuda half"):
        instrumented(graph)


# --- on a GPU ------------------------------------------------------------------------------------------------------


def medians(*prepared, calls=200):
    return [found.median_ms for found in latencies(list(prepared), calls)]


def deep(layers=60):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 32), *[nn.Linear(32, 32) for _ in range(layers)]).eval()


@needs_gpu
@pytest.mark.parametrize("name, precision", CASES.items())
def test_each_names_its_precision_and_times_with_events(name, precision):
    prepared = runtime(name).prepare(vgg(), images(64))
    assert prepared.precision == precision and f"computes in {precision}" in prepared.describe()
    assert all(p.dtype == prepared.example.dtype and p.is_cuda for p in prepared.model.parameters())
    assert prepared.difference < TOLERANCE[precision]
    assert 0 < prepared.timed() < 1000


@needs_gpu
def test_tf32_rounds_and_fp32_does_not():
    convolutions = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1), nn.Conv2d(64, 256, 3, padding=1))
    models = {"linear": nn.Sequential(nn.Flatten(), nn.Linear(784, 512)), "convolution": convolutions}
    for kind, model in models.items():
        exact, rounded = (runtime(name).prepare(model.eval(), images(64)).difference for name in ("cuda", "cuda tf32"))
        assert exact < 1e-5, kind
        assert 1e-5 < rounded < 5e-3, kind


@needs_gpu
def test_a_graph_computes_what_eager_does_and_keeps_its_example():
    model, x = vgg(), images(4)
    graph, eager = (runtime(name).prepare(model, x) for name in ("cuda graph", "cuda half"))
    assert "one CUDA graph" in graph.note
    for seed in range(3):  # replayed with inputs of the captured shape
        batch = images(4, seed=seed + 1)
        assert torch.allclose(graph(batch), eager(batch), atol=2e-3)
    assert torch.equal(graph._input, graph.example)
    assert torch.allclose(graph(images(7)), eager(images(7)), atol=2e-3)  # another shape runs in eager
    assert torch.allclose(graph(x), eager(x), atol=2e-3)


@needs_gpu
def test_a_graph_starts_many_small_layers_sooner():
    eager, graph = medians(*(runtime(name).prepare(deep(), images()) for name in ("cuda half", "cuda graph")))
    assert graph < eager


class Asking(nn.Module):
    """Looks at a number of the GPU while it runs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(784, 10)

    def forward(self, x):
        x = self.body(x.flatten(1))
        return x if float(x.sum()) > 0 else x + 1


@needs_gpu
def test_a_model_that_cannot_be_captured_is_refused_and_others_run_on():
    with pytest.raises(RuntimeFailed, match=r"cannot be captured as a CUDA graph .* cuda half"):
        runtime("cuda graph").prepare(Asking().eval(), images())
    assert runtime("cuda half").prepare(Asking().eval(), images()).timed() > 0
    assert runtime("cuda graph").prepare(vgg(), images()).timed() > 0
    assert torch.isfinite(torch.rand(3, device="cuda")).all()


@needs_gpu
def test_a_graph_tells_the_memory_of_its_capture():
    graph, eager = (runtime(name).prepare(vgg(32), images(64)) for name in ("cuda graph", "cuda half"))
    assert graph.peak_bytes() >= 0.5 * eager.peak_bytes() > 0
    assert memory(vgg(32), images(64), "cuda graph").cuda_bytes > 0


@needs_gpu
def test_the_cache_is_flushed_outside_of_the_two_events():
    held = torch.cuda.get_device_properties(0).L2_cache_size
    cold = runtime("cuda").flushing().prepare(vgg(), images())
    assert cold._other.nbytes >= 2 * held and "L2 cache is flushed" in cold.note
    writing = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.inference_mode():
        writing[0].record()
        for _ in range(100):
            cold._other.zero_()
        writing[1].record()
    torch.cuda.synchronize()
    empty = min(cold.time(lambda: None) for _ in range(5))
    assert empty < 0.5 * writing[0].elapsed_time(writing[1]) / 100


@needs_gpu
def test_weights_are_read_from_memory_after_a_flush():
    width = 16 * (int((torch.cuda.get_device_properties(0).L2_cache_size / 4 / 2 / 3) ** 0.5) // 16)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, width), *[nn.Linear(width, width) for _ in range(3)]).eval()
    graph = runtime("cuda graph")
    assert any(
        cold > warm for _ in range(4)
        for warm, cold in [medians(graph.prepare(model, images()), graph.flushing().prepare(model, images()))]
    )  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("batch", [1, 5, 64])
def test_sparse_kernels_give_the_outputs_of_the_dense_ones(batch):
    model, x = two_four(wide()), images(batch)
    sparse, dense = (runtime(name).prepare(model, x) for name in ("cuda 2:4", "cuda half"))
    assert "2 of 4 layers run a 2:4 sparse kernel" in sparse.note and sparse.precision == "fp16"
    assert [one.layer for one in sparse.kernels if one.implementation == SPARSE_KERNEL] == ["2", "6"]
    assert sparse.difference < TOLERANCE["fp16"] and sparse.timed() > 0
    other = images(batch + 2, seed=1)
    assert torch.allclose(sparse(other), dense(other), atol=2e-2 * float(dense(other).abs().max()))
    assert sparse.peak_bytes() > 0


@needs_gpu
def test_a_packed_weight_takes_little_more_than_half():
    layer = two_four(nn.Sequential(nn.Linear(1024, 1024, bias=False)))
    found = SparseLayer(bake(layer)[0].half().cuda())
    assert 0.5 < found.weight_bytes / (2 * 1024 * 1024) < 0.65


@needs_gpu
def test_a_dense_model_is_refused_by_the_sparse_runtime():
    with pytest.raises(RuntimeFailed, match="SemiStructuredPruning makes weights 2:4 sparse"):
        runtime("cuda 2:4").prepare(wide(), images())


@needs_gpu
@pytest.mark.parametrize("name", ["cuda", "cuda tf32", "cuda half", "cuda bfloat16", "cuda 2:4"])
def test_layers_are_timed_in_each_precision(name):
    found = layer_times(two_four(wide()), images(16), name)
    assert found.layers and all(layer.ms > 0 for layer in found.layers)
    assert {layer.precision for layer in found.layers if layer.macs} == {runtime(name).precision}
    assert any(layer.kernel == SPARSE_KERNEL for layer in found.layers) == (name == "cuda 2:4")
    with pytest.raises(RuntimeFailed, match="launches all layers as one"):
        layer_times(vgg(), images(), "cuda graph")


@needs_gpu
def test_roofs_of_the_gpu_bound_its_layers(monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_: tmp_path)
    found = roofline(device="cuda")
    assert found.device == "cuda" and found.holds["L2"] > 0 and found.bandwidths["memory"] > 10
    assert found.peaks["fp16"] > found.peaks["fp32"]
    if "tf32" in found.peaks:
        assert found.peaks["fp32"] < found.peaks["tf32"] < found.peaks["fp16"]
    assert roofline(device="cuda") == found != roofline()
    limits.cache_clear()
    assert limits("cuda half").roofline == limits("cuda 2:4").roofline == found
    assert {said.kind for said in verdicts(vgg(64), images(256), runtime="cuda half")}
    said = verdicts(two_four(wide()), images(64), wide(), "cuda 2:4")
    assert not any(one.layer in ("2", "6") and one.kind == "no kernel" for one in said)
    limits.cache_clear()


@needs_gpu
def test_a_sparse_model_is_profiled_beside_its_dense_baseline():
    found = profile(two_four(wide()), images(), wide(), runtimes=ON_GPU, calls=50, throughput_batch=8, flush_l2=True)
    assert [run.runtime for run in found.runs] == ON_GPU and not found.failed
    assert all(run.peak_cuda_bytes > 0 and "flushed" in run.note for run in found.runs)
    assert found.run("cuda 2:4").baseline.runtime == "cuda half"
    assert found.best_fp32("cuda").runtime == "cuda"  # and not TF32
    assert "the L2 cache is flushed before each call" in str(found)


@needs_gpu
def test_software_alone_is_tried_on_the_gpu():
    *_, rows = software_first(vgg(32), images(8), calls=20, device="cuda")
    assert [row.name for row in rows] == list(CASES) and all(row.ran for row in rows)


@needs_gpu
@pytest.mark.parametrize("name", ["cuda half", "cuda 2:4"])
def test_a_report_has_all_its_sections_on_a_gpu(name, monkeypatch, tmp_path):
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_: tmp_path)
    subject, baseline = (
        Subject(label, model, images()) for label, model in (("small", two_four(wide())), ("wide", wide()))
    )
    sections = ("layers", "roofline", "verdicts", "software", "memory")
    found = investigate(subject, baseline, sections, runtimes=[name], calls=20, throughput_batch=4)
    assert not found.missing and found.roofline.device == "cuda" and "copied" in str(found)
    assert all(one.cuda_bytes > 0 for one in found.memory.values())
