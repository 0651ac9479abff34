import gc
import json
import math
import time
from dataclasses import replace

import numpy as np
import profiles
import pytest
import torch
from test_runtimes import Foreign, images, outputs, quantized, vgg
from torch import nn
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode

from workbench.data import Data, Split
from workbench.profiler import (
    ClockJumped,
    Latency,
    accuracy_difference,
    compare,
    environment,
    latencies,
    latency,
    layer_costs,
    measure,
    peak_activation_bytes,
    profile,
)
from workbench.runtimes import Prepared, RuntimeFailed, runtime
from workbench.surgery import clone, weighted_layers
from workbench.weights import Mask, parametrize_weight

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the CUDA runtime cannot be run")


class Pretended(Prepared):
    """A model that takes no time and reports drawn ones: the truth about its speed is known."""

    def __init__(self, median_ms=1.0, spread=0.1, seed=0, drift=None):
        super().__init__(runtime("eager"), images(), 1)
        self.rng, self.median_ms, self.spread = np.random.default_rng(seed), median_ms, spread
        self.drift, self.calls = drift or (lambda call: 1.0), 0

    def run(self):
        pass

    def timed(self):
        self.calls += 1
        return self.median_ms * math.exp(self.spread * self.rng.standard_normal()) * self.drift(self.calls)


def taken(*rounds, run=1):
    return Latency(rounds, "eager", "fp32", batch=1, threads=1, run=run)


def small_data(count=60):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    split = Split(pixels, torch.arange(count) % 10, mean=(0.5,), std=(0.5,))
    return Data("noise", "Noise", split, split, split, tuple("0123456789"))


def test_figures_of_a_latency():
    one = taken((1.0, 2.0), (3.0, 4.0))
    assert (one.calls, one.median_ms, one.p25_ms, one.p75_ms) == (4, 2.5, 1.75, 3.25)
    assert one.p90_ms is None
    assert taken(tuple(np.arange(1.0, 102.0))).p90_ms == 91.0
    assert one.iqr_ms == 1.5 and taken(tuple(np.arange(1.0, 1000.0))).p99_ms is None
    assert taken(tuple(np.arange(1.0, 1002.0))).p99_ms == 991.0
    assert one.noisy and not taken((1.0, 2.0), (1.0, 2.0)).noisy
    assert taken((4.0,)).images_per_second == 250
    json.dumps(one.to_dict())


def test_every_model_gets_the_same_number_of_calls_in_turns():
    found = latencies([Pretended(), Pretended(30.0)], calls=40)
    assert [one.calls for one in found] == [40, 40]
    assert len(found[0].rounds) == len(found[1].rounds) == 40  # 30 ms do not fit into a block twice
    assert latency(Pretended(), calls=100).p90_ms is not None


def test_the_interval_covers_the_truth_and_equals_are_rarely_told_apart():
    covered = distinguished = 0
    for seed in range(100):
        fast, slow, same = Pretended(1.0, 0.3, seed), Pretended(1.5, 0.3, seed + 1000), Pretended(1.0, 0.3, seed + 2000)
        a, b, c = latencies([fast, slow, same])
        low, high = compare(a, b).interval
        covered += low <= 1.5 <= high
        distinguished += compare(a, c).distinguishable
    assert covered >= 88
    assert distinguished <= 8


def test_a_drift_that_hits_both_leaves_the_ratio():
    slower = lambda call: 1.0 if call < 60 else 3.0
    a, b = latencies([Pretended(1.0, 0.02, 1, slower), Pretended(2.0, 0.02, 2, slower)])
    assert a.noisy
    assert compare(a, b).value == pytest.approx(2.0, rel=0.05)


def test_small_differences_and_few_rounds_are_not_claimed():
    a, b = latencies([Pretended(1.0, 1e-4), Pretended(1.02, 1e-4, 1)])
    assert str(compare(a, b)) == "not distinguishable"
    few = compare(taken(*[(1.0,)] * 5), taken(*[(2.0,)] * 5))
    assert few.value == 2 and not few.distinguishable
    assert compare(taken(*[(1.0,)] * 6), taken(*[(2.0,)] * 6)).distinguishable


def test_a_ratio_reads_as_a_sentence():
    a, b = latencies([Pretended(1.0, 0.05), Pretended(3.0, 0.05, 1)])
    assert str(compare(a, b)).startswith(("2.9× faster (", "3.0× faster (", "3.1× faster ("))
    assert str(compare(b, a)).startswith(("2.9× slower (", "3.0× slower (", "3.1× slower ("))
    low, high = compare(a, b).interval
    mirrored = compare(b, a).interval
    assert mirrored == pytest.approx((1 / high, 1 / low), rel=0.02)


def test_latencies_of_separate_runs_are_not_compared():
    with pytest.raises(ValueError, match="measure both in one call"):
        compare(latency(Pretended()), latency(Pretended()))


