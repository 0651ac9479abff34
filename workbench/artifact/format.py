"""The file: a magic word, a header, the tensors, a checksum.

    "WBNCH"  version (1 byte)  length of header (varint)  header  tensors  CRC-32 of all before (4 bytes)

The header is JSON, deflated where that is shorter: which layers there are. Shapes follow from them, so a tensor begins
with one byte, how it is coded and its number type, and goes on with its values. The tensors stand in the order of the
layers, sorted by name within a layer. There is no pickle, and a file cannot name anything to run.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import stat
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from workbench import weights
from workbench.artifact import architecture as arch
from workbench.artifact.coding import FORMS, Code, code_symbols, code_words, read_symbols, read_words
from workbench.artifact.ledger import Ledger, LedgerRow
from workbench.artifact.reader import ArtifactError, Reader, varint
from workbench.models import build

MAGIC, VERSION = b"WBNCH", 1
MAX_FILE_BYTES, MAX_HEADER_BYTES = 2**31, 2**24
SYMBOLS, TIED, MASKED = 3, 6, 8  # the first byte of a tensor: its form, + 3 for symbols, + 8 below a mask
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
_WORDS = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}
_VIEWS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# --- public ---------------------------------------------------------------------------------------------------------


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


def encode(model: nn.Module) -> bytes:
    """Return exactly the bytes that `save` writes."""
    return pack(model)[0]


def ledger(model: nn.Module) -> Ledger:
    """Return where every byte of the model's file goes."""
    return pack(model)[1]


def load(path: str | os.PathLike, like: nn.Module | None = None) -> nn.Module:
    """Return the model in the file, in eval mode on the CPU; raises ArtifactError.

    `like`: for a class of your own, a freshly made model of that class; it is left untouched.
    """
    try:
        return decode(_read(path), like)
    except ArtifactError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error.__cause__


# --- writing --------------------------------------------------------------------------------------------------------


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
        for name, layer in arch.walk(model):
            _add_layer(body, name, layer)
    frame = MAGIC + bytes([VERSION]) + varint(len(header)) + header
    data = frame + b"".join(body.chunks)
    data += struct.pack("<I", zlib.crc32(data))
    _check_size(sum(row.parameters for row in body.rows), len(data))
    return data, Ledger(len(data), len(frame) + body.notes + 4, tuple(body.rows))


def _header(model: nn.Module) -> bytes:
    table = arch.layer_table(model)
    content = _described(getattr(model, "architecture", None), table)
    layers = [layer for _, layer in arch.walk(model)]
    inputs = [i for i, layer in enumerate(layers) if _input_quantizer(layer) is not None]
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
        return self.note("fixed") == other.note("fixed") and torch.equal(self.value, other.value)

    def note(self, form: str) -> bytes:
        """Return the bytes that tell a reader what follows: coding and number type, then the quantizer if any."""
        first = FORMS.index(form) | DTYPES.index(self.value.dtype) << 4
        if self.quantizer is not None:
            return bytes([first + SYMBOLS]) + _quantizer_note(self.quantizer, self.mask_at)
        return bytes([first + SYMBOLS * (self.value.dtype == torch.bool) + MASKED * bool(self.mask_at)])

    def code(self) -> tuple[Code, dict[str, int]]:
        """Return the smallest coding, and the bytes of all that were tried."""
        if self.quantizer is not None:
            return code_symbols(self.symbols.reshape(-1).numpy(), _zeros(self.quantizer, self.shape))
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
    return value.contiguous().reshape(-1).view(_VIEWS[size]).numpy().view(f"u{size}").astype(_WORDS[size], copy=False)


def _exact_quantizer(weight: weights.WeightCode | None, value: Tensor) -> weights.FakeQuantize | None:
    """Return the quantizer if its symbols give exactly this weight; NaN, or a zero out of its range, do not."""
    if weight is None or weight.kind != "quantized" or not value.numel():
        return None
    exact = weight.quantizer.values(weight.symbols).to("cpu")
    return weight.quantizer if exact.dtype == value.dtype and torch.equal(exact, value) else None


def _mask_position(layer: nn.Module, quantizer: weights.FakeQuantize | None) -> int:
    stack = weights.weight_parametrizations(layer)
    masks = [i for i, p in enumerate(stack) if isinstance(p, weights.Mask)]
    outside = quantizer is not None and masks[-1] > next(i for i, p in enumerate(stack) if p is quantizer)
    return 2 if outside else 1


