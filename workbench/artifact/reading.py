"""Turn a file back into a model. Whatever the file holds, the worst that can happen is an ArtifactError."""

from __future__ import annotations

import copy
import json
import os
import stat
import zlib
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench import weights
from workbench.artifact import architecture as arch
from workbench.artifact.coding import FORMS, packed_size, read_symbols, read_words, unpack_bits
from workbench.artifact.contexts import AnsCoder, read_stream
from workbench.artifact.format import (
    CAST,
    CODEBOOK,
    DICTIONARY,
    DTYPES,
    FIRST_MAGIC,
    GROUPS,
    KINDS,
    MAGIC,
    MASK_ABOVE,
    MASK_BELOW,
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    MAX_LAYERS,
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
    Reader,
    check_size,
    unpack_digits,
    zero_symbols,
)
from workbench.models import build


def load(path: str | os.PathLike, like: nn.Module | None = None) -> nn.Module:
    """Return the model in the file, in eval mode on the CPU; raises ArtifactError.

    `like`: for a class of your own, a freshly made model of that class; it is left untouched.
    """
    try:
        return decode(_read(path), like)
    except ArtifactError as error:
        raise ArtifactError(f"{path} cannot be loaded: {error}") from error.__cause__


def decode(data: bytes, like: nn.Module | None = None) -> nn.Module:
    """Return the model in these bytes; see `load`."""
    if like is not None and not isinstance(like, nn.Module):
        raise ArtifactError(f"`like` is {like!r}, which is not a model; pass an instance, as in like=MyModel().")
    start = arch.bare_copy(like) if like is not None else None
    reader = _checked(data)
    try:
        content = _read_header(reader)
        table = _table(content)
        model = _skeleton(content, table, start, len(data))
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
    if data.startswith(FIRST_MAGIC):
        raise ArtifactError("it has format 1, of an early workbench, which is no longer read; save the model again.")
    if not data.startswith(MAGIC):
        raise ArtifactError("it is not a model saved by workbench; give the path of a file that save() wrote.")
    content, checksum = data[:-4], data[-4:]
    if zlib.crc32(content) != int.from_bytes(checksum, "little") or len(data) < len(MAGIC) + 7:
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
        inflate = zlib.decompressobj(wbits=-15, zdict=DICTIONARY)
        text = inflate.decompress(text, MAX_HEADER_BYTES)
        if not inflate.eof:
            raise ArtifactError(f"its header is cut off or longer than {MAX_HEADER_BYTES:,} bytes; save it again.")
    content = json.loads(text)
    if not isinstance(content, dict) or not isinstance(content.get("layers", {}), dict):
        raise ArtifactError("its header is not a description of layers; save it again.")
    if len(content.get("layers", {})) > MAX_LAYERS:
        raise ArtifactError(f"it has {len(content['layers']):,} layers, more than {MAX_LAYERS:,}; save it again.")
    return content


def _skeleton(content: dict[str, Any], table: arch.Table, start: nn.Module | None, file_bytes: int) -> nn.Module:
    """Return a model with the right layers and any values: from the given start, by its name, or from nothing."""
    check_size(arch.count_numbers(table), file_bytes)
    architecture = arch.completed(content["model"]) if "model" in content else None
    if start is None and architecture is not None:
        start = build(**architecture)
    elif start is None:
        _refuse_own_classes(table)
    model = arch.assemble(start, table)
    if architecture is not None:
        model.architecture = architecture
    return model


def _table(content: dict[str, Any]) -> arch.Table:
    layers = content.get("layers", {})
    if "model" not in content:
        return layers
    base = arch.base_table(arch.completed(content["model"]))
    if arch.fingerprint(base) != content.get("base"):
        name = content["model"].get("name")
        raise ArtifactError(f"it holds a {name} as another version of workbench builds it; use that version.")
    return arch.patch(base, layers)


def _refuse_own_classes(table: arch.Table) -> None:
    for name, spec in table.items():
        if spec[0] == "own":
            where = f"its layer {name!r} is" if name else "it holds"
            raise ArtifactError(f"{where} a {spec[1]}, a class of your own; pass a fresh model as like={spec[1]}().")


