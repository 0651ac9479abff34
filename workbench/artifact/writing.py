"""Write a model into one file, and account for every byte of it in the same pass."""

from __future__ import annotations

import json
import os
import secrets
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench import weights
from workbench.artifact import architecture as arch
from workbench.artifact.accounts import Ledger, LedgerRow
from workbench.artifact.coding import FORMS, Code, code_symbols, code_words
from workbench.artifact.format import (
    DTYPES,
    MAGIC,
    MASKED,
    SYMBOLS,
    TIED,
    VERSION,
    WORDS,
    ZERO_TYPES,
    ArtifactError,
    check_size,
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


@dataclass
class _Body:
    """The tensors written so far, their ledger rows, and the bytes that only say how to read them."""

    chunks: list[bytes] = field(default_factory=list)
    rows: list[LedgerRow] = field(default_factory=list)
    notes: int = 0
    count: int = 0
    written: dict[int, tuple[int, _Tensor]] = field(default_factory=dict)  # by identity, to write tied tensors once

    def add(self, row: LedgerRow, note: bytes, content: bytes = b"") -> None:
        self.chunks += [note, content]
        self.rows.append(row)
        self.notes += len(note)


def pack(model: nn.Module) -> tuple[bytes, Ledger]:
    """Return the model's file and its ledger, from one pass; raises ArtifactError."""
    if not isinstance(model, nn.Module):
        raise ArtifactError(f"{model!r} is not a model; pass a torch.nn.Module.")
    header, body = _header(model), _Body()
    with torch.no_grad():
        for name, layer in arch.distinct(model):
            _add_layer(body, name, layer)
    frame = MAGIC + bytes([VERSION]) + varint(len(header)) + header
    data = frame + b"".join(body.chunks)
    data += struct.pack("<I", zlib.crc32(data))
    check_size(sum(row.parameters for row in body.rows), len(data))
    return data, Ledger(len(data), len(frame) + body.notes + 4, tuple(body.rows))


def _header(model: nn.Module) -> bytes:
    table = arch.layer_table(model)
    content = _described(getattr(model, "architecture", None), table)
    inputs = [i for i, (_, layer) in enumerate(arch.distinct(model)) if _input_quantizer(layer) is not None]
    if inputs:
        content["inputs"] = inputs
    text = json.dumps(content, separators=(",", ":")).encode()
    shrink = zlib.compressobj(9, wbits=-15)
    deflated = shrink.compress(text) + shrink.flush()
    return min(b"j" + text, b"z" + deflated, key=len)


def _described(architecture: Any, table: arch.Table) -> dict[str, Any]:
    """Describe the layers: as differences from a model that can be built by name, else all of them."""
    if isinstance(architecture, dict):
        try:
            base = arch.base_table(architecture)
            changes = arch.difference(base, table)
            if list(arch.patch(base, changes).items()) == list(table.items()):
                content = {"model": architecture, "base": arch.fingerprint(base)}
                return {**content, "layers": changes} if changes else content
        except (TypeError, ValueError, LookupError, RuntimeError):
            pass  # another library's `architecture`: the table says it all
    return {"layers": table}


def _input_quantizer(layer: nn.Module) -> weights.InputQuantizer | None:
    quantizer = getattr(layer, "input_quantizer", None)
    return quantizer if isinstance(quantizer, weights.InputQuantizer) else None


def _add_layer(body: _Body, name: str, layer: nn.Module) -> None:
    prefix = f"{name}." if name else ""
    for tensor_name in arch.tensor_names(layer):
        _add_tensor(body, prefix + tensor_name, layer, tensor_name)
        body.count += 1
    quantizer = _input_quantizer(layer)
    if quantizer is not None:
        content = struct.pack("<fB", float(quantizer.scale), int(quantizer.zero_point))
        row = LedgerRow(f"{prefix}input", (), "input quantizer", 0, 0, 0, "fixed", table_bytes=len(content))
        body.add(row, b"", content)


def _add_tensor(body: _Body, full_name: str, layer: nn.Module, name: str) -> None:
    tensor = _Tensor.of(full_name, layer, name)
    earlier = body.written.get(tensor.identity)
    if earlier is not None and earlier[1].same_as(tensor):
        body.add(LedgerRow(full_name, tensor.shape, tensor.kind, 0, 0, 0, "tied"), bytes([TIED]) + varint(earlier[0]))
        return
    body.written.setdefault(tensor.identity, (body.count, tensor))
    code, sizes = tensor.code()
    scales = _scales(tensor.quantizer)
    row = LedgerRow(
        full_name,
        tensor.shape,
        tensor.kind,
        parameters=tensor.value.numel(),
        fp32_bytes=4 * tensor.value.numel(),
        formula_bytes=tensor.formula_bytes(),
        chosen=code.form,
        weight_bytes=len(code.values),
        table_bytes=len(scales) + len(code.table),
        index_bytes=len(code.index),
        candidates={form: size + len(scales) for form, size in sizes.items()},
    )
    body.add(row, tensor.note(code.form), scales + bytes(code))


@dataclass(frozen=True)
class _Tensor:
    """One tensor as the model uses it, and what is stacked on it."""

    value: Tensor
    kind: str
    identity: int  # of the tensor that lies below: equal for tied weights
    mask_at: int  # 0 no mask, 1 a mask below the quantizer (or alone), 2 a mask above it
    quantizer: weights.FakeQuantize | None
    symbols: Tensor | None

    @classmethod
    def of(cls, full_name: str, layer: nn.Module, name: str) -> _Tensor:
        weight = weights.describe(layer) if name == "weight" else None
        value = (weight.values if weight is not None else getattr(layer, name).detach()).cpu()
        if value.dtype not in DTYPES:
            raise ArtifactError(f"{full_name} has the number type {value.dtype}, which a file cannot hold; convert it.")
        quantizer = _exact_quantizer(weight, value)
        mask_at = _mask_position(layer, quantizer) if weight is not None and weight.mask is not None else 0
        plain = "dense" if value.dim() > 1 else "other"
        kind = "quantized" if quantizer is not None else "masked" if mask_at else plain
        symbols = weight.symbols.cpu() if quantizer is not None else None
        return cls(value, kind, _identity(layer, name), mask_at, quantizer, symbols)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def same_as(self, other: _Tensor) -> bool:
        """Say whether one may stand for the other, also in what is stacked on it."""
        same_stack = self.note("fixed") == other.note("fixed") and _scales(self.quantizer) == _scales(other.quantizer)
        return same_stack and torch.equal(self.value, other.value)

    def note(self, form: str) -> bytes:
        """Return the bytes that tell a reader what follows: coding and number type, then the quantizer if any."""
        first = FORMS.index(form) | DTYPES.index(self.value.dtype) << 4
        if self.quantizer is not None:
            return bytes([first + SYMBOLS]) + _quantizer_note(self.quantizer, self.mask_at)
        return bytes([first + SYMBOLS * (self.value.dtype == torch.bool) + MASKED * bool(self.mask_at)])

    def code(self) -> tuple[Code, dict[str, int]]:
        """Return the smallest coding, and the bytes of all that were tried."""
        if self.quantizer is not None:
            return code_symbols(self.symbols.reshape(-1).numpy(), zero_symbols(self.quantizer, self.shape))
        if self.value.dtype == torch.bool and self.value.numel():
            return code_symbols(self.value.reshape(-1).numpy().astype(np.int32), 0)
        return code_words(_words(self.value))

    def formula_bytes(self) -> int:
        numbers = int((self.value != 0).sum()) if self.mask_at else self.value.numel()
        bits = self.quantizer.bits if self.quantizer is not None else 8 * self.value.element_size()
        return (bits * numbers + 7) // 8


def _identity(layer: nn.Module, name: str) -> int:
    if parametrize.is_parametrized(layer, name):
        return id(getattr(layer.parametrizations[name], "original", layer))
    return id(getattr(layer, name))


def _words(value: Tensor) -> np.ndarray:
    """Return the bits of a tensor's numbers as little-endian integers, (numbers,)."""
    size = value.element_size()
    return value.contiguous().reshape(-1).view(_VIEWS[size]).numpy().view(f"u{size}").astype(WORDS[size], copy=False)


def _exact_quantizer(weight: weights.WeightCode | None, value: Tensor) -> weights.FakeQuantize | None:
    """Return the quantizer if its symbols give exactly this weight; NaN, or a zero out of its range, do not."""
    if weight is None or weight.kind != "quantized" or not value.numel() or weight.coder.group_size:
        return None
    return weight.coder


def _mask_position(layer: nn.Module, quantizer: weights.FakeQuantize | None) -> int:
    stack = weights.weight_parametrizations(layer)
    masks = [i for i, p in enumerate(stack) if isinstance(p, weights.Mask)]
    outside = quantizer is not None and masks[-1] > next(i for i, p in enumerate(stack) if p is quantizer)
    return 2 if outside else 1


def _zero_type(quantizer: weights.FakeQuantize) -> int:
    zero = quantizer.zero_point
    if not zero.any():
        return 0
    return 1 if torch.equal(zero, zero.to(torch.int8).to(zero.dtype)) else 2


def _quantizer_note(quantizer: weights.FakeQuantize, mask_at: int) -> bytes:
    axis = 0 if quantizer.axis is None else quantizer.axis + 1
    zero = _zero_type(quantizer)
    return bytes([quantizer.bits - 1 | bool(quantizer.symmetric) << 3 | mask_at << 4 | zero << 6, axis])


def _scales(quantizer: weights.FakeQuantize | None) -> bytes:
    if quantizer is None:
        return b""
    zero_type = ZERO_TYPES[_zero_type(quantizer)]
    zeros = quantizer.zero_point.cpu().numpy().astype(zero_type).tobytes() if zero_type else b""
    return quantizer.scale.cpu().numpy().astype("<f4").tobytes() + zeros