# A quantizer is two bytes (bits - 1 | symmetric << 3 | mask << 4 | zero points << 6, axis + 1), its scales in fp32, and
# its zero points: none if all are 0, else in one byte each, or in four.
_ZERO_TYPES = ("", "<i1", "<i4")


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
    zero_type = _ZERO_TYPES[_zero_type(quantizer)]
    zeros = quantizer.zero_point.cpu().numpy().astype(zero_type).tobytes() if zero_type else b""
    return quantizer.scale.cpu().numpy().astype("<f4").tobytes() + zeros


def _zeros(quantizer: weights.FakeQuantize, shape: tuple[int, ...]) -> np.ndarray | int:
    """Return the symbol of zero: 0, or one for each of the weight's numbers."""
    if not quantizer.zero_point.any():
        return 0
    zero = quantizer.along_weight(quantizer.zero_point.cpu(), len(shape))
    return zero.expand(shape).reshape(-1).numpy()


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# --- reading --------------------------------------------------------------------------------------------------------


def decode(data: bytes, like: nn.Module | None = None) -> nn.Module:
    """Return the model in these bytes; see `load`."""
    if like is not None and not isinstance(like, nn.Module):
        raise ArtifactError(f"`like` is {like!r}, which is not a model; pass an instance, as in like=MyModel().")
    reader = _checked(data)
    try:
        content = _read_header(reader)
        table = _table(content)
        model = _skeleton(content, table, like, len(data))
        _fill(model, reader, table, set(content.get("inputs", ())))
    except ArtifactError:
        raise
    except Exception as error:  # a file with a good checksum can still hold anything
        raise ArtifactError(f"its content makes no sense ({error}); save it again.") from error
    return model.eval()


def _read(path: str | os.PathLike) -> bytes:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError("it is not a file; give the path of a file that save() wrote.")
        if status.st_size > MAX_FILE_BYTES:
            raise ArtifactError(f"it has {status.st_size:,} bytes, more than the {MAX_FILE_BYTES:,} of any model here.")
        return Path(path).read_bytes()
    except OSError as error:
        raise ArtifactError(f"{error.strerror or error}; check the path and its permissions.") from error


def _checked(data: bytes) -> Reader:
    """Return a reader behind magic word and version, once the checksum has shown that every byte is as written."""
    if not data:
        raise ArtifactError("it is empty; save the model again.")
    if not data.startswith(MAGIC):
        raise ArtifactError("it is not a model saved by workbench; give the path of a file that save() wrote.")
    content, checksum = data[:-4], data[-4:]
    if zlib.crc32(content) != int.from_bytes(checksum, "little") or len(data) < len(MAGIC) + 5:
        raise ArtifactError("it is damaged (cut off or altered: the checksum differs); copy or save it again.")
    reader = Reader(content)
    reader.take(len(MAGIC))
    (version,) = reader.take(1)
    if version != VERSION:
        raise ArtifactError(f"it has format {version}, this version reads format {VERSION}; update workbench.")
    return reader


def _read_header(reader: Reader) -> dict[str, Any]:
    header = reader.take(reader.varint())
    text = header[1:]
    if header[:1] == b"z":
        inflate = zlib.decompressobj(wbits=-15)
        text = inflate.decompress(text, MAX_HEADER_BYTES)
        if not inflate.eof:
            raise ArtifactError(f"its header is cut off or longer than {MAX_HEADER_BYTES:,} bytes; save it again.")
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("layers", {}), dict):
        raise ArtifactError("its header is not a description of layers; save it again.")
    return content


def _skeleton(content: dict[str, Any], table: arch.Table, like: nn.Module | None, file_bytes: int) -> nn.Module:
    """Return a model with the right layers and any values."""
    _check_size(arch.count_numbers(table), file_bytes)
    named = "model" in content
    if like is None and not named:
        _refuse_own_classes(table)
    start = arch.bare_copy(like) if like is not None else build(**content["model"]) if named else None
    model = arch.assemble(start, table)
    if named:
        model.architecture = content["model"]
    return model


def _table(content: dict[str, Any]) -> arch.Table:
    layers = content.get("layers", {})
    if "model" not in content:
        return layers
    base = arch.base_table(content["model"])
    if arch.fingerprint(base) != content.get("base"):
        name = content["model"].get("name")
        raise ArtifactError(f"it holds a {name} as another version of workbench builds it; use that version.")
    return arch.patch(base, layers)


def _refuse_own_classes(table: arch.Table) -> None:
    for name, spec in table.items():
        if spec[0] == "own":
            where = f"its layer {name!r} is" if name else "it holds"
            raise ArtifactError(f"{where} a {spec[1]}, a class of your own; pass a fresh model as like={spec[1]}().")


