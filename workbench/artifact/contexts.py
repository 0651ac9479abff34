"""Code a sparse matrix of small whole numbers by its structure: full rows and columns say where the others lie.

    1  how many numbers of each row and of each column are not zero, in magnitudes that adapt as they are read
    2  where they lie: the next place of a row is likelier where many numbers of a column are still to come, and beside
       the one before; what rows and columns have used up is known, and a place without a choice takes no bits
    3  the numbers themselves, by how often each came before

A convolution's rows are its output channels, its columns the inputs of one. One routine writes and reads: `coder` is a
`Recorder` or a `Player`, and what the first is told is what the second tells. Each probability comes from whole numbers
and from single additions, products and quotients, which are the same on every machine. All matrices of a file
share one stream, so that its few bytes of overhead are paid once.

Sources: significance first, then value, each by what came before, as in CABAC and in DeepCABAC (Wiedemann et al.,
2019, arXiv:1907.11900); asymmetric numeral systems (Duda, 2009, arXiv:0902.0271).
"""

from __future__ import annotations

from math import prod
from typing import Any

import constriction
import numpy as np

from workbench.artifact.format import ArtifactError

AnsCoder, Models = constriction.stream.stack.AnsCoder, constriction.stream.model
FEW = 3072  # so many places and values are coded one by one; more of them row by row, which is quicker and fits less
LARGEST = 2**20  # numbers in a matrix: larger ones would take seconds
LEARNING = 6  # how much more a count weighs than the one with which each symbol starts
BESIDE = 1.5  # how much likelier a place becomes beside one that is taken
MOST_CERTAIN = 0.97
TABLE_BITS = 9


