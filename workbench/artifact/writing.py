"""Write a model into one file, and account for every byte of it in the same pass."""

from __future__ import annotations

import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench import weights
from workbench.artifact import architecture as arch
from workbench.artifact.accounts import Ledger, LedgerRow
from workbench.artifact.coding import FORMS, Code, code_symbols, code_words, pack_bits
from workbench.artifact.contexts import Stream
from workbench.artifact.format import (
    CAST,
    CODEBOOK,
    DICTIONARY,
    DTYPES,
    FIRST_AXIS,
    GROUPS,
    KINDS,
    MAGIC,
    MASK_ABOVE,
    MASK_BELOW,
    NO_AXIS,
    QUANTIZER,
    STEPS,
    TABLES,
    TYPED,
    VERSION,
    WORDS,
    ZERO_OF_NF4,
    ZERO_TYPES,
    ArtifactError,
    check_size,
    pack_digits,
    varint,
    zero_symbols,
)

_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def save(model: nn.Module, path: str | os.PathLike) -> int:
    """Write the model into one file and return its bytes; raises ArtifactError, and then an older file is unharmed."""
    data = encode(model)
    target = Path(os.path.realpath(path))
    draft = target.with_name(f".{secrets.token_hex(6)}.tmp")
    try:
        _write(draft, data)
        os.replace(draft, target)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink()
        if not isinstance(error, OSError):
            raise
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}. {_UNHARMED}") from error
    return len(data)


_UNHARMED = "What was there before is unharmed; free some space or choose another place."


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def encode(model: nn.Module) -> bytes:
    """Return exactly the bytes that `save` writes."""
    return pack(model)[0]


def ledger(model: nn.Module) -> Ledger:
    """Return where every byte of the model's file goes."""
    return pack(model)[1]


def pack(model: nn.Module) -> tuple[bytes, Ledger]:
    """Return the model's file and its ledger, from one pass; raises ArtifactError."""
    if not isinstance(model, nn.Module):
        raise ArtifactError(f"{model!r} is not a model; pass a torch.nn.Module.")
    header = _header(model)
    with torch.no_grad():
        parts = list(_parts(model))
    rows, chunks, stream = [], [], Stream()
    for part in reversed(parts):  # the stream gives back first what came last
        row, content, stream = part.written(stream)
        rows.insert(0, row)
        chunks.insert(0, content)
    streamed = bytes(stream)
    data = MAGIC + bytes([VERSION]) + varint(len(header)) + header + varint(len(streamed)) + streamed + b"".join(chunks)
    data += struct.pack("<I", zlib.crc32(data))
    check_size(sum(row.parameters for row in rows), len(data))
    return data, Ledger(len(data), len(data) - sum(row.total_bytes for row in rows), tuple(rows))


def _header(model: nn.Module) -> bytes:
    table = arch.layer_table(model)
    content = _described(getattr(model, "architecture", None), table)
    inputs = [i for i, (_, layer) in enumerate(arch.distinct(model)) if _input_quantizer(layer) is not None]
    if inputs:
        content["inputs"] = inputs
    text = json.dumps(content, separators=(",", ":")).encode()
    shrink = zlib.compressobj(9, wbits=-15, zdict=DICTIONARY)
    deflated = shrink.compress(text) + shrink.flush()
    return min(b"j" + text, b"z" + deflated, key=len)


def _described(architecture: Any, table: arch.Table) -> dict[str, Any]:
    """Describe the layers: as differences from a model that can be built by name, else all of them."""
    if isinstance(architecture, dict):
        try:
            base = arch.base_table(architecture)
            changes = arch.difference(base, table)
            if list(arch.patch(base, changes).items()) == list(table.items()):
                content = {"model": arch.shortened(architecture), "base": arch.fingerprint(base)}
                return {**content, "layers": changes} if changes else content
        except (TypeError, ValueError, LookupError, RuntimeError):
            pass  # another library's `architecture`: the table says it all
    return {"layers": table}


def _input_quantizer(layer: nn.Module) -> weights.InputQuantizer | None:
    quantizer = getattr(layer, "input_quantizer", None)
    return quantizer if isinstance(quantizer, weights.InputQuantizer) else None


# --- tensors ---------------------------------------------------------------------------------------------------------


def _parts(model: nn.Module) -> Iterator[_Tensor | _Tied | _InputRange]:
    """Yield what the file holds behind its header, in order; a tensor that lies there already only once."""
    written: dict[int, tuple[int, _Tensor]] = {}
    count = 0
    for name, layer in arch.distinct(model):
        prefix = f"{name}." if name else ""
        for tensor_name in arch.tensor_names(layer):
            tensor = _Tensor.of(prefix + tensor_name, layer, tensor_name)
            number, earlier = written.setdefault(_identity(layer, tensor_name), (count, tensor))
            yield _Tied(tensor, number) if number < count and earlier.same_as(tensor) else tensor
            count += 1
        quantizer = _input_quantizer(layer)
        if quantizer is not None:
            yield _InputRange(f"{prefix}input", quantizer)


