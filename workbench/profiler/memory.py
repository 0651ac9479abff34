"""Memory and energy, as the operating system, torch's allocators and the machine's own counters tell them.

Energy comes from RAPL (running average power limit), the counters of Intel's and AMD's processors that Linux shows
under /sys/class/powercap, and from NVML, the management library of NVIDIA's driver.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from workbench.profiler.costs import peak_activation_bytes
from workbench.profiler.timing import undisturbed, warm_up
from workbench.profiler.units import size
from workbench.runtimes import Prepared, bake
from workbench.runtimes import runtime as runtime_named

NOT_AVAILABLE = "not available on this machine"
PEAK_RUNS = 3
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"


@dataclass(frozen=True)
class Memory:
    """Where the bytes are while a model runs, all measured.

    `weights_bytes`: the model's parameters and buffers as plain tensors. `activations_bytes`: the most that one eager
    forward of the batch holds at a time, without weights and input, from the allocator. `resident_bytes`: the process's
    resident size by stage, in order: "before", "prepared" and "peak while running". It counts Python and the libraries
    too, and is empty where the system does not tell. `cuda_bytes`: the GPU allocator's peak during a run, on a GPU;
    where a CUDA graph runs, that during its capture, for the graph holds it from then on.
    """

    runtime: str
    batch: int
    weights_bytes: int
    activations_bytes: int
    resident_bytes: dict[str, int]
    cuda_bytes: int | None = None

    def to_dict(self) -> dict:
        """Return the figures as JSON can hold them."""
        return asdict(self)

    def __str__(self) -> str:
        stages = ", ".join(f"{size(count)} {stage}" for stage, count in self.resident_bytes.items())
        cuda = f"; on the GPU {size(self.cuda_bytes)} more during a run" if self.cuda_bytes is not None else ""
        return (
            f"Weights take {size(self.weights_bytes)}, activations at most {size(self.activations_bytes)} at batch "
            f"{self.batch}. The process: {stages or NOT_AVAILABLE}{cuda}."
        )


@dataclass(frozen=True)
class Energy:
    """What the machine's counters say was used while a model ran; `source` names what they cover.

    `joules` is all that was used in `seconds`, by anyone; `idle_watts` was used just before, while nothing ran here.
    """

    joules: float
    seconds: float
    images: int
    idle_watts: float
    source: str

    @property
    def watts(self) -> float:
        return self.joules / self.seconds

    @property
    def joules_per_image(self) -> float:
        return self.joules / self.images

    def to_dict(self) -> dict:
        """Return the figures as JSON can hold them."""
        return asdict(self) | {"watts": self.watts, "joules_per_image": self.joules_per_image}

    def __str__(self) -> str:
        millijoules = 1000 * self.joules_per_image
        return f"{millijoules:.3g} mJ an image, {self.watts:.3g} W ({self.idle_watts:.3g} W idle), by {self.source}"


def memory(model: nn.Module, example: Tensor, runtime: str = "eager", threads: int = 1) -> Memory:
    """Measure where the bytes are while `model` runs on `example`, float (B, C, H, W); see `Memory`.

    Raises RuntimeFailed where the runtime cannot run it.
    """
    stages = {"before": _resident("VmRSS")}
    prepared = runtime_named(runtime).prepare(model, example, threads)
    stages["prepared"] = _resident("VmRSS")
    stages["peak while running"] = _resident_peak(prepared)
    plain = bake(model)
    return Memory(
        runtime=runtime,
        batch=len(example),
        weights_bytes=sum(t.numel() * t.element_size() for t in (*plain.parameters(), *plain.buffers())),
        activations_bytes=peak_activation_bytes(model, example),
        resident_bytes={stage: count for stage, count in stages.items() if count is not None},
        cuda_bytes=prepared.peak_bytes() if prepared.device == "cuda" else None,
    )


def _resident(name: str) -> int | None:
    """Return the resident size ("VmRSS") or its peak ("VmHWM") of this process in bytes, None where not told."""
    try:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    except (OSError, StopIteration):
        return None
    return 1024 * int(line.split()[1])


def _resident_peak(prepared: Prepared) -> int | None:
    """Return the most memory that is resident during runs; None where the peak so far cannot be forgotten first."""
    with undisturbed(prepared.threads):
        try:
            CLEAR.write_text("5")  # as `man 5 proc` has it: the peak starts anew from the present size
        except OSError:
            return None
        for _ in range(PEAK_RUNS):
            prepared.run()
        return _resident("VmHWM")


@dataclass(frozen=True)
class _Counter:
    """A counter of joules that goes up, and starts again at 0 after `range_joules` where it does so."""

    source: str
    read: Callable[[], float]
    range_joules: float | None = None

    def used(self, before: float) -> float:
        """Return the joules used since it read `before`."""
        used = self.read() - before
        return used + self.range_joules if used < 0 and self.range_joules else used


def energy(prepared: Prepared, seconds: float = 2.0) -> Energy | str:
    """Run the model for `seconds` and read the energy counters; where there are none, return the words that say so.

    Before it the machine idles for as long, so that the figure can be seen beside what is used anyway.
    """
    counters = _nvml() if prepared.device == "cuda" else _rapl()
    if not counters:
        return NOT_AVAILABLE
    warm_up(prepared)
    with undisturbed(prepared.threads):
        idle, idled, _ = _counted(counters, lambda: time.sleep(0.01), seconds)
        joules, took, runs = _counted(counters, prepared.run, seconds)
    source = " and ".join(counter.source for counter in counters)
    return Energy(joules, took, runs * prepared.batch, idle / idled, source)


def _counted(counters: list[_Counter], act: Callable[[], None], seconds: float) -> tuple[float, float, int]:
    """Act again and again for `seconds`; return the joules used, the seconds taken, and how often it acted."""
    before, start, times = [counter.read() for counter in counters], time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        act()
        times += 1
    joules = sum(counter.used(first) for counter, first in zip(counters, before, strict=True))
    return joules, time.perf_counter() - start, times


def _rapl() -> list[_Counter]:
    """Return a counter for each processor package whose counter this user may read; often only root may."""
    found = []
    for folder in sorted(POWERCAP.glob("intel-rapl:*")):
        with contextlib.suppress(OSError, ValueError):
            name, counter = (folder / "name").read_text().strip(), folder / "energy_uj"
            if name.startswith("package"):
                _microjoules(counter)
                range_joules = _microjoules(folder / "max_energy_range_uj")
                found.append(_Counter(f"RAPL {name}", lambda counter=counter: _microjoules(counter), range_joules))
    return found


def _microjoules(file: Path) -> float:
    return int(file.read_text()) / 1e6


def _nvml() -> list[_Counter]:
    """Return the counter of the GPU that torch uses, or none where the driver has none (before Volta)."""
    try:
        library = ctypes.CDLL(NVML)
    except OSError:
        return []
    device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()

    def read() -> float:
        if library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules)):
            raise OSError("NVML does not tell the energy used.")
        return millijoules.value / 1000

    try:
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(device)):
            return []
        read()
    except OSError:
        return []
    return [_Counter("NVML, the whole GPU", read)]
