"""Turn tensors into the fewest bytes: fixed width, bitmask and values, entropy or context coding.

A tensor is either *words* (the bits of its numbers, as they are) or *symbols* (small integers of a quantized weight).
Both are written in the smallest of four forms:

    fixed     every entry with the same number of bits
    bitmask   one bit an entry, "is it zero?", then the others with a fixed number of bits
    entropy   frequent symbols take fewer bits: asymmetric numeral systems (Duda, 2009, arXiv:0902.0271)
    context   full and empty rows and columns say where the others are likely: see `contexts`

Of words, only the mask is coded so: the bits of floating-point weights hardly compress.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod

import constriction
import numpy as np

from workbench.artifact import contexts
from workbench.artifact.format import ArtifactError, Reader, varint

AnsCoder, Categorical = constriction.stream.stack.AnsCoder, constriction.stream.model.Categorical
FORMS = ("fixed", "bitmask", "entropy", "context")
MOST_FULL = 0.6  # part of a tensor that is not zero
MAX_ALPHABET = 512  # an 8-bit symbol less its zero point lies between -255 and 255


@dataclass(frozen=True)
class Code:
    """One tensor as bytes, parted by what they are for; the file holds table, index, values in this order.

    `streamed`: bytes for (values, index) that went into the stream that all tensors share.
    """

    form: str
    values: bytes = b""
    table: bytes = b""
    index: bytes = b""
    streamed: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.values) + len(self.index) + len(self.table) + sum(self.streamed)

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


@dataclass(frozen=True)
class Trial:
    """One tensor coded by its structure: the stream that it lengthens, and its bytes there for (values, index)."""

    stream: contexts.Stream
    streamed: tuple[int, int]

    @classmethod
    def of(cls, shape: tuple[int, ...], levels: np.ndarray, stream: contexts.Stream, with_values: bool) -> Trial:
        """Code where `levels` (n,) are not zero, and what they are there."""
        kept = levels != 0
        places, values = contexts.Recorder(), contexts.Recorder()
        contexts.code_places(places, shape, kept)
        if with_values:
            contexts.code_values(values, int(np.count_nonzero(kept)), levels[kept])
        after_values = stream.pushed(values.steps)
        after_all = after_values.pushed(places.steps)
        return cls(after_all, (after_values.size - stream.size, after_all.size - after_values.size))


def code_words(
    words: np.ndarray, shape: tuple[int, ...], stream: contexts.Stream
) -> tuple[Code, dict[str, int], contexts.Stream]:
    """Write integers (n,) in the smallest form; return it, the bytes of every form that was tried, and the stream."""
    kept = words != 0
    sizes, trial = {"fixed": words.nbytes}, None
    if not kept.all():
        values_bytes = int(np.count_nonzero(kept)) * words.itemsize
        mask = kept.astype(np.int32)
        table, index = entropy_encode(mask, *histogram(mask))
        sizes |= {"bitmask": packed_size(len(kept), 1) + values_bytes, "entropy": len(table + index) + values_bytes}
        if contexts.fits(shape):
            trial = Trial.of(shape, mask, stream, with_values=False)
            sizes["context"] = sum(trial.streamed) + values_bytes
    form = min(sizes, key=sizes.get)
    if form == "fixed":
        return Code(form, words.tobytes()), sizes, stream
    values = words[kept].tobytes()
    if form == "bitmask":
        return Code(form, values, index=np.packbits(kept).tobytes()), sizes, stream
    if form == "entropy":
        return Code(form, values, table, index), sizes, stream
    return Code(form, values, streamed=trial.streamed), sizes, trial.stream


def read_words(
    reader: Reader, form: str, shape: tuple[int, ...], dtype: np.dtype, stream: contexts.AnsCoder
) -> np.ndarray:
    """Read back the (n,) integers of `dtype` that `code_words` wrote in `form`."""
    count = prod(shape)
    if form == "fixed":
        return np.frombuffer(reader.take(count * dtype.itemsize), dtype).copy()
    if form == "context":
        kept = contexts.code_places(contexts.Player(stream), shape)
    else:
        kept = _read_mask(reader, form, count)
    words = np.zeros(count, dtype)
    words[kept] = np.frombuffer(reader.take(int(kept.sum()) * dtype.itemsize), dtype)
    return words


def _read_mask(reader: Reader, form: str, count: int) -> np.ndarray:
    if form == "bitmask":
        return unpack_bits(reader.take(packed_size(count, 1)), count, 1).astype(bool)
    return entropy_decode(reader, count).astype(bool)


# --- symbols: small integers ----------------------------------------------------------------------------------------


def code_symbols(
    symbols: np.ndarray, zero: np.ndarray | int, shape: tuple[int, ...], stream: contexts.Stream
) -> tuple[Code, dict[str, int], contexts.Stream]:
    """Write small integers (n,) in the smallest form; `zero` is the symbol of zero, one number or one per entry.

    Return the code, the bytes of every form that was tried, and the stream.
    """
    levels = symbols - zero  # centered: channels with different zero points share one distribution
    low, counts = histogram(levels)
    table, coded = entropy_encode(levels, low, counts)
    found = np.flatnonzero(counts) + low
    sizes = {
        "fixed": 3 + packed_size(len(symbols), _span(symbols)[1]),
        "bitmask": 3 + packed_size(len(levels), 1) + _others_size(found, counts[found - low]),
        "entropy": len(table) + len(coded),
    }
    trial = None
    if contexts.fits(shape) and _has_structure(levels):
        trial = Trial.of(shape, levels, stream, with_values=True)
        sizes["context"] = sum(trial.streamed)
    form = min(sizes, key=sizes.get)
    if form == "context":
        return Code(form, streamed=trial.streamed), sizes, trial.stream
    if form == "entropy":
        return Code(form, coded, table), sizes, stream
    if form == "fixed":
        return Code(form, *_pack_symbols(symbols)), sizes, stream
    kept = levels != 0
    return Code(form, *_pack_symbols(_fold(levels[kept])), np.packbits(kept).tobytes()), sizes, stream


def _has_structure(levels: np.ndarray) -> bool:
    """Say whether it is worth the time to look at rows and columns: most are zero, or there are few at all."""
    return len(levels) <= contexts.FEW or np.count_nonzero(levels) < MOST_FULL * len(levels)


def read_symbols(
    reader: Reader, form: str, shape: tuple[int, ...], zero: np.ndarray | int, stream: contexts.AnsCoder
) -> np.ndarray:
    """Read back the (n,) int32 symbols that `code_symbols` wrote in `form`."""
    count = prod(shape)
    if form == "entropy":
        return entropy_decode(reader, count) + zero
    if form == "context":
        return _read_context(stream, shape) + zero
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


def _read_context(stream: contexts.AnsCoder, shape: tuple[int, ...]) -> np.ndarray:
    player, levels = contexts.Player(stream), np.zeros(prod(shape), np.int32)
    kept = contexts.code_places(player, shape)
    levels[kept] = contexts.code_values(player, int(kept.sum()))
    return levels


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
