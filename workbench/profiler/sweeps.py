"""How latency and throughput change with the batch and the number of threads, and where more of either stops paying."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from workbench.profiler.room import bytes_for_one, has_room, require_room
from workbench.profiler.timing import Latency, measure
from workbench.runtimes import runtime as runtime_named

BATCHES = (1, 2, 4, 8, 16, 32, 64)
KNEE = 0.9  # of the most images a second


@dataclass(frozen=True)
class SweepPoint:
    """The latency of one batch size on one number of threads."""

    batch: int
    threads: int
    latency: Latency

    @property
    def images_per_second(self) -> float:
        return self.latency.images_per_second


def sweep_batches(
    model: nn.Module,
    example_of: Callable[[int], Tensor],
    runtime: str = "openvino",
    batches: Sequence[int] = BATCHES,
    threads: Sequence[int] = (1,),
    calls: int = 20,
    budget_s: float | None = None,
) -> Iterator[list[SweepPoint]]:
    """Time every batch size on every number of threads, all in turns, and yield the points so far.

    `example_of(batch)` gives the batch, float (batch, C, H, W), such as `data.example`. While the models are prepared
    the lists are empty. `calls` and `budget_s` are those of `measure`. Batches that have no room are left out. Raises
    RuntimeFailed where a batch cannot be prepared, or not even the smallest has room.
    """
    needed, prepared = bytes_for_one(model, example_of(1)), []
    require_room(needed, min(batches))
    for count in threads:
        for batch in batches:
            if not has_room(needed, batch):
                continue
            prepared.append(runtime_named(runtime).prepare(model, example_of(batch), count))
            yield []
    for taken in measure(prepared, calls, budget_s):
        yield [SweepPoint(one.batch, one.threads, one) for one in taken if one.calls]


def knee(points: Sequence[SweepPoint]) -> SweepPoint:
    """Return the quickest of those points that reach 90 % of the most images a second; beyond it waiting buys little.

    Raises ValueError where there is no point.
    """
    if not points:
        raise ValueError("A knee needs at least one measured point; run the sweep to its end.")
    enough = KNEE * max(point.images_per_second for point in points)
    return min((p for p in points if p.images_per_second >= enough), key=lambda p: p.latency.median_ms)
