"""Memory and energy, as the operating system, torch's allocator and the processor's own counters tell them."""

from __future__ import annotations

from dataclasses import dataclass

NOT_AVAILABLE = "not available on this machine"


@dataclass(frozen=True)
class Memory:
    """Where the bytes are while a model runs, all measured.

    `weights_bytes`: parameters and buffers as the runtime's torch model holds them. `activations_bytes`: the most that
    one eager forward of the batch holds at a time, without weights and input, from the allocator. `resident_bytes`: the
    process's resident size by stage, in order, such as {"before": …, "prepared": …, "peak while running": …}; it counts
    Python and the libraries too, and is empty where the system does not tell. `cuda_bytes`: the GPU allocator's peak.
    """

    runtime: str
    batch: int
    weights_bytes: int
    activations_bytes: int
    resident_bytes: dict[str, int]
    cuda_bytes: int | None = None


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