def test_measuring_can_be_stopped_anywhere_and_leaves_nothing_changed():
    before = torch.get_num_threads()
    prepared = [runtime("eager").prepare(vgg(), images(), threads=before + 1) for _ in range(2)]
    assert gc.isenabled()
    for stop in range(6):
        running = measure(prepared)
        for _ in range(stop + 1):
            next(running)
            assert torch.get_num_threads() == before and gc.isenabled()
        running.close()
    assert torch.get_num_threads() == before and gc.isenabled()


def test_results_grow_until_all_calls_are_made():
    seen = [sum(one.calls for one in found) for found in measure([Pretended(), Pretended()], calls=50)]
    assert seen == sorted(seen) and seen[0] == 0 and 100 <= seen[-1] <= 106  # the last round is full
    with pytest.raises(ValueError, match="at least one prepared model"):
        next(measure([]))


def test_a_budget_ends_after_a_full_round_but_not_before_six():
    found = latencies([Pretended(30.0), Pretended(30.0)], calls=1000, budget_s=0)
    assert [len(one.rounds) for one in found] == [6, 6]


def test_calls_are_timed_only_once_they_are_steady():
    cold = Pretended(1.0, 0.0, drift=lambda call: max(1.0, 3.0 - 0.1 * call))
    assert latency(cold, calls=20).samples_ms.max() < 1.1
    never = Pretended(1.0, 0.0, drift=lambda call: 1.0 + call // 3 % 2)
    assert latency(never, calls=20).calls == 20


def test_calls_that_wait_for_a_processor_are_noisy():
    class Waiting(Pretended):
        def timed(self):
            time.sleep(0.002)
            return 2.0

    found = latency(Waiting(), calls=10)
    assert found.busy < 0.5 and found.noisy
    assert replace(found, busy=0.95).noisy is False and replace(found, busy=None).noisy is False
    computing = runtime("eager").prepare(vgg(), images(8))
    assert max(latency(computing, calls=40).busy for _ in range(5)) > 2 * found.busy  # whatever else is running


@pytest.mark.parametrize("median_ms", [0.0, -3.0, math.nan, math.inf, 5e6])
def test_a_clock_that_jumps_is_refused(median_ms):
    with pytest.raises(ClockJumped, match="measure again"):
        latency(Pretended(median_ms, 0.0))
    late = Pretended(1.0, 0.0, drift=lambda call: 1.0 if call < 40 else median_ms)
    with pytest.raises(ClockJumped):
        latency(late)
    assert gc.isenabled()


def test_a_failing_call_leaves_threads_and_collector():
    class Failing(Pretended):
        def timed(self):
            raise MemoryError("too large")

    before = torch.get_num_threads()
    with pytest.raises(MemoryError):
        latency(Failing())
    assert torch.get_num_threads() == before and gc.isenabled()


def test_a_model_against_itself_is_not_distinguishable():
    prepared = [runtime("openvino").prepare(vgg(), images()) for _ in range(2)]
    verdicts = [compare(*latencies(prepared)).distinguishable for _ in range(5)]
    assert sum(verdicts) <= 2  # a loaded machine may be unlucky now and then


def test_sixteen_times_the_work_is_distinguishable():
    prepared = [runtime("eager").prepare(vgg(width), images(4)) for width in (16, 64)]
    assert any((ratio := compare(*latencies(prepared))).distinguishable and ratio.value > 2 for _ in range(3))


def agreement(prepared, turns=31, calls=15):
    """Return the median over turns of our time by that of torch.utils.benchmark, and ours, all turns as one latency.

    In each turn both take the median of a few calls, and in every other one they change places: other work on the
    machine hits both alike. The clock is named, since torch's own default also waits for accelerators, and does so
    within the time that it takes.
    """
    names, ratios, ours = {"run": prepared.run}, [], []
    timer = benchmark.Timer("run()", globals=names, num_threads=1, timer=time.perf_counter)
    theirs_ms = lambda: 1000 * np.median([timer.timeit(1).median for _ in range(calls)])
    for turn in range(turns):
        before = theirs_ms() if turn % 2 else None
        ours.append(latency(prepared, calls))
        ratios.append(ours[-1].median_ms / (before or theirs_ms()))
    busy = float(np.mean([one.busy for one in ours]))
    return float(np.median(ratios)), replace(ours[0], rounds=sum((one.rounds for one in ours), ()), busy=busy)


def test_times_agree_with_those_of_torch_benchmark():
    """In turns, the median of the ratios lies within 5 % of 1; a run called noisy is repeated, twice at most.

    A call takes less than the time for which an operating system gives a processor away, so that most calls are whole
    on a loaded machine too, and much more than a few looks at the clock.
    """
    prepared = runtime("eager").prepare(vgg(64), images())
    for _ in range(3):
        ratio, ours = agreement(prepared)
        if not ours.noisy:
            break
    assert ratio == pytest.approx(1, abs=0.05)


def test_multiply_adds_are_half_of_the_operations_that_torch_counts():
    grouped = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), nn.Conv2d(8, 16, 3, groups=4, dilation=2), nn.Flatten(2))
    for model in (vgg(), quantized(vgg()), nn.Sequential(grouped, nn.Linear(64, 7))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images())
        assert sum(cost.macs for cost in layer_costs(model, images(3))) == counter.get_total_flops() / 2


