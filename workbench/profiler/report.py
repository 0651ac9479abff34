"""What `profile` found, as figures, as a table, and in plain sentences."""

from __future__ import annotations

import html
import math
from dataclasses import asdict, dataclass
from functools import cached_property

from torch import Tensor

from workbench.profiler.costs import LayerCost
from workbench.profiler.environment import Environment
from workbench.profiler.timing import Latency, Ratio, compare
from workbench.profiler.words import sentences
from workbench.runtimes import Kernel
from workbench.training import Z_95, Accuracy

FIGURES = ("batch", "threads", "median_ms", "p25_ms", "p75_ms", "p90_ms", "p99_ms", "calls", "noisy")


@dataclass(frozen=True, eq=False)
class Measures:
    """What does not depend on a runtime. `hits`, bool (N,): which images are classified right, None without data.

    `size_bytes` is the length of the saved file, `fp32_bytes` four bytes a number. `macs` are counted for one image.
    `peak_activation_bytes` is the allocator's peak during one eager forward of the batch, without weights and input;
    None for a model in a file of another program, which torch does not run.
    """

    size_bytes: int
    fp32_bytes: int
    parameters: int
    macs: int
    sparsity: float
    peak_activation_bytes: int | None
    layers: tuple[LayerCost, ...]
    hits: Tensor | None = None
    finite: bool = True

    @property
    def accuracy(self) -> Accuracy | None:
        return None if self.hits is None else Accuracy(int(self.hits.sum()), len(self.hits))

    def to_dict(self) -> dict:
        """Return the figures as JSON can hold them."""
        names = ("size_bytes", "fp32_bytes", "parameters", "macs", "sparsity", "peak_activation_bytes")
        found = {name: getattr(self, name) for name in names}
        found["layers"] = [asdict(layer) | {"output_shape": list(layer.output_shape)} for layer in self.layers]
        if self.accuracy:
            found |= {"correct": self.accuracy.correct, "total": self.accuracy.total}
        return found


@dataclass(frozen=True)
class Run:
    """The model on one runtime, and its baseline there, timed in turns."""

    runtime: str
    device: str
    note: str
    kernels: tuple[Kernel, ...]
    difference: float | None
    latency: Latency
    throughput: Latency
    baseline: Latency | None = None
    baseline_throughput: Latency | None = None
    peak_cuda_bytes: int | None = None

    @cached_property
    def ratio(self) -> Ratio | None:
        """Times faster than the baseline on this runtime."""
        return compare(self.latency, self.baseline) if self.baseline else None

    @cached_property
    def throughput_ratio(self) -> Ratio | None:
        """Times more images a second than the baseline on this runtime."""
        return compare(self.throughput, self.baseline_throughput) if self.baseline_throughput else None


@dataclass(frozen=True)
class Difference:
    """Change of accuracy in percentage points on the same images, with its 95 % interval."""

    points: float
    interval: tuple[float, float]

    @property
    def distinguishable(self) -> bool:
        low, high = self.interval
        return not low <= 0 <= high

    def __str__(self) -> str:
        if not self.distinguishable:
            return "not distinguishable"
        low, high = self.interval
        return f"{self.points:+.1f} points ({low:+.1f} to {high:+.1f})"


def accuracy_difference(hits: Tensor, baseline: Tensor) -> Difference:
    """Compare two models on the same images; `hits` and `baseline`, bool (N,): which images each has right.

    Only images where they disagree count, so the interval is narrower than those of two separate accuracies
    (McNemar, 1947, doi:10.1007/BF02295996).
    """
    total = len(hits)
    gained, lost = int((hits & ~baseline).sum()), int((~hits & baseline).sum())
    value = (gained - lost) / total
    half = Z_95 * math.sqrt(max(gained + lost, 1) - (gained - lost) ** 2 / total) / total
    return Difference(100 * value, (100 * (value - half), 100 * (value + half)))


