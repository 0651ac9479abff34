"""Room for a batch: what one image takes while a model runs, and what this process may still take.

Linux promises memory that it does not have and ends the process that takes it up, so a batch is weighed before it is
made rather than tried.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from workbench.profiler.units import size
from workbench.runtimes import RuntimeFailed

SHARE = 0.8  # of what is free: the runtimes keep copies of their own


def free_bytes() -> int | None:
    """Return the memory that this process may still take, the limit of its container counted; None if unknown."""
    found = [amount for amount in (_available(), _below_limit()) if amount is not None]
    return min(found, default=None)


def bytes_for(batch: Tensor) -> int:
    """Return the bytes of a tensor's numbers."""
    return batch.numel() * batch.element_size()


def room_for(needed: int, batch: int) -> int:
    """Return `batch`, or the largest power of two below it that has room where one image takes `needed` bytes."""
    while batch > 1 and not _fits(needed * batch):
        batch = 1 << ((batch - 1).bit_length() - 1)
    return batch


def require_room(needed: int, batch: int) -> None:
    """Raise RuntimeFailed unless `batch` images of `needed` bytes each have room."""
    if not _fits(needed * batch):
        raise RuntimeFailed(
            f"A batch of {batch:,} would take about {size(needed * batch)}, one image measured and multiplied, and "
            f"{size(free_bytes())} are free; take a smaller batch."
        )


def _fits(count: int) -> bool:
    free = free_bytes()
    return free is None or count < SHARE * free


def _available() -> int | None:
    """Return what Linux calls available: free memory, and caches that it would give back."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * found[0] if found else None


def _below_limit() -> int | None:
    """Return what is left below the limit of this process's control group; None without one."""
    group = Path("/sys/fs/cgroup")
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group of version 2, or its limit is "max"
        return None
