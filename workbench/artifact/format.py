"""The file: a magic word, a header, the tensors, a checksum.

    "WBNCH"  version (1 byte)  length of header (varint)  header  tensors  CRC-32 of all before (4 bytes)

The header is JSON, deflated where that is shorter: which layers there are. Shapes follow from them, so a tensor begins
with one byte, how it is coded and its number type, and goes on with its values. The tensors stand in the order of the
layers, sorted by name within a layer. There is no pickle, and a file cannot name anything to run.
"""

from __future__ import annotations

import struct

import numpy as np
import torch

from workbench import weights

MAGIC, VERSION = b"WBNCH", 1
MAX_FILE_BYTES, MAX_HEADER_BYTES, MAX_LAYERS = 2**31, 2**24, 2**16
SYMBOLS, TIED, MASKED = 3, 6, 8  # the first byte of a tensor: its form, + 3 for symbols, + 8 below a mask
DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
WORDS = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}  # by bytes a number

# A quantizer is two bytes (bits - 1 | symmetric << 3 | mask << 4 | zero points << 6, axis + 1), its scales in fp32, and
# its zero points: none if all are 0, else in one byte each, or in four.
ZERO_TYPES = ("", "<i1", "<i4")


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


def check_size(count: int, file_bytes: int) -> None:
    """Refuse more numbers than a file of this length can honestly hold, so that a small one cannot fill the memory."""
    limit = min(2**30, 2**24 + 2**12 * file_bytes)
    if count > limit:
        raise ArtifactError(f"{count:,} numbers in {file_bytes:,} bytes are more than a file may hold ({limit:,}).")


def zero_symbols(quantizer: weights.FakeQuantize, shape: tuple[int, ...]) -> np.ndarray | int:
    """Return the symbol of zero: 0, or one for each of the weight's numbers."""
    if not quantizer.zero_point.any():
        return 0
    zero = quantizer.along_weight(quantizer.zero_point.cpu(), shape)
    return zero.expand(shape).reshape(-1).numpy()
