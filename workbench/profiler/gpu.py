"""What an NVIDIA GPU reaches: products of square matrices in each precision, and copies in its memory and L2 cache.

Timed by the GPU's own events around several calls in a row, since a single one is over before the next is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from workbench.runtimes import MEASURING, RuntimeFailed
from workbench.runtimes.cuda import AMPERE, computing_in, flush_bytes

SIZES = (2048, 4096, 8192)  # of the square matrices whose products show the peaks
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FROM_AMPERE = ("tf32", "bf16")
IN_A_ROW, TRIES = 20, 5
COPY_BYTES = 2**28  # at least: what no cache holds

# "peak" or "bandwidth", its name, what was measured, 10⁹ operations or bytes a second
Rate = tuple[str, str, str, float]


def l2_bytes() -> int:
    """Return what the GPU's L2 cache holds, in bytes; raises RuntimeFailed where there is no GPU."""
    if not torch.cuda.is_available():
        raise RuntimeFailed("The roofs of a GPU cannot be measured: no GPU here.")
    return torch.cuda.get_device_properties(0).L2_cache_size


def cuda_rates(cache_bytes: int) -> Iterator[Rate]:
    """Measure the GPU's peaks and bandwidths one after another, in seconds; sizes that have no room are left out."""
    for precision in PRECISIONS:
        if precision in FROM_AMPERE and torch.cuda.get_device_capability() < AMPERE:
            continue
        for size in SIZES:
            rate = _or_none(lambda p=precision, s=size: _product_rate(p, s))
            if rate is not None:
                yield "peak", precision, f"{precision} product of {size}×{size} matrices", rate
    for level, nbytes in copies(cache_bytes).items():
        rate = _or_none(lambda n=nbytes: _copy_rate(n))
        if rate is not None:
            yield "bandwidth", level, f"copy of {nbytes // 1024:,} KiB, read and written", rate


def copies(cache_bytes: int) -> dict[str, int]:
    """Return how many bytes to copy, by level: they and their copy fill half of the cache, or overflow it."""
    inside = {"L2": cache_bytes // 4} if cache_bytes else {}
    return inside | {"memory": max(COPY_BYTES, 2 * flush_bytes(cache_bytes))}


def _or_none(measure: Callable[[], float]) -> float | None:
    try:
        return measure()
    except torch.cuda.OutOfMemoryError:
        return None


def _product_rate(precision: str, size: int) -> float:
    """Return 10⁹ operations a second, on random numbers: constant ones take less power, and a GPU is quicker then."""
    generator = torch.Generator("cuda").manual_seed(0)
    left, right = (
        torch.randn(size, size, generator=generator, device="cuda").to(PRECISIONS[precision]) for _ in range(2)
    )
    out = torch.empty_like(left)
    with MEASURING, computing_in(precision):
        return 2 * size**3 / _quickest_s(lambda: torch.mm(left, right, out=out)) / 1e9


def _copy_rate(nbytes: int) -> float:
    source = torch.ones(nbytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    with MEASURING:
        return 2 * nbytes / _quickest_s(lambda: target.copy_(source)) / 1e9


def _quickest_s(run: Callable) -> float:
    """Return the shortest time of a call, in seconds, from groups of calls between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken_ms = []
    for _ in range(TRIES + 1):  # the first group warms up
        start.record()
        for _ in range(IN_A_ROW):
            run()
        end.record()
        torch.cuda.synchronize()
        taken_ms.append(start.elapsed_time(end) / IN_A_ROW)
    return min(taken_ms[1:]) / 1000
