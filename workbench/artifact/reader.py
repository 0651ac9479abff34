"""Read bytes with bounds: whatever a file claims, nothing outside it is touched."""

from __future__ import annotations

import struct


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
