"""Turn tensors into the fewest bytes: fixed width, bitmask and values, or entropy coding. Numbers in, bytes out.

A tensor is either *words* (the bits of its numbers, as they are) or *symbols* (small integers of a quantized weight).
Both are written in the smallest of three forms:

    fixed     every entry with the same number of bits
    bitmask   one bit an entry, "is it zero?", then the others with a fixed number of bits
    entropy   frequent symbols take fewer bits: asymmetric numeral systems (Duda, 2009, arXiv:0902.0271)

Of words, only the mask is entropy-coded: the bits of floating-point weights hardly compress.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import constriction
import numpy as np

from workbench.artifact.format import ArtifactError, Reader, varint

AnsCoder, Categorical = constriction.stream.stack.AnsCoder, constriction.stream.model.Categorical
FORMS = ("fixed", "bitmask", "entropy")
MAX_ALPHABET = 512  # an 8-bit symbol less its zero point lies between -255 and 255


@dataclass(frozen=True)
class Code:
    """One tensor as bytes, parted by what they are for; the file holds table, index, values in this order."""

    form: str
    values: bytes = b""
    table: bytes = b""
    index: bytes = b""

    def __len__(self) -> int:
        return len(self.values) + len(self.index) + len(self.table)

    def __bytes__(self) -> bytes:
        return self.table + self.index + self.values


def packed_size(count: int, width: int) -> int:
    """Return the bytes that `count` codes of `width` bits take."""
    return (count * width + 7) // 8


def pack_bits(codes: np.ndarray, width: int) -> bytes:
    """Write codes (n,), whole numbers from 0 to 2**width - 1, with `width` bits each, highest bit first; width ≤ 16."""
    if width == 8:
        return codes.astype(np.uint8).tobytes()
    if not len(codes) or not width:
        return b""
    wide = codes.astype(">u2" if width > 8 else np.uint8)
    bits = np.unpackbits(wide.view(np.uint8).reshape(len(codes), -1), axis=1)
    return np.packbits(bits[:, bits.shape[1] - width :]).tobytes()


def unpack_bits(data: bytes, count: int, width: int) -> np.ndarray:
    """Read back what `pack_bits` wrote: (count,) int32."""
    if width == 8:
        return np.frombuffer(data, np.uint8, count).astype(np.int32)
    codes = np.zeros(count, np.int32)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * width).reshape(count, width)
    for column in bits.T:
        codes = codes << 1 | column
    return codes


# --- entropy coding -------------------------------------------------------------------------------------------------
#
# The table holds one small code a symbol: 0 for "never", else 1 + how far its count lies below the largest count, in
# 1/1, 1/2, 1/4 or 1/8 of a power of two. Finer steps fit better and take more bits, so the writer tries all four.
# The powers are whole numbers: every machine must compute the same table.

_STEPS = (1, 2, 4, 8)
_POWERS = np.array([round(2 ** (40 - k / 8)) for k in range(32 * 8)], np.int64)


def _table_codes(counts: np.ndarray, steps: int) -> np.ndarray:
    below = np.log2(counts.max() / np.maximum(counts, 1))
    return np.where(counts > 0, 1 + np.rint(steps * below), 0).astype(np.int64)


def _probabilities(codes: np.ndarray, steps: int) -> np.ndarray:
    eighths = (codes - 1) * (8 // steps)
    if eighths.max() >= len(_POWERS) or not codes.any():
        raise ArtifactError("a probability table in it makes no sense; save it again.")
    weights = np.where(codes > 0, _POWERS[eighths], 0)
    return weights / weights.sum()


def _bytes_needed(counts: np.ndarray, codes: np.ndarray, steps: int) -> float:
    present = counts > 0
    bits = -(counts[present] * np.log2(_probabilities(codes, steps)[present])).sum()
    return (bits + len(codes) * int(codes.max()).bit_length()) / 8


def _best_table(counts: np.ndarray) -> tuple[np.ndarray, int]:
    tables = [(_table_codes(counts, steps), steps) for steps in _STEPS]
    return min(tables, key=lambda table: _bytes_needed(counts, *table))


def histogram(symbols: np.ndarray) -> tuple[int, np.ndarray]:
    """Return the smallest of the whole numbers (n,), n ≥ 1, and how often it and each number above it occurs."""
    low = int(symbols.min())
    return low, np.bincount(symbols - low if low else symbols)


def entropy_encode(symbols: np.ndarray, low: int, counts: np.ndarray) -> tuple[bytes, bytes]:
    """Write whole numbers (n,) within a span of 512 as (table, stream); `low` and `counts` are their `histogram`.

    The table holds the smallest symbol, how many there are, their quantized probabilities, the stream's length.
    """
    table = struct.pack("<h", low) + varint(len(counts) - 1)
    if len(counts) == 1:
        return table, b""
    codes, steps = _best_table(counts)
    width = int(codes.max()).bit_length()
    coder = AnsCoder()
    coder.encode_reverse((symbols - low).astype(np.int32), Categorical(_probabilities(codes, steps), perfect=False))
    stream = coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")  # the last word is never zero
    table += bytes([_STEPS.index(steps) << 4 | width]) + pack_bits(codes, width) + varint(len(stream))
    return table, stream


def _read_table(reader: Reader) -> tuple[int, np.ndarray | None, int]:
    (low,), size = reader.unpack("h"), reader.varint() + 1
    if size > MAX_ALPHABET:
        raise ArtifactError(f"an alphabet in it has {size} symbols, more than {MAX_ALPHABET}; save it again.")
    if size == 1:
        return low, None, 0
    (layout,) = reader.take(1)
    steps, width = _STEPS[layout >> 4 & 3], layout & 15
    codes = unpack_bits(reader.take(packed_size(size, width)), size, width).astype(np.int64)
    return low, _probabilities(codes, steps), reader.varint()


def _read_stream(reader: Reader, count: int, table: tuple[int, np.ndarray | None, int]) -> np.ndarray:
    low, probabilities, length = table
    if probabilities is None:
        return np.full(count, low, np.int32)
    stream = reader.take(length)
    words = np.frombuffer(stream + b"\0" * (-length % 4), "<u4").astype(np.uint32)
    return AnsCoder(words).decode(Categorical(probabilities, perfect=False), count) + low


def entropy_decode(reader: Reader, count: int) -> np.ndarray:
    """Read back the (count,) whole numbers that `entropy_encode` wrote as table and stream."""
    return _read_stream(reader, count, _read_table(reader))


# --- words: the bits of a tensor's numbers --------------------------------------------------------------------------


def code_words(words: np.ndarray) -> tuple[Code, dict[str, int]]:
    """Write integers (n,) in the smallest form; return it and the bytes of every form that was tried."""
    kept = words != 0
    sizes = {"fixed": words.nbytes}
    if not kept.all():
        values_bytes = np.count_nonzero(kept) * words.itemsize
        mask = kept.astype(np.int32)
        table, stream = entropy_encode(mask, *histogram(mask))
        sizes |= {"bitmask": packed_size(len(kept), 1) + values_bytes, "entropy": len(table + stream) + values_bytes}
    form = min(sizes, key=sizes.get)
    if form == "fixed":
        return Code(form, words.tobytes()), sizes
    values = words[kept].tobytes()
    if form == "bitmask":
        return Code(form, values, index=np.packbits(kept).tobytes()), sizes
    return Code(form, values, table, stream), sizes


def read_words(reader: Reader, form: str, count: int, dtype: np.dtype) -> np.ndarray:
    """Read back the (count,) integers of `dtype` that `code_words` wrote in `form`."""
    if form == "fixed":
        return np.frombuffer(reader.take(count * dtype.itemsize), dtype).copy()
    kept = _read_mask(reader, form, count)
    words = np.zeros(count, dtype)
    words[kept] = np.frombuffer(reader.take(int(kept.sum()) * dtype.itemsize), dtype)
    return words


def _read_mask(reader: Reader, form: str, count: int) -> np.ndarray:
    if form == "bitmask":
        return unpack_bits(reader.take(packed_size(count, 1)), count, 1).astype(bool)
    return entropy_decode(reader, count).astype(bool)


# --- symbols: small integers ----------------------------------------------------------------------------------------


def code_symbols(symbols: np.ndarray, zero: np.ndarray | int) -> tuple[Code, dict[str, int]]:
    """Write small integers (n,) in the smallest form; `zero` is the symbol of zero, one number or one per entry.

    Return the code and the bytes of every form that was tried.
    """
    levels = symbols - zero  # centered: channels with different zero points share one distribution
    low, counts = histogram(levels)
    table, stream = entropy_encode(levels, low, counts)
    found = np.flatnonzero(counts) + low
    sizes = {
        "fixed": 3 + packed_size(len(symbols), _span(symbols)[1]),
        "bitmask": 3 + packed_size(len(levels), 1) + _others_size(found, counts[found - low]),
        "entropy": len(table) + len(stream),
    }
    form = min(sizes, key=sizes.get)
    if form == "entropy":
        return Code(form, stream, table), sizes
    if form == "fixed":
        return Code(form, *_pack_symbols(symbols)), sizes
    kept = levels != 0
    return Code(form, *_pack_symbols(_fold(levels[kept])), np.packbits(kept).tobytes()), sizes


def read_symbols(reader: Reader, form: str, count: int, zero: np.ndarray | int) -> np.ndarray:
    """Read back the (count,) int32 symbols that `code_symbols` wrote in `form`."""
    if form == "entropy":
        return entropy_decode(reader, count) + zero
    low, width = reader.unpack("hB")
    if width > 16:
        raise ArtifactError(f"a symbol in it takes {width} bits, at most 16 are possible; save it again.")
    if form == "fixed":
        return _unpack_symbols(reader, count, low, width)
    kept = _read_mask(reader, form, count)
    levels = np.zeros(count, np.int32)
    folded = _unpack_symbols(reader, int(kept.sum()), low, width)
    levels[kept] = folded + (folded >= 0)
    return levels + zero


def _fold(levels: np.ndarray) -> np.ndarray:
    """Close the gap that zero leaves, so that -1 and 1 take one bit: 1, 2, 3 … become 0, 1, 2 …"""
    return levels - (levels > 0)


def _span(symbols: np.ndarray) -> tuple[int, int]:
    if not len(symbols):
        return 0, 0
    low, high = int(symbols.min()), int(symbols.max())
    return low, (high - low).bit_length()


def _others_size(found: np.ndarray, counts: np.ndarray) -> int:
    """Return the bytes of all symbols but zero: `found` are the different symbols, `counts` how often each occurs."""
    others = found != 0
    return packed_size(int(counts[others].sum()), _span(_fold(found[others]))[1])


def _pack_symbols(symbols: np.ndarray) -> tuple[bytes, bytes]:
    """Return (values, table)."""
    low, width = _span(symbols)
    return pack_bits(symbols - low, width), struct.pack("<hB", low, width)


def _unpack_symbols(reader: Reader, count: int, low: int, width: int) -> np.ndarray:
    return unpack_bits(reader.take(packed_size(count, width)), count, width) + low
