"""The roofs of this machine, measured: how many operations and how many bytes a second it really reaches.

Williams, Waterman and Patterson, 2009, doi:10.1145/1498765.1498785: a layer that does few operations for each byte it
moves is bound by bandwidth, one that does many by the processor's peak.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from workbench.profiler.environment import environment
from workbench.profiler.gpu import cuda_rates, l2_bytes
from workbench.profiler.layers import LayerTimes
from workbench.runtimes import threads as using_threads

SIZES = (256, 512, 1024)  # of the square matrices whose products show the peaks
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
WINDOW_BYTES = 2**25  # read by each timed call: of a cache the same few kilobytes again and again
MEMORY_BYTES = 2**27  # at least: a buffer that no cache holds
MOST_BYTES = 2**29
TRIES_S = 0.08
KEPT_S = 24 * 3600  # then they are measured again, for the machine may have been busy


@dataclass(frozen=True)
class Roofline:
    """Highest rates seen on this machine; a multiply-add counts as two operations.

    `peaks`: 10⁹ operations a second by precision, "fp32", "bf16", "int8" (those that ran), on a GPU "fp32", "tf32",
    "fp16", "bf16". `bandwidths`: 10⁹ bytes a second read, on a GPU read or written, by the level that holds the data,
    "L1", "L2", "L3", "memory" (those that are known). `tried`: each measurement that the maxima were taken from, in
    words, with its rate. `holds`: bytes that each cache holds. `device`: "cpu" or "cuda".
    """

    peaks: dict[str, float]
    bandwidths: dict[str, float]
    threads: int
    machine: str
    tried: dict[str, float]
    holds: dict[str, int] = field(default_factory=dict)
    device: str = "cpu"

    def attainable(self, intensity: float, precision: str = "fp32", level: str = "memory") -> float:
        """Return the 10⁹ operations a second under both roofs at `intensity` operations a byte."""
        return min(self.peaks[precision], intensity * self.bandwidths[level])

    def level(self, nbytes: int) -> str:
        """Return the nearest level that holds so many bytes and whose bandwidth is known."""
        fitting = [name for name, held in self.holds.items() if held >= nbytes and name in self.bandwidths]
        return min(fitting, key=self.holds.__getitem__, default="memory")

    def to_dict(self) -> dict:
        """Return the figures as JSON can hold them."""
        return asdict(self)


@dataclass(frozen=True)
class RooflinePoint:
    """A layer under the roofs: operations for each byte of weights and activations, and 10⁹ operations a second."""

    name: str
    intensity: float
    gflops: float
    precision: str


def points(times: LayerTimes) -> list[RooflinePoint]:
    """Return the layers that multiply as points, in the order they run; those too quick for the clock are left out."""
    return [
        RooflinePoint(
            layer.name,
            2 * layer.macs / (layer.weight_bytes + layer.activation_bytes),
            2 * layer.macs / layer.ms / 1e6,
            layer.precision,
        )
        for layer in times.layers
        if layer.macs and layer.ms > 0
    ]


def measure_roofline(threads: int = 1, device: str = "cpu") -> Iterator[Roofline]:
    """Measure the roofs with torch's own kernels, in a few seconds; yield what is known after each measurement.

    `device` "cuda" measures the GPU; raises RuntimeFailed where there is none.
    """
    tables, tried = {"peak": {}, "bandwidth": {}}, {}
    holds = {"L2": l2_bytes()} if device == "cuda" else cache_sizes()
    for kind, key, words, rate in cuda_rates(holds["L2"]) if device == "cuda" else _rates(threads, holds):
        tables[kind][key] = max(rate, tables[kind].get(key, 0.0))
        tried[words] = rate
        peaks, bandwidths = (dict(table) for table in tables.values())
        yield Roofline(peaks, bandwidths, threads, str(environment()), dict(tried), holds, device)


def _rates(threads: int, holds: dict[str, int]) -> Iterator[tuple]:
    """Yield ("peak" or "bandwidth", its key, what was measured, 10⁹ operations or bytes a second)."""
    for precision, dtype in PRECISIONS.items():
        for size in SIZES:
            product = _product(size, dtype)
            if product is not None:
                rate = 2 * size**3 / _quickest_s(product, threads) / 1e9
                yield "peak", precision, f"{precision} product of {size}×{size} matrices", rate
    outermost = max(holds.values(), default=0)
    memory = min(MOST_BYTES, max(MEMORY_BYTES, 2 * outermost))
    for level, nbytes in [*_inside(holds), ("memory", memory)]:
        rate = _reading(nbytes, threads)
        yield "bandwidth", level, f"sum of {nbytes // 1024:,} KiB", rate


def _product(size: int, dtype: torch.dtype) -> Callable | None:
    """Return a matrix product to be timed, or None where torch has none in this precision."""
    left, right = (torch.full((size, size), 2.0).to(dtype) for _ in range(2))
    multiply = torch._int_mm if dtype == torch.int8 else torch.mm
    try:
        multiply(left, right)
    except (RuntimeError, NotImplementedError, AttributeError):
        return None
    return lambda: multiply(left, right)


def _reading(nbytes: int, threads: int) -> float:
    """Return 10⁹ bytes a second of sums that read the same `nbytes` again and again, a window at a time."""
    window = min(nbytes, WINDOW_BYTES) // 4
    windows = torch.ones(nbytes // 4 // window * window).split(window)
    rows = windows[0].expand(max(1, WINDOW_BYTES // nbytes), -1)
    turns = itertools.cycle([rows] if len(windows) == 1 else [window[None] for window in windows])
    return 4 * rows.numel() / _quickest_s(lambda: next(turns).sum(1), threads) / 1e9


def _quickest_s(run: Callable, threads: int) -> float:
    """Return the shortest time of a call: a roof is what the machine reaches, not what it mostly does."""
    with using_threads(threads), torch.inference_mode():
        run()
        taken, start = [], time.perf_counter()
        while time.perf_counter() - start < TRIES_S or len(taken) < 3:
            before = time.perf_counter()
            run()
            taken.append(time.perf_counter() - before)
    return min(taken)


def _inside(holds: dict[str, int]) -> list[tuple[str, int]]:
    """Return (level, bytes) that lie in this cache and in no nearer one: half of it, and twice the nearer one."""
    found, nearer = [], 0
    for level, held in sorted(holds.items(), key=lambda item: item[1]):
        found += [(level, nbytes) for nbytes in (held // 2, 2 * nearer) if nearer < nbytes < held]
        nearer = held
    return found


def cache_sizes(folder: str = "/sys/devices/system/cpu/cpu0/cache") -> dict[str, int]:
    """Return the bytes that each data cache of a core holds, {"L1": 49152, …}; {} where the system does not tell."""
    sizes = {}
    for cache in sorted(Path(folder).glob("index*")):
        try:
            kind, level, size = ((cache / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            sizes[f"L{level}"] = int(size.rstrip("KM")) * (2**20 if size.endswith("M") else 2**10)
    return sizes


def roofline(threads: int = 1, device: str = "cpu") -> Roofline:
    """Return the roofs of this machine: measured, then remembered for a day in the user's cache folder.

    `device` "cuda" means the GPU's; raises RuntimeFailed where there is none.
    """
    *_, found = growing_roofline(threads, device)
    return found


def growing_roofline(threads: int = 1, device: str = "cpu") -> Iterator[Roofline]:
    """Yield the remembered roofs of this machine at once, or what is known of them after each measurement."""
    path = _remembered_at(threads, device)
    try:
        if time.time() - path.stat().st_mtime < KEPT_S:
            yield Roofline(**json.loads(path.read_text(encoding="utf-8")))
            return
    except (OSError, ValueError, TypeError):  # not measured yet, or by an older version
        pass
    for found in measure_roofline(threads, device):
        yield found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found.to_dict()), encoding="utf-8")
    except OSError:
        pass  # a folder that cannot be written only means measuring again


def _remembered_at(threads: int, device: str) -> Path:
    from platformdirs import user_cache_path

    here = environment()
    machine = [here.processor, *here.features, here.cores, here.versions.get("torch"), threads]
    machine += [here.gpu] if device == "cuda" else []
    return user_cache_path("workbench") / f"roofline-{hashlib.sha256(repr(machine).encode()).hexdigest()[:16]}.json"