@dataclass
class _Stored:
    """One tensor read from the file, and the parametrizations for the layer that uses it."""

    value: Tensor
    stack: tuple[nn.Module, ...] = ()

    @cached_property
    def parameter(self) -> nn.Parameter:
        return nn.Parameter(self.value, requires_grad=self.value.is_floating_point())


def _fill(model: nn.Module, reader: Reader, table: arch.Table, inputs: set[int]) -> None:
    """Give every layer its tensors, masks and coders; `inputs` counts the layers whose input is quantized."""
    stream = read_stream(reader.take(reader.varint()))
    stored, filled = [], {}
    layers = [model.get_submodule(name) for name, spec in table.items() if spec[0] != "same"]
    for index, layer in enumerate(layers):
        for name in arch.tensor_names(layer):
            stored.append(_read_tensor(reader, stream, tuple(getattr(layer, name).shape), stored))
            filled[layer, name] = stored[-1]
        if index in inputs:
            scale, zero = reader.unpack("fB")
            weights.attach_input_quantizer(layer, weights.InputQuantizer(torch.tensor(scale), torch.tensor(zero)))
    if len(reader) or not stream.is_empty():
        raise ArtifactError("bytes are left over behind its last tensor; save it again.")
    for (layer, name), tensor in filled.items():
        _assign(layer, name, tensor)


def _assign(layer: nn.Module, name: str, tensor: _Stored) -> None:
    if name in layer._buffers:
        layer._buffers[name] = tensor.value
    else:
        layer._parameters[name] = tensor.parameter
    for parametrization in tensor.stack:
        shared = {id(p): p for p in parametrization.parameters()}  # tied weights keep one codebook
        weights.parametrize_weight(layer, copy.deepcopy(parametrization, shared), name)


def _read_tensor(reader: Reader, stream: AnsCoder, shape: tuple[int, ...], stored: list[_Stored]) -> _Stored:
    (first,) = reader.take(1)
    number = first >> 2 & 7
    if number >= len(KINDS):
        raise ArtifactError("a tensor in it is coded in no known way; save it again.")
    kind, form = KINDS[number], FORMS[first & 3]
    if kind == "tied":
        return _tied(stored[reader.varint()], shape)
    dtype = DTYPES[reader.take(1)[0]] if first & TYPED else torch.float32
    if kind == "words":
        value, coder = _read_plain(reader, stream, form, shape, dtype), None
    else:
        coder, symbols = _READERS[kind](reader, stream, form, shape)
        value = coder.values(symbols).to(dtype)
    stack = () if coder is None else (coder,)
    if first & MASK_BELOW:
        stack = (weights.Mask(value != 0), *stack)
    if first & MASK_ABOVE:
        stack = (*stack, weights.Mask(value != 0))
    return _Stored(value, stack)


def _tied(earlier: _Stored, shape: tuple[int, ...]) -> _Stored:
    if tuple(earlier.value.shape) != shape:
        raise ArtifactError(f"it ties tensors of shapes {tuple(earlier.value.shape)} and {shape}; save it again.")
    return earlier