def test_multiply_adds_are_said_to_be_those_of_linear_and_convolution_layers():
    """Attention multiplies inside, where no layer is: what is counted is less, and the sentence says so."""
    model, example = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.zeros(1, 4, 16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.train()(example)  # in eval it is one operation, which the counter does not know
    counted = {cost.name: cost.macs for cost in layer_costs(model.eval(), example)}
    assert counted["linear1"] == 4 * 16 * 32 and sum(counted.values()) < counter.get_total_flops() / 2
    assert any("counted in linear and convolution layers." in one for one in told({}))


def test_layer_costs_name_kinds_shapes_and_zeros():
    model = vgg()
    layer = model[4]
    mask = torch.zeros(layer.weight.shape, dtype=torch.bool)
    mask[0] = True
    parametrize_weight(layer, Mask(mask))
    costs = {cost.name: cost for cost in layer_costs(model, images())}
    assert costs["4"].kind == "Conv2d" and costs["4"].output_shape == (1, 16, 14, 14)
    assert costs["4"].nonzero == layer.weight[0].numel() and costs["4"].weights == layer.weight.numel()
    assert costs["14"].kind == "Linear" and costs["14"].weights == 32 * 10 == costs["14"].parameters - 10


def test_a_layer_used_twice_costs_twice_and_an_unused_one_nothing():
    shared = nn.Linear(784, 784)
    model = nn.Sequential(nn.Flatten(), shared, shared)
    model.unused = None
    assert [cost.macs for cost in layer_costs(model, images())] == [2 * 784 * 784]


def test_peak_memory_is_that_of_the_largest_activations():
    wide = nn.Sequential(nn.Linear(100, 100_000), nn.Linear(100_000, 10)).eval()
    # The wide output and the one made from it are held together; torch rounds nothing up here.
    assert peak_activation_bytes(wide, torch.randn(3, 100)) == 3 * (100_000 + 10) * 4
    twice = peak_activation_bytes(vgg(), images(8)) / peak_activation_bytes(vgg(), images(4))
    assert 1.5 < twice < 2.2


def test_the_environment_is_described():
    here = environment()
    assert here.processor and here.cores >= 1 and here.versions["torch"] == torch.__version__.split("+")[0]
    json.dumps(here.to_dict())
    assert here.processor in str(here)


def test_accuracy_differences_are_paired():
    same = torch.rand(1000) > 0.1
    assert accuracy_difference(same, same).points == 0 and not accuracy_difference(same, same).distinguishable
    worse = same.clone()
    worse[same.nonzero()[:50, 0]] = False
    found = accuracy_difference(worse, same)
    assert found.points == pytest.approx(-5.0) and found.distinguishable
    assert str(found).startswith("-5.0 points (")


@pytest.fixture(scope="module")
def quantized_profile():
    messages = []
    model = vgg(32)
    found = profile(
        quantized(model), small_data(), baseline=model, calls=60, throughput_batch=8,
        watch=lambda message, fraction: messages.append((message, fraction)),
    )  # fmt: skip
    return found, messages


def test_a_profile_has_every_figure(quantized_profile):
    found, messages = quantized_profile
    assert [run.runtime for run in found.runs][:3] == ["eager", "eager channels-last", "openvino"]
    assert found.run("openvino").latency.precision == "int8"
    assert found.run("openvino").baseline.precision == "fp32"
    assert found.run("eager").throughput.batch == 8
    assert found.model.accuracy.total == 60 and found.model.size_bytes < found.baseline.size_bytes
    assert found.best_fp32().baseline.median_ms == min(run.baseline.median_ms for run in found.runs)
    fractions = [fraction for _, fraction in messages]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0


def test_a_profile_is_plain_json_a_table_and_sentences(quantized_profile):
    found, _ = quantized_profile
    assert json.loads(json.dumps(found.to_dict()))["model"]["total"] == 60
    assert {row["runtime"] for row in found.table()} >= {"eager", "openvino"}
    text = " ".join(found.sentences())
    assert "rounding to integers is only simulated" in text and "smaller than the baseline's" in text
    assert all(sentence.endswith(".") for sentence in found.sentences())
    assert str(found.environment) in str(found)
    assert found._repr_html_().startswith("<table>")
    if not torch.cuda.is_available():
        assert "cuda, cuda tf32, cuda half, cuda bfloat16, cuda graph and cuda 2:4: no GPU here." in text
        with pytest.raises(KeyError, match="no GPU here"):
            found.run("cuda")


def test_zeros_do_not_make_dense_kernels_quicker_and_the_profile_says_so():
    """Without max pooling, whose branches are foreseen on the even planes that filters of zeros leave."""

    def said(width):
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2), nn.ReLU()]
        model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()
        sparse = clone(model)
        for _, layer in weighted_layers(sparse):
            parametrize_weight(layer, Mask(torch.rand(layer.weight.shape) > 0.9))
        found = profile(sparse, images(), baseline=model, runtimes=["eager"], throughput_batch=2)
        return "dense kernels multiply them all the same" in " ".join(found.sentences())

    assert any(said(width) for width in (64, 96, 128))


