"""Why a model is not faster: one verdict for the whole and one for each layer, from what was measured.

Each names its evidence and one thing to try. The three limits, starting a layer, moving its bytes, doing its
operations, are those of the roofline (Williams et al., 2009), with the cost of an empty layer beside them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

KINDS = (
    "launch-bound",
    "memory-bound",
    "compute-bound",
    "no kernel",
    "fell back to fp32",
    "unaligned width",
    "conversion overhead",
    "inside the noise",
    "faster",
)


@dataclass(frozen=True)
class Verdict:
    """What limits a layer, or the whole model where `layer` is None; `kind` is one of KINDS.

    `evidence` is one sentence with the measured figures, `advice` one sentence with one thing to try.
    """

    layer: str | None
    kind: str
    evidence: str
    advice: str

    def to_dict(self) -> dict:
        """Return it as JSON can hold it."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.evidence} {self.advice}".strip()