@dataclass(frozen=True)
class _InputRange:
    """Scale and zero point of a layer's input."""

    name: str
    quantizer: weights.InputQuantizer

    def written(self, stream: Stream) -> tuple[LedgerRow, bytes, Stream]:
        content = struct.pack("<fB", float(self.quantizer.scale), int(self.quantizer.zero_point))
        row = LedgerRow(self.name, (), "input quantizer", 0, 0, 0, "fixed", table_bytes=len(content))
        return row, content, stream


@dataclass(frozen=True)
class _Tied:
    """A tensor that lies in the file already, as number `earlier`."""

    tensor: _Tensor
    earlier: int

    def written(self, stream: Stream) -> tuple[LedgerRow, bytes, Stream]:
        row = LedgerRow(self.tensor.name, self.tensor.shape, self.tensor.kind, 0, 0, 0, "tied")
        return row, bytes([KINDS.index("tied") << 2]) + varint(self.earlier), stream


@dataclass(frozen=True)
class _Tensor:
    """One tensor as the model uses it, and what is stacked on it; `mask_at`: 0, MASK_BELOW the coder, or MASK_ABOVE."""

    name: str
    value: Tensor
    coder: weights.FakeQuantize | weights.Codebook | weights.Cast | weights.NormalFloat | None
    symbols: Tensor | None
    mask_at: int

    @classmethod
    def of(cls, full_name: str, layer: nn.Module, name: str) -> _Tensor:
        code = weights.describe(layer, name)
        value = code.values.cpu()
        if value.dtype not in DTYPES:
            raise ArtifactError(f"{full_name} has the number type {value.dtype}, which a file cannot hold; convert it.")
        coder = code.coder if value.numel() and getattr(code.coder, "axis", None) in (None, 0) else None
        mask_at = _mask_position(layer, name, coder) if code.mask is not None else 0
        return cls(full_name, value, coder, None if coder is None else code.symbols.cpu(), mask_at)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def kind(self) -> str:
        """What the ledger calls it."""
        if self.coder is not None:
            return self.coder.kind
        return "masked" if self.mask_at else "dense" if self.value.dim() > 1 else "other"

    def same_as(self, other: _Tensor) -> bool:
        """Say whether one may stand for the other, also in what is stacked on it."""
        same_stack = self.mask_at == other.mask_at and self.kind == other.kind and self._notes() == other._notes()
        return same_stack and torch.equal(self.value, other.value)

    def written(self, stream: Stream) -> tuple[LedgerRow, bytes, Stream]:
        """Return the ledger's row, the bytes among the tensors, and the stream with what went there."""
        note, table = self._notes()
        code, sizes, stream = self._coded(stream)
        row = LedgerRow(
            self.name,
            self.shape,
            self.kind,
            parameters=self.value.numel(),
            fp32_bytes=4 * self.value.numel(),
            formula_bytes=self.formula_bytes(),
            chosen=code.form,
            weight_bytes=len(code.values) + code.streamed[0],
            table_bytes=len(table) + len(code.table),
            index_bytes=len(code.index) + code.streamed[1],
            candidates={form: size + len(table) for form, size in sizes.items()},
        )
        return row, self._first(code.form) + note + table + bytes(code), stream

    def _first(self, form: str) -> bytes:
        kind = self.coder.kind if self.coder is not None else "words"
        first = FORMS.index(form) | KINDS.index(kind) << 2 | self.mask_at
        if self.value.dtype == torch.float32:
            return bytes([first])
        return bytes([first | TYPED, DTYPES.index(self.value.dtype)])

    def _notes(self) -> tuple[bytes, bytes]:
        """Return the bytes that say how the symbols are to be read, and the tables of what they stand for."""
        return _NOTES[type(self.coder)](self)

    def _coded(self, stream: Stream) -> tuple[Code, dict[str, int], Stream]:
        """Return the smallest coding, the bytes of all that were tried, and the stream behind it."""
        if self.coder is None and self.value.dtype == torch.bool and self.value.numel():
            return code_symbols(self.value.reshape(-1).numpy().astype(np.int32), 0, self.shape, stream)
        if self.coder is None:
            return code_words(_words(self.value), self.shape, stream)
        if self.coder.bits == 16:
            return code_words(self.symbols.reshape(-1).numpy().astype(WORDS[2]), self.shape, stream)
        symbols, zero = self.symbols, 0
        if isinstance(self.coder, weights.FakeQuantize):
            zero = zero_symbols(self.coder, self.shape)
        elif isinstance(self.coder, weights.NormalFloat):
            zero = ZERO_OF_NF4
        elif isinstance(self.coder, weights.Codebook):
            levels, order = _used_levels(self)
            symbols, zero = order[symbols.long()], int((levels < 0).sum()) if (levels == 0).any() else -1
        return code_symbols(symbols.reshape(-1).numpy(), zero, self.shape, stream)

    def formula_bytes(self) -> int:
        numbers = int((self.value != 0).sum()) if self.mask_at else self.value.numel()
        bits = self.coder.bits if self.coder is not None else 8 * self.value.element_size()
        return (bits * numbers + 7) // 8


