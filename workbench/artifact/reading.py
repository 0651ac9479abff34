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
from workbench.artifact.coding import FORMS, read_symbols, read_words
from workbench.artifact.format import (
    DTYPES,
    MAGIC,
    MASKED,
    MAX_FILE_BYTES,
    MAX_HEADER_BYTES,
    MAX_LAYERS,
    SYMBOLS,
    TIED,
    VERSION,
    WORDS,
    ZERO_TYPES,
    ArtifactError,
    Reader,
    check_size,
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
    if len(content.get("layers", {})) > MAX_LAYERS:
        raise ArtifactError(f"it has {len(content['layers']):,} layers, more than {MAX_LAYERS:,}; save it again.")
    return content


def _skeleton(content: dict[str, Any], table: arch.Table, start: nn.Module | None, file_bytes: int) -> nn.Module:
    """Return a model with the right layers and any values: from the given start, by its name, or from nothing."""
    check_size(arch.count_numbers(table), file_bytes)
    architecture = content.get("model")
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
    layers = [model.get_submodule(name) for name, spec in table.items() if spec[0] != "same"]
    for index, layer in enumerate(layers):
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
        words = read_words(reader, form, count, WORDS[dtype.itemsize])
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
    bits, mask_at, zero_type = (first & 7) + 1, first >> 4 & 3, ZERO_TYPES[first >> 6]
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
    symbols = torch.from_numpy(read_symbols(reader, form, prod(shape), zero_symbols(quantizer, shape)).astype(np.int32))
    if symbols.numel() and not quantizer.quant_min <= int(symbols.min()) <= int(symbols.max()) <= quantizer.quant_max:
        raise ArtifactError(f"a {bits}-bit symbol in it is out of range; save it again.")
    value = quantizer.values(symbols.reshape(shape))
    mask = weights.Mask(value != 0)
    return _Stored(value, ((quantizer,), (mask, quantizer), (quantizer, mask))[mask_at])