def told(*runs, **measures):
    """Return the sentences of a made-up profile with these runs, beside a baseline that takes twice as long."""
    profile = profiles.report().profile
    model, (like,) = replace(profile.model, **measures), profile.runs
    return replace(profile, model=model, runs=tuple(replace(like, **run) for run in runs)).sentences()


def test_a_smaller_model_that_gains_little_is_blamed_on_nothing_that_a_profile_measures():
    """The made-up model does 4.3 times fewer multiply-adds and is twice as fast; no layer of it was timed."""
    (fewer,) = [one for one in told({}) if "fewer multiply-adds" in one]
    assert fewer == "On openvino the model does 4.3× fewer multiply-adds, but it is 2.0× faster (2.0–2.0)."
    assert (
        sum(
            "verdicts on its layers (--verdicts) tell what holds it up" in one for one in told({}, {"runtime": "eager"})
        )
        == 1
    )
    assert not any("holds it up" in one for one in told({}, macs=30_000_000))


def test_rounding_is_simulated_in_the_precision_of_the_runtime():
    simulating = {"note": "rounding to integers is only simulated"}
    half = {"runtime": "cuda half", "latency": profiles.latency(0.4, precision="fp16")}
    said = [one for one in told(simulating, half | simulating) if "simulated" in one]
    assert [one.split(";")[0] for one in said] == [
        "On openvino rounding to integers is only simulated in fp32",
        "On cuda half rounding to integers is only simulated in fp16",
    ]


def test_a_runtime_that_fails_is_named_and_the_others_are_measured():
    found = profile(Foreign(), images(), runtimes=["openvino", "eager"], calls=20, throughput_batch=2)
    assert [run.runtime for run in found.runs] == ["eager"]
    assert "cannot run this model" in found.failed["openvino"]
    assert found.model.accuracy is None and found.runs[0].ratio is None
    with pytest.raises(RuntimeFailed, match="No runtime can run this model"):
        profile(Foreign(), images(), runtimes=["openvino"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": None}, "needs a Data or one example batch"),
        ({"data": torch.empty(0, 1, 28, 28)}, "not one image"),
        ({"split": "holdout"}, "choose train, val or test"),
        ({"batch": 0}, "take at least 1"),
        ({"runtimes": ["abacus"]}, "choose one of eager"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        profile(**({"model": vgg(), "data": small_data()} | change))


def test_broken_models_are_named():
    with pytest.raises(RuntimeFailed, match=r"fails on an input of shape \(1, 1, 28, 28\)"):
        profile(nn.Linear(3, 2), images())
    broken = vgg()
    with torch.no_grad():
        broken[0].weight.fill_(math.nan)
    assert not torch.isfinite(outputs(broken, images())).any()
    found = profile(broken, small_data(), runtimes=["eager"], calls=20, throughput_batch=2)
    assert "not finite" in " ".join(found.sentences())
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("difference", [math.nan, math.inf])
def test_a_runtime_whose_outputs_overflow_is_named(difference):
    (said,) = [one for one in told({}, {"runtime": "cuda half", "difference": difference}) if "not finite" in one]
    assert said.startswith("cuda half gives outputs that are not finite")
    assert not any("cuda half gives" in one for one in told({"runtime": "cuda half", "difference": 0.01}))
    assert any("up to 40 %" in one for one in told({"difference": 0.4}))
    broken = told({"difference": difference}, finite=False)
    assert sum("not finite" in one for one in broken) == 1 and "outputs are not finite" in " ".join(broken)


@needs_gpu
def test_cuda_is_profiled_with_its_own_memory():
    found = profile(vgg(), images(), baseline=vgg(), runtimes=["cuda", "cuda half"], calls=50)
    assert all(run.peak_cuda_bytes > 0 for run in found.runs)
    assert found.best_fp32("cuda").runtime == "cuda"