def _read_plain(reader: Reader, stream: AnsCoder, form: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool and prod(shape):
        return torch.from_numpy(read_symbols(reader, form, shape, 0, stream) != 0).reshape(shape)
    return _from_words(read_words(reader, form, shape, WORDS[dtype.itemsize], stream), dtype).reshape(shape)


def _from_words(words: np.ndarray, dtype: torch.dtype) -> Tensor:
    native = words.astype(words.dtype.newbyteorder("="), copy=False)
    signed = native.view(f"i{native.itemsize}") if native.itemsize > 1 else native
    return torch.from_numpy(signed).view(dtype)


# --- what symbols stand for ------------------------------------------------------------------------------------------


def _read_table(reader: Reader, kind: int, shape: tuple[int, ...]) -> Tensor:
    """Read scales or levels that are stored in the number type TABLES[kind], or as multiples of a power of two."""
    if kind == STEPS:
        exponent, width = reader.unpack("bB")
        multiples = unpack_bits(reader.take(packed_size(prod(shape), width)), prod(shape), width) - 2 ** (width - 1)
        return torch.from_numpy((multiples * 2.0**exponent).astype(np.float32)).reshape(shape)
    dtype = WORDS[TABLES[kind].itemsize]
    words = np.frombuffer(reader.take(prod(shape) * dtype.itemsize), dtype).copy()
    return _from_words(words, TABLES[kind]).float().reshape(shape)


def _symbols(
    reader: Reader,
    stream: AnsCoder,
    form: str,
    shape: tuple[int, ...],
    zero: np.ndarray | int,
    span: tuple[int, int],
) -> Tensor:
    """Read symbols from span[0] to span[1], int32, of this shape."""
    symbols = torch.from_numpy(read_symbols(reader, form, shape, zero, stream).astype(np.int32)).reshape(shape)
    if symbols.numel() and not span[0] <= int(symbols.min()) <= int(symbols.max()) <= span[1]:
        raise ArtifactError(f"a symbol in it lies outside of {span[0]} to {span[1]}; save it again.")
    return symbols


def _read_quantized(reader: Reader, stream: AnsCoder, form: str, shape: tuple[int, ...]):
    bits, table, asymmetric, zero_type, axis = unpack_digits(reader, QUANTIZER)
    group_size = reader.varint() if axis == GROUPS else None
    scale_shape = () if axis == NO_AXIS else shape[:1]
    if axis == GROUPS:
        scale_shape = (shape[0], -(-prod(shape[1:]) // max(group_size, 1)))
    scale, zero = _read_table(reader, table, scale_shape), np.zeros(scale_shape, np.int32)
    if zero_type:
        size = prod(scale_shape) * np.dtype(ZERO_TYPES[zero_type]).itemsize
        zero = np.frombuffer(reader.take(size), ZERO_TYPES[zero_type]).astype(np.int32).reshape(scale_shape)
    quantizer = weights.FakeQuantize(
        scale, torch.from_numpy(zero), bits + 2, None if axis == NO_AXIS else 0, not asymmetric, group_size
    )
    span = (quantizer.quant_min, quantizer.quant_max)
    return quantizer, _symbols(reader, stream, form, shape, zero_symbols(quantizer, shape), span)


def _read_clustered(reader: Reader, stream: AnsCoder, form: str, shape: tuple[int, ...]):
    table, has_zero, count = unpack_digits(reader, CODEBOOK)
    levels = _read_table(reader, table, (count,))
    negative = int((levels < 0).sum())
    if has_zero:
        levels = torch.cat([levels[:negative], torch.zeros(1), levels[negative:]])
    symbols = _symbols(reader, stream, form, shape, negative if has_zero else -1, (0, len(levels) - 1))
    return weights.Codebook(levels, symbols), symbols


def _read_cast(reader: Reader, stream: AnsCoder, form: str, shape: tuple[int, ...]):
    dtype, table, scaled = unpack_digits(reader, CAST)
    scale = _read_table(reader, table, shape[:1] if scaled == 2 else ()) if scaled else None
    cast = weights.Cast(weights.FLOATS[dtype], scale)
    if cast.bits == 8:
        return cast, _symbols(reader, stream, form, shape, 0, (0, 255))
    words = read_words(reader, form, shape, WORDS[2], stream)
    return cast, torch.from_numpy(words.astype(np.int32)).reshape(shape)


def _read_normal_float(reader: Reader, stream: AnsCoder, form: str, shape: tuple[int, ...]):
    group_size = reader.varint()
    (table,) = reader.take(1)
    groups = -(-prod(shape) // max(group_size, 1))
    coder = weights.NormalFloat(_read_table(reader, table, (groups,)), group_size)
    return coder, _symbols(reader, stream, form, shape, ZERO_OF_NF4, (0, 15))


_READERS = {
    "quantized": _read_quantized,
    "clustered": _read_clustered,
    "cast": _read_cast,
    "normal-float": _read_normal_float,
}