def _check_size(count: int, file_bytes: int) -> None:
    """Refuse more numbers than a file of this length can honestly hold, so that a small one cannot fill the memory."""
    limit = min(2**30, 2**24 + 2**12 * file_bytes)
    if count > limit:
        raise ArtifactError(f"{count:,} numbers in {file_bytes:,} bytes are more than a file may hold ({limit:,}).")


@dataclass
class _Stored:
    """One tensor read from the file, and the parametrizations for the layer that uses it."""

    value: Tensor
    stack: tuple[nn.Module, ...] = ()

    @cached_property
    def parameter(self) -> nn.Parameter:
        return nn.Parameter(self.value, requires_grad=self.value.is_floating_point())


def _fill(model: nn.Module, reader: Reader, table: arch.Table, inputs: set[int]) -> None:
    """Give every layer its tensors, masks and quantizers; `inputs` counts the layers whose input is quantized."""
    stored, filled = [], {}
    for index, layer in enumerate([model.get_submodule(name) for name in table]):
        for name in arch.tensor_names(layer):
            stored.append(_read_tensor(reader, tuple(getattr(layer, name).shape), stored))
            filled[layer, name] = stored[-1]
        if index in inputs:
            scale, zero = reader.unpack("fB")
            weights.attach_input_quantizer(layer, weights.InputQuantizer(torch.tensor(scale), torch.tensor(zero)))
    if len(reader):
        raise ArtifactError(f"{len(reader)} bytes are left over; save it again.")
    for (layer, name), tensor in filled.items():
        _assign(layer, name, tensor)


def _assign(layer: nn.Module, name: str, tensor: _Stored) -> None:
    if name in layer._buffers:
        layer._buffers[name] = tensor.value
    else:
        layer._parameters[name] = tensor.parameter
    for parametrization in tensor.stack:
        weights.parametrize_weight(layer, copy.deepcopy(parametrization))


def _read_tensor(reader: Reader, shape: tuple[int, ...], stored: list[_Stored]) -> _Stored:
    (first,) = reader.take(1)
    coding, dtype = first & 7, DTYPES[first >> 4]
    if coding == TIED:
        return _tied(stored[reader.varint()], shape)
    if coding > TIED:
        raise ArtifactError("a tensor in it is coded in no known way; save it again.")
    form, count = FORMS[coding % SYMBOLS], prod(shape)
    if coding < SYMBOLS:
        words = read_words(reader, form, count, _WORDS[dtype.itemsize])
        value = _from_words(words, dtype).reshape(shape)
        return _Stored(value, (weights.Mask(value != 0),) if first & MASKED else ())
    if dtype == torch.bool:
        return _Stored(torch.from_numpy(read_symbols(reader, form, count, 0) != 0).reshape(shape))
    return _read_quantized(reader, form, shape)


def _tied(earlier: _Stored, shape: tuple[int, ...]) -> _Stored:
    if tuple(earlier.value.shape) != shape:
        raise ArtifactError(f"it ties tensors of shapes {tuple(earlier.value.shape)} and {shape}; save it again.")
    return earlier


def _from_words(words: np.ndarray, dtype: torch.dtype) -> Tensor:
    native = words.astype(words.dtype.newbyteorder("="), copy=False)
    signed = native.view(f"i{native.itemsize}") if native.itemsize > 1 else native
    return torch.from_numpy(signed).view(dtype)


def _read_quantized(reader: Reader, form: str, shape: tuple[int, ...]) -> _Stored:
    first, axis = reader.take(2)
    bits, mask_at, zero_type = (first & 7) + 1, first >> 4 & 3, _ZERO_TYPES[first >> 6]
    scale_shape = () if axis == 0 else (shape[axis - 1],)
    scale = np.frombuffer(reader.take(4 * prod(scale_shape)), "<f4").astype(np.float32)
    zero = np.zeros(scale_shape, np.int32)
    if zero_type:
        zero = np.frombuffer(reader.take(prod(scale_shape) * np.dtype(zero_type).itemsize), zero_type).astype(np.int32)
    quantizer = weights.FakeQuantize(
        torch.from_numpy(scale).reshape(scale_shape),
        torch.from_numpy(zero).reshape(scale_shape),
        bits,
        axis - 1 if axis else None,
        symmetric=bool(first & 8),
    )
    symbols = torch.from_numpy(read_symbols(reader, form, prod(shape), _zeros(quantizer, shape)).astype(np.int32))
    if symbols.numel() and not quantizer.quant_min <= int(symbols.min()) <= int(symbols.max()) <= quantizer.quant_max:
        raise ArtifactError(f"a {bits}-bit symbol in it is out of range; save it again.")
    value = quantizer.values(symbols.reshape(shape))
    mask = weights.Mask(value != 0)
    return _Stored(value, ((quantizer,), (mask, quantizer), (quantizer, mask))[mask_at])