def _identity(layer: nn.Module, name: str) -> int:
    """Return the identity of the tensor that lies below: equal for tied weights."""
    if parametrize.is_parametrized(layer, name):
        return id(getattr(layer.parametrizations[name], "original", layer))
    return id(getattr(layer, name))


def _words(value: Tensor) -> np.ndarray:
    """Return the bits of a tensor's numbers as little-endian integers, (numbers,)."""
    size = value.element_size()
    return value.contiguous().reshape(-1).view(_VIEWS[size]).numpy().view(f"u{size}").astype(WORDS[size], copy=False)


def _mask_position(layer: nn.Module, name: str, coder: nn.Module | None) -> int:
    stack = weights.weight_parametrizations(layer, name)
    masks = [i for i, p in enumerate(stack) if isinstance(p, weights.Mask)]
    above = coder is not None and masks[-1] > next(i for i, p in enumerate(stack) if p is coder)
    return MASK_ABOVE if above else MASK_BELOW


# --- what symbols stand for ------------------------------------------------------------------------------------------


def _table(numbers: Tensor) -> tuple[int, bytes]:
    """Return numbers as bytes in the shortest way that holds them exactly, and the place of that way in TABLES."""
    numbers = numbers.detach().cpu().float().reshape(-1)
    ways = {i: _words(numbers.to(dtype)).tobytes() for i, dtype in enumerate(TABLES) if _holds(dtype, numbers)}
    steps = _in_steps(numbers.double().numpy())
    if steps is not None:
        ways[STEPS] = steps
    way = min(ways, key=lambda i: len(ways[i]))
    return way, ways[way]


def _holds(dtype: torch.dtype, numbers: Tensor) -> bool:
    return dtype == torch.float32 or torch.equal(numbers.to(dtype).float(), numbers)


def _in_steps(numbers: np.ndarray) -> bytes | None:
    """Return numbers as whole multiples, of at most 16 bits, of the largest power of two that divides them all."""
    if not len(numbers) or not np.isfinite(numbers).all() or not numbers.all():
        return None
    mantissas, exponents = np.frexp(numbers)
    whole = np.abs(mantissas * 2.0**24).astype(np.int64)
    exponent = int((exponents - 24 + np.log2(whole & -whole).astype(int)).min())
    multiples = numbers / 2.0**exponent
    width = int(np.abs(multiples).max()).bit_length() + 1
    if width > 16 or not -128 <= exponent <= 127:
        return None
    return struct.pack("<bB", exponent, width) + pack_bits(multiples.astype(np.int64) + (1 << width - 1), width)


def _zero_type(quantizer: weights.FakeQuantize) -> int:
    zero = quantizer.zero_point
    if not zero.any():
        return 0
    return 1 if torch.equal(zero, zero.to(torch.int8).to(zero.dtype)) else 2


def _quantizer_notes(tensor: _Tensor) -> tuple[bytes, bytes]:
    coder = tensor.coder
    kind, scales = _table(coder.step)
    zero = _zero_type(coder)
    zeros = coder.zero_point.cpu().numpy().astype(ZERO_TYPES[zero]).tobytes() if zero else b""
    axis = NO_AXIS if coder.axis is None else FIRST_AXIS if coder.group_size is None else GROUPS
    note = pack_digits((coder.bits - 2, kind, not coder.symmetric, zero, axis), QUANTIZER)
    return note + (varint(coder.group_size) if axis == GROUPS else b""), scales + zeros


def _used_levels(tensor: _Tensor) -> tuple[Tensor, Tensor]:
    """Return the levels that a codebook uses, in order, and for each of its symbols the place among them."""
    coder = tensor.coder
    count = len(coder.levels) + 1
    used = torch.bincount(tensor.symbols.reshape(-1), minlength=count) > 0
    all_levels = coder.values(torch.arange(count)).cpu()
    levels = all_levels[used].unique()
    return levels, torch.searchsorted(levels, all_levels).to(torch.int32)


def _codebook_notes(tensor: _Tensor) -> tuple[bytes, bytes]:
    levels, _ = _used_levels(tensor)
    others = levels[levels != 0]
    kind, table = _table(others)
    return pack_digits((kind, len(others) < len(levels), len(others)), CODEBOOK), table


def _cast_notes(tensor: _Tensor) -> tuple[bytes, bytes]:
    coder = tensor.coder
    kind, scales = _table(coder.scale) if coder.scale is not None else (0, b"")
    scaled = 0 if coder.scale is None else 1 + coder.scale.dim()
    return pack_digits((weights.FLOATS.index(coder.dtype), kind, scaled), CAST), scales


def _normal_float_notes(tensor: _Tensor) -> tuple[bytes, bytes]:
    kind, largest = _table(tensor.coder.absmax)
    return varint(tensor.coder.group_size) + bytes([kind]), largest


_NOTES = {
    type(None): lambda tensor: (b"", b""),
    weights.FakeQuantize: _quantizer_notes,
    weights.Codebook: _codebook_notes,
    weights.Cast: _cast_notes,
    weights.NormalFloat: _normal_float_notes,
}
