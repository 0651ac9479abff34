"""Where every byte of a model's file went."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class LedgerRow:
    """One tensor in the file.

    `kind`: "dense", "masked", "quantized", "clustered", "cast" or "normal-float" for weights, and for biases and
    normalization where something lies on them, which else are "other"; "input quantizer" for the range of a layer's
    input. `formula_bytes` is what a slide would say: bits × numbers / 8, zeros of a mask free. `candidates`: bytes of
    each way to write it; `chosen` is the smallest ("tied": written before). Scales and levels count as tables.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    parameters: int
    fp32_bytes: int
    formula_bytes: int
    chosen: str
    weight_bytes: int = 0
    table_bytes: int = 0
    index_bytes: int = 0
    candidates: dict[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.table_bytes + self.index_bytes


@dataclass(frozen=True)
class Ledger:
    """The account of one file: `total_bytes` is its exact length, and the parts sum to it."""

    total_bytes: int
    header_bytes: int
    rows: tuple[LedgerRow, ...]

    @property
    def fp32_bytes(self) -> int:
        """Four bytes for every number that inference needs."""
        return sum(row.fp32_bytes for row in self.rows)

    @property
    def formula_bytes(self) -> int:
        """The size by formula, without tables, indices and header."""
        return sum(row.formula_bytes for row in self.rows)

    @property
    def parameters(self) -> int:
        return sum(row.parameters for row in self.rows)

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the same numbers in fp32."""
        return self.fp32_bytes / self.total_bytes

    def parts(self) -> dict[str, int]:
        """Return the bytes by purpose; they sum to `total_bytes`."""
        weights = [row for row in self.rows if row.kind != "other"]
        others = [row for row in self.rows if row.kind == "other"]
        return {
            "weights": sum(row.weight_bytes for row in weights),
            "tables": sum(row.table_bytes for row in weights),
            "indices": sum(row.index_bytes for row in weights),
            "other tensors": sum(row.total_bytes for row in others),
            "header": self.header_bytes,
        }

    def to_rows(self) -> list[dict]:
        """Return one plain dictionary a tensor, with `total_bytes`, for a table."""
        return [{**asdict(row), "total_bytes": row.total_bytes} for row in self.rows]

    def __str__(self) -> str:
        heads = ("tensor", "shape", "kind", "coding", "fp32", "formula", "values", "tables", "indices", "bytes")
        lines = [heads, *(_cells(row) for row in self.rows)]
        lines.append(("header", "", "", "", "", "", "", "", "", f"{self.header_bytes:,}"))
        lines.append(_sums(self))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = "\n".join(_align(line, widths) for line in lines)
        return f"{text}\n{self.ratio:.1f}× smaller than fp32"


def _cells(row: LedgerRow) -> tuple[str, ...]:
    numbers = (row.fp32_bytes, row.formula_bytes, row.weight_bytes, row.table_bytes, row.index_bytes, row.total_bytes)
    return (row.name, "×".join(map(str, row.shape)), row.kind, row.chosen, *(f"{n:,}" for n in numbers))


def _sums(ledger: Ledger) -> tuple[str, ...]:
    columns = ("fp32_bytes", "formula_bytes", "weight_bytes", "table_bytes", "index_bytes")
    numbers = [sum(getattr(row, column) for row in ledger.rows) for column in columns]
    return ("total", "", "", "", *(f"{n:,}" for n in (*numbers, ledger.total_bytes)))


def _align(cells: tuple[str, ...], widths: list[int]) -> str:
    left, right = cells[:4], cells[4:]
    words = [cell.ljust(width) for cell, width in zip(left, widths, strict=False)]
    return "  ".join([*words, *(cell.rjust(width) for cell, width in zip(right, widths[4:], strict=True))]).rstrip()