@dataclass(frozen=True)
class Profile:
    """Everything measured of a model, beside its baseline where one was given; `stopped` by Ctrl-C before its end."""

    model: Measures
    baseline: Measures | None
    runs: tuple[Run, ...]
    failed: dict[str, str]
    split: str
    environment: Environment
    stopped: bool = False

    def run(self, runtime: str) -> Run:
        """Return what was measured on the runtime called so; raises KeyError with the reason if it did not run."""
        for one in self.runs:
            if one.runtime == runtime:
                return one
        raise KeyError(self.failed.get(runtime, f"{runtime} was not asked for."))

    def best_fp32(self, device: str = "cpu") -> Run | None:
        """Return the run on which the baseline is quickest in fp32, the fair rival on that device, or None."""
        rivals = [
            one for one in self.runs if one.device == device and one.baseline and one.baseline.precision == "fp32"
        ]
        return min(rivals, key=lambda one: one.baseline.median_ms, default=None)

    def ratio_to_best(self, run: Run) -> Ratio | None:
        """Times faster than the baseline on its quickest fp32 runtime on the same device."""
        best = self.best_fp32(run.device)
        return compare(run.latency, best.baseline) if best else None

    @property
    def accuracy_difference(self) -> Difference | None:
        if self.baseline is None or self.model.hits is None:
            return None
        return accuracy_difference(self.model.hits, self.baseline.hits)

    def table(self) -> list[dict]:
        """Return one row of plain figures for each runtime."""
        return [self._row(run) for run in self.runs]

    def _row(self, run: Run) -> dict:
        best, ratio, to_best = self.best_fp32(run.device), run.ratio, self.ratio_to_best(run)
        return {
            "runtime": run.runtime,
            "precision": run.latency.precision,
            **{name: getattr(run.latency, name) for name in FIGURES},
            "baseline_median_ms": run.baseline.median_ms if run.baseline else None,
            "versus_baseline": str(ratio) if ratio else None,
            "versus_best_fp32": str(to_best) if to_best else None,
            "best_fp32": best.runtime if best else None,
            "images_per_second": run.throughput.images_per_second,
            "throughput_batch": run.throughput.batch,
            "throughput_versus_baseline": str(run.throughput_ratio) if run.throughput_ratio else None,
        }

    def to_dict(self) -> dict:
        """Return everything as JSON can hold it."""
        return {
            "model": self.model.to_dict(),
            "baseline": self.baseline.to_dict() if self.baseline else None,
            "split": self.split,
            "runtimes": [self._run_dict(run) for run in self.runs],
            "failed": dict(self.failed),
            "environment": self.environment.to_dict(),
            "stopped": self.stopped,
        }

    def _run_dict(self, run: Run) -> dict:
        ratios = {"ratio": run.ratio, "ratio_to_best_fp32": self.ratio_to_best(run), "throughput": run.throughput_ratio}
        return {
            **self._row(run),
            "baseline_images_per_second": run.baseline_throughput and run.baseline_throughput.images_per_second,
            "note": run.note,
            "difference_from_eager": run.difference,
            "kernels": [list(kernel) for kernel in run.kernels],
            "peak_cuda_bytes": run.peak_cuda_bytes,
            "ratios": {name: ratio.to_dict() for name, ratio in ratios.items() if ratio},
        }

    def sentences(self) -> list[str]:
        """Say what was found, one plain sentence each, and why compression did not help where it did not."""
        return sentences(self)

    def __str__(self) -> str:
        return "\n".join([*self._lines(), "", *self.sentences(), "", f"Measured on {self.environment}."])

    def _lines(self) -> list[str]:
        header = f"{'runtime':<21}{'computes in':<13}{'median':>10}{'p25–p75':>16}{'baseline':>11}{'images/s':>11}"
        rows = [header]
        for run in self.runs:
            spread = f"{run.latency.p25_ms:.3f}–{run.latency.p75_ms:.3f}"
            base = f"{run.baseline.median_ms:.3f} ms" if run.baseline else ""
            rows.append(
                f"{run.runtime:<21}{run.latency.precision:<13}{run.latency.median_ms:>7.3f} ms{spread:>16}{base:>11}"
                f"{run.throughput.images_per_second:>11,.0f}"
            )
        return rows

    def _repr_html_(self) -> str:
        rows = self.table()
        head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
        said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in self.sentences())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><ul>{said}</ul>"


def _cell(value) -> str:
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 100 else f"{value:,.0f}"
    return "" if value is None else html.escape(str(value))
