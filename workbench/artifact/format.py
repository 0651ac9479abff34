"""The file: a magic word, a header, the tensors, a checksum.

    "WB"  version (1 byte)  length of header (varint)  header  length of stream (varint)  stream  tensors
    CRC-32 of all before (4 bytes)

The header is JSON, deflated where that is shorter: which layers there are. Shapes follow from them, so a tensor begins
with one byte, how it is coded, and goes on with its tables and values. The tensors stand in the order of the layers,
sorted by name within a layer. What is coded by its structure lies in the one stream; see `contexts`. There is no
pickle, and a file cannot name anything to run.

The first byte of a tensor: its form, + 4 × its kind, + 32 for a mask below what else is stacked on it, + 64 for a
mask above, + 128 if a second byte gives its number type, which else is float32. Then, as a varint, the numbers of its
kind in `QUANTIZER`, `CODEBOOK` or `CAST`; then group size, scales or levels, zero points.
"""

from __future__ import annotations

import struct

import numpy as np
import torch

from workbench import weights

MAGIC, VERSION, FIRST_MAGIC = b"WB", 2, b"WBNCH"
MAX_FILE_BYTES, MAX_HEADER_BYTES, MAX_LAYERS = 2**31, 2**24, 2**16
KINDS = ("words", "quantized", "clustered", "cast", "normal-float", "tied")
MASK_BELOW, MASK_ABOVE, TYPED = 32, 64, 128
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
WORDS = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}  # by bytes a number

TABLES = (torch.float32, torch.float16, torch.bfloat16)  # number types of scales and levels: the shortest that is exact
STEPS = len(TABLES)  # or whole multiples of a power of two: its exponent, their bits (one byte each), and the multiples
ZERO_TYPES = ("", "<i1", "<i4")  # none if all zero points are 0
NO_AXIS, FIRST_AXIS, GROUPS = range(3)  # which numbers share a scale
QUANTIZER = (7, 4, 2, 3, 3)  # bits - 2, table, asymmetric, zero points, scales for
CODEBOOK = (4, 2, 258)  # table, whether zero is a level, other levels
ZERO_OF_NF4 = 7
CAST = (4, 4, 3)  # type, table, scales: none, one, one a channel
DICTIONARY = (  # what headers are made of; rarer words first
    b'"stride":2,"padding":"same","groups":{"bias":false}["own","BatchNorm1d",["Conv1d",["AvgPool2d",["Dropout",'
    b'["GELU"]["Flatten"]["Identity"]["AdaptiveAvgPool2d",1]["MaxPool2d",2]["ReLU"]["BatchNorm2d",{"padding":1}'
    b'["Conv2d",["Linear",["Sequential","0","1","2"],"layers":{"":"classifier","pool","features.0.0":"inputs":[0,'
    b'{"model":{"name":"glyphs-cnn","lenet-300-100"{"model":{"name":"lenet-5"},"base":'
)


class ArtifactError(ValueError):
    """A model cannot be written to a file, or a file cannot be turned back into a model."""


class Reader:
    """Take bytes one after the other from `data`; raises ArtifactError where they run out."""

    def __init__(self, data: bytes | memoryview):
        self.data, self.position = memoryview(data), 0

    def __len__(self) -> int:
        return len(self.data) - self.position

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        if not 0 <= count <= len(self):
            raise ArtifactError(f"it announces {count} bytes where {len(self)} are left; save it again.")
        self.position += count
        return bytes(self.data[self.position - count : self.position])

    def unpack(self, layout: str) -> tuple:
        """Return the next values in a `struct` layout, little endian."""
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))

    def varint(self) -> int:
        """Return the next whole number, written as 7 bits a byte, lowest first."""
        value = 0
        for shift in range(0, 42, 7):
            (byte,) = self.take(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ArtifactError("a number in it is longer than 6 bytes; save it again.")


def varint(value: int) -> bytes:
    """Write a whole number as 7 bits a byte, lowest first, so that small numbers take one byte."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def pack_digits(digits: tuple[int, ...], bases: tuple[int, ...]) -> bytes:
    """Write small numbers, each below its base, as one varint; the first counts least."""
    value = 0
    for digit, base in reversed(list(zip(digits, bases, strict=True))):
        value = value * base + digit
    return varint(value)


def unpack_digits(reader: Reader, bases: tuple[int, ...]) -> list[int]:
    """Read back what `pack_digits` wrote."""
    value, digits = reader.varint(), []
    for base in bases:
        value, digit = divmod(value, base)
        digits.append(digit)
    if value:
        raise ArtifactError("the note of a tensor in it makes no sense; save it again.")
    return digits


def check_size(count: int, file_bytes: int) -> None:
    """Refuse more numbers than a file of this length can honestly hold, so that a small one cannot fill the memory."""
    limit = min(2**30, 2**24 + 2**12 * file_bytes)
    if count > limit:
        raise ArtifactError(f"{count:,} numbers in {file_bytes:,} bytes are more than a file may hold ({limit:,}).")


def zero_symbols(quantizer: weights.FakeQuantize, shape: tuple[int, ...]) -> np.ndarray | int:
    """Return the symbol of zero: 0, or one for each of the weight's numbers."""
    if not quantizer.zero_point.any():
        return 0
    return quantizer.along_weight(quantizer.zero_point.cpu(), shape).expand(shape).reshape(-1).numpy()
