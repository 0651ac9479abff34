"""The machine and the libraries that a figure was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

FEATURES = {  # what /proc/cpuinfo calls them, and what they speed up: vectors, int8 products, bf16 and int8 tiles
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "asimd": "NEON",
    "asimddp": "dot product",
    "i8mm": "I8MM",
}
LIBRARIES = ("workbench", "torch", "torchvision", "openvino", "onnx", "onnxruntime", "numpy")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


@dataclass(frozen=True)
class Environment:
    """Where figures come from: processor, instruction sets, cores this process may use, GPU, libraries.

    `governor` sets the processor's frequency, `load` is how many processes ran or waited on average over the last
    minute, the measuring one included; both are None where the system does not tell. `torch_threads` is torch's number
    of threads where no measurement sets another.
    """

    processor: str
    features: tuple[str, ...]
    cores: int
    virtual_machine: bool | None  # None where the system does not tell
    gpu: str
    platform: str
    versions: dict[str, str]
    governor: str | None = None
    load: float | None = None
    torch_threads: int = 1

    def to_dict(self) -> dict:
        """Return it as JSON can hold it."""
        return asdict(self) | {"features": list(self.features)}

    def __str__(self) -> str:
        features = ", ".join(self.features) or "no vector features known"
        cores = f"{self.cores} core{'s' if self.cores != 1 else ''}"
        virtual = " of a virtual machine" if self.virtual_machine else ""
        return f"{self.processor} ({features}), {cores}{virtual}, {self.gpu or 'no GPU here'}"

    def card(self) -> dict[str, str]:
        """Return what a reader of figures wants to know, in words, by its title."""
        tell = lambda value: "not told by this system" if value is None else str(value)
        virtual = {True: "yes", False: "no", None: None}[self.virtual_machine]
        return {
            "processor": self.processor,
            "instruction sets": ", ".join(self.features) or "none known",
            "cores of this process": str(self.cores),
            "virtual machine": tell(virtual),
            "frequency governor": tell(self.governor),
            "load, last minute": tell(None if self.load is None else f"{self.load:.2f}"),
            "GPU": self.gpu or "no GPU here",
            "platform": self.platform,
            "libraries": ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "torch threads by default": str(self.torch_threads),
        }


def environment() -> Environment:
    """Describe this machine, and how busy it is now."""
    try:
        load = os.getloadavg()[0]
    except (OSError, AttributeError):
        load = None
    return replace(_machine(), load=load, torch_threads=torch.get_num_threads())


@lru_cache(maxsize=1)
def _machine() -> Environment:
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return Environment(
        processor=_processor(info),
        features=tuple(title for flag, title in FEATURES.items() if flag in flags) or _capability(),
        cores=allowed_cores(),
        virtual_machine=("hypervisor" in flags) if "flags" in info else None,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        versions={name: found for name in LIBRARIES if (found := _version(name))},
        governor=_governor(),
    )


def allowed_cores() -> int:
    """Return how many cores this process may use: its affinity, and the quota of its container where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no Linux control group, or the quota is "max"
        return cores


def _governor() -> str | None:
    try:
        return GOVERNOR.read_text().strip() or None
    except OSError:
        return None


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's block of /proc/cpuinfo, or {} where there is none."""
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _processor(info: dict[str, str]) -> str:
    if "model name" in info:
        return info["model name"]
    if platform.system() == "Darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        )
        if asked.stdout.strip():
            return asked.stdout.strip()
    return platform.processor() or platform.machine() or "unknown processor"


def _capability() -> tuple[str, ...]:
    name = torch.backends.cpu.get_cpu_capability()
    return () if name == "DEFAULT" else (name,)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
