"""Room for a batch: what one image takes while a model runs, and what this process may still take.

Linux promises memory that it does not have and ends the process that takes it up, so a batch is weighed before it is
made rather than tried.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from workbench.profiler.costs import peak_activation_bytes
from workbench.profiler.units import size
from workbench.runtimes import ModelFile, RuntimeFailed, steady_outputs
from workbench.surgery import clone

GROUP = Path("/sys/fs/cgroup")
SHARE = 0.8  # of what is free: the runtimes keep copies of their own


def free_bytes() -> int | None:
    """Return the memory that this process may still take, the limit of its container counted; None if unknown."""
    found = [amount for amount in (_available(), _below_limit()) if amount is not None]
    return min(found, default=None)


def bytes_for_one(model: nn.Module | ModelFile, image: Tensor) -> int:
    """Return the bytes that one image, float (1, C, H, W), takes while a model runs; of a file only its input is known.

    Raises RuntimeFailed if the model does not run.
    """
    if isinstance(model, ModelFile):
        return image.nbytes
    steady_outputs(clone(model), image)
    return image.nbytes + peak_activation_bytes(model, image)


def room_for(needed: int, batch: int) -> int:
    """Return `batch`, or the largest power of two below it that has room where one image takes `needed` bytes."""
    while batch > 1 and not has_room(needed, batch):
        batch = 1 << ((batch - 1).bit_length() - 1)
    return batch


def require_room(needed: int, batch: int) -> None:
    """Raise RuntimeFailed unless `batch` images of `needed` bytes each have room."""
    if not has_room(needed, batch):
        raise RuntimeFailed(
            f"A batch of {batch:,} would take about {size(needed * batch)}, by the inputs and known activations of one "
            f"image, and may take {100 * SHARE:.0f} % of the {size(free_bytes())} that are free; take a smaller batch."
        )


def has_room(needed: int, batch: int) -> bool:
    """Return whether `batch` images of `needed` bytes each have room now."""
    free = free_bytes()
    return free is None or needed * batch < SHARE * free


def _available() -> int | None:
    """Return what Linux calls available: free memory, and caches that it would give back."""
    kibibytes = _told(Path("/proc/meminfo"), "MemAvailable:")
    return None if kibibytes is None else 1024 * kibibytes


def _below_limit() -> int | None:
    """Return what is left below the limit of this process's control group, at least 0; None without one.

    What the group takes counts copies of files as well, and those that were not read lately are given back when asked.
    """
    try:
        limit, taken = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no control group of version 2, or its limit is "max"
        return None
    return max(0, limit - taken + (_told(GROUP / "memory.stat", "inactive_file") or 0))


def _told(path: Path, name: str) -> int | None:
    """Return the number behind `name` in a file of such lines; None without the line or the file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), None)