class Recorder:
    """Remember symbols and their probabilities in reading order; `push` then writes them, last first."""

    def __init__(self):
        self.steps: list[tuple] = []

    def one(self, symbol: int, weights: np.ndarray) -> int:
        """Code one of the symbols 0 … len(weights) - 1."""
        self.steps.append((int(symbol), Models.Categorical(weights, perfect=False)))
        return symbol

    def many(self, symbols: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
        """Code `count` symbols with the same probabilities."""
        self.steps.append((symbols.astype(np.int32), Models.Categorical(weights, perfect=False)))
        return symbols

    def flags(self, flags: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        """Code (n,) truth values, each with its own probability."""
        self.steps.append((flags.astype(np.int32), Models.Bernoulli(perfect=False), probabilities))
        return flags


class Player:
    """Read from a stream what a `Recorder` was told; the first argument of each call is ignored."""

    def __init__(self, stream: AnsCoder):
        self.stream = stream

    def one(self, _: Any, weights: np.ndarray) -> int:
        return int(self.stream.decode(Models.Categorical(weights, perfect=False)))

    def many(self, _: Any, weights: np.ndarray, count: int) -> np.ndarray:
        return self.stream.decode(Models.Categorical(weights, perfect=False), count)

    def flags(self, _: Any, probabilities: np.ndarray) -> np.ndarray:
        return self.stream.decode(Models.Bernoulli(perfect=False), probabilities).astype(bool)


class Stream:
    """The bytes that all context-coded tensors of a file share; what is pushed last is read first."""

    def __init__(self):
        self.coder = AnsCoder()

    @property
    def size(self) -> int:
        """The bytes so far."""
        return len(bytes(self))

    def pushed(self, steps: list[tuple]) -> Stream:
        """Return a copy with these steps of a `Recorder` on top."""
        longer = Stream()
        longer.coder = self.coder.clone()
        for step in reversed(steps):
            longer.coder.encode_reverse(*step)
        return longer

    def __bytes__(self) -> bytes:
        return self.coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")  # the last word is never zero


def read_stream(data: bytes) -> AnsCoder:
    """Return a coder that reads the bytes of a `Stream`."""
    return AnsCoder(np.frombuffer(data + b"\0" * (-len(data) % 4), "<u4").astype(np.uint32))


def fits(shape: tuple[int, ...]) -> bool:
    """Say whether a tensor of this shape may be coded here."""
    return 0 < prod(shape) <= LARGEST


def code_places(coder, shape: tuple[int, ...], kept: np.ndarray | None = None) -> np.ndarray:
    """Code where a tensor is not zero; `kept`: (numbers,) bool to write, None to read. Returns the same, (numbers,)."""
    if not fits(shape):
        raise ArtifactError(
            f"a tensor of shape {shape} in it is coded by its structure, which is not done; save it again."
        )
    rows = shape[0] if len(shape) > 1 else 1
    columns = prod(shape) // rows
    kept = None if kept is None else kept.reshape(rows, columns)
    of_row = _code_counts(coder, rows, columns, None if kept is None else kept.sum(1))
    of_column = _code_counts(coder, columns, rows, None if kept is None else kept.sum(0))
    total = int(of_row.sum())
    if total != of_column.sum():
        raise ArtifactError("the rows and columns of a tensor in it do not agree; save it again.")
    code_row = _code_few if total <= FEW else _code_row
    places, left = np.zeros((rows, columns), bool), of_column.astype(float)
    for row in np.flatnonzero(of_row):
        open_ = np.flatnonzero(left)
        taken = None if kept is None else kept[row, open_]
        found = open_[code_row(coder, int(of_row[row]), open_, left[open_], taken)]
        places[row, found] = True
        left[found] -= 1
    return places.reshape(-1)


def _code_counts(coder, length: int, most: int, counts: np.ndarray | None) -> np.ndarray:
    """Code whole numbers from 0 to `most`: how many binary digits each has, and those after the first."""
    digits, second = np.ones(most.bit_length() + 1), np.ones((most.bit_length() + 1, 2))
    known, found = [None] * length if counts is None else counts.tolist(), np.zeros(length, np.int64)
    for i, count in enumerate(known):
        size = coder.one(None if count is None else count.bit_length(), digits)
        digits[size] += LEARNING
        found[i] = size if size < 2 else _code_digits(coder, size, second[size], count)
    if found.max() > most:
        raise ArtifactError(f"a row in it holds {found.max()} of {most} numbers; save it again.")
    return found


def _code_digits(coder, size: int, second: np.ndarray, count: int | None) -> int:
    """Code a number of `size` ≥ 2 binary digits: the second one adapts, the others are as likely 0 as 1."""
    bit = coder.one(None if count is None else count >> (size - 2) & 1, second)
    second[bit] += LEARNING
    low = 1 << (size - 2)
    rest = 0 if low == 1 else coder.one(None if count is None else count & (low - 1), np.ones(low))
    return (2 | bit) * low | rest


def _code_few(coder, count: int, columns: np.ndarray, left: np.ndarray, taken: np.ndarray | None) -> list[int]:
    """Code which `count` of the open columns a row takes, from one place to the next; returns their positions."""
    behind = left[::-1].cumsum()[::-1]  # what all columns from here on have still to take
    share, found, start = left / behind, [], 0
    known = [None] * count if taken is None else np.flatnonzero(taken).tolist()
    for place in known:
        open_ = len(left) - start
        if open_ < count:
            raise ArtifactError("a row in it takes more places than there are; save it again.")
        if open_ > count:
            chance = np.minimum(count * share[start:], MOST_CERTAIN)
            if start and columns[start] == columns[start - 1] + 1:
                chance[0] = min(BESIDE * chance[0], MOST_CERTAIN)
            chance[1:] *= np.cumprod(1 - chance[:-1])
            start += coder.one(None if place is None else place - start, chance)
        found.append(start)
        start, count = start + 1, count - 1
    return found


def _code_row(coder, count: int, columns: np.ndarray, left: np.ndarray, taken: np.ndarray | None) -> np.ndarray:
    """Code which of the open columns a row takes, all at once; returns their positions."""
    if count >= len(columns):
        return np.arange(len(columns))
    chances = np.minimum(count * left / left.sum(), MOST_CERTAIN)
    return np.flatnonzero(coder.flags(taken, chances))


def code_values(coder, count: int, values: np.ndarray | None = None) -> np.ndarray:
    """Code `count` whole numbers from -512 to 511, none of them zero; `values`: (count,) to write, None to read."""
    if not count:
        return np.zeros(0, np.int32)
    folded = None if values is None else values - (values > 0)  # 1, 2, 3 … become 0, 1, 2 …: zero leaves no gap
    low = _code_number(coder, None if values is None else int(folded.min()))
    span = _code_number(coder, None if values is None else int(folded.max()) - low) + 1
    if span < 1:
        raise ArtifactError("the largest of a tensor's numbers in it lies below the smallest; save it again.")
    symbols = None if values is None else folded - low
    if span == 1:
        symbols = np.zeros(count, np.int32)
    else:
        symbols = (_code_adapting if count <= FEW else _code_counted)(coder, count, span, symbols)
    folded = symbols + low
    return (folded + (folded >= 0)).astype(np.int32)


def _code_adapting(coder, count: int, span: int, symbols: np.ndarray | None) -> np.ndarray:
    """Code symbols below `span`, each by how often it came before."""
    weights, found = np.ones(span), np.zeros(count, np.int32)
    for i, symbol in enumerate([None] * count if symbols is None else symbols.tolist()):
        found[i] = coder.one(symbol, weights)
        weights[found[i]] += LEARNING
    return found


def _code_counted(coder, count: int, span: int, symbols: np.ndarray | None) -> np.ndarray:
    """Code symbols below `span` with the probabilities of a table that comes first."""
    table = None
    if symbols is not None:
        counts = np.bincount(symbols, minlength=span)
        shift = max(0, int(counts.max()).bit_length() - TABLE_BITS)
        table = np.where(counts > 0, np.maximum(counts >> shift, 1), 0)
    table = _code_counts(coder, span, (1 << TABLE_BITS) - 1, table)
    if not table.any():
        raise ArtifactError("a probability table in it is empty; save it again.")
    return coder.many(symbols, table.astype(float), count)


def _code_number(coder, number: int | None) -> int:
    """Code one number from -512 to 511, small ones in few bits."""
    folded = None if number is None else np.array([2 * number if number >= 0 else -2 * number - 1])
    folded = int(_code_counts(coder, 1, 1023, folded)[0])
    return -(folded + 1) // 2 if folded & 1 else folded // 2
