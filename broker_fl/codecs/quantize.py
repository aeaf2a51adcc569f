"""Values to few bits and back.

All but the floats map a block of values to a float32 scale >= 0 and to symbols; a symbol decodes to its level times the scale of
its block. Decoding is one float32 product for each element, so that it gives the same bits on every machine.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from broker_fl.codecs.entropy import Symbols, decode_symbols, encode_symbols, fixed_length
from broker_fl.codecs.reader import Reader
from broker_fl.errors import DecodeError
from broker_fl.parameters import Vector

BLOCK = 1024
"""Values that share a scale: 1/32 bit a value."""

_ROWS = 64
"""Blocks that are worked on at a time, so that what lies between two steps stays in the cache."""

_LARGEST = np.finfo(np.float32).max
_TINY = np.finfo(np.float32).tiny


class Quantizer(Protocol):
    def encode(self, values: Vector, generator: np.random.Generator | None) -> bytes:
        """Finite float32 values, shape (n,), which stay as they are. Without a generator, rounded to nearest."""

    def decode(self, reader: Reader, count: int) -> Vector:
        """float32, shape (count,), the caller's to change. Raises DecodeError."""

    def length(self, count: int) -> int:
        """The most bytes that `count` values take."""


@dataclass(frozen=True, slots=True)
class Floats:
    """Values as they are, or cut to the upper bits of a float, in `width` bytes each."""

    width: int
    to_bytes: Callable[[Vector], bytes]
    from_bytes: Callable[[NDArray[np.uint8]], Vector]

    def encode(self, values: Vector, _: np.random.Generator | None) -> bytes:
        return self.to_bytes(values)

    def decode(self, reader: Reader, count: int) -> Vector:
        return self.from_bytes(reader.take(self.length(count), "values"))

    def length(self, count: int) -> int:
        return self.width * count


def _bfloat16_bytes(values: Vector) -> bytes:
    bits = values.view(np.uint32)
    nearest_even = bits + 0x7FFF + ((bits >> 16) & 1)
    # A finite value just under the largest would round up to infinity: cut it off instead.
    rounded = np.where((nearest_even & 0x7F800000) == 0x7F800000, bits, nearest_even)
    return (rounded >> 16).astype("<u2").tobytes()


def _float16_bytes(values: Vector) -> bytes:
    return np.clip(values, -65504, 65504).astype("<f2").tobytes()


FLOAT32 = Floats(4, lambda values: values.astype("<f4", copy=False).tobytes(), lambda data: data.view("<f4").astype(np.float32))
FLOAT16 = Floats(2, _float16_bytes, lambda data: data.view("<f2").astype(np.float32))
BFLOAT16 = Floats(2, _bfloat16_bytes, lambda data: (data.view("<u2").astype(np.uint32) << 16).view(np.float32))

Fit = Callable[[Vector, np.random.Generator | None], tuple[Vector, Symbols]]
"""Blocks, shape (rows, values), to their scales, shape (rows,), and symbols, shape (rows, values)."""


@dataclass(frozen=True, slots=True)
class Levels:
    """A scale for every block, and a symbol for every value: u32 scales, then the symbols (see entropy.py)."""

    levels: Vector
    """What the symbols decode to, in scales."""
    fit: Fit
    block: int | None = BLOCK
    """Values that share a scale; None for all of them."""

    def encode(self, values: Vector, generator: np.random.Generator | None) -> bytes:
        scales, symbols = np.empty(self._blocks(values.size), dtype=np.float32), np.empty(values.size, dtype=np.uint8)
        for rows, cells in _in_blocks(values.size, self.block):
            grid = values[cells].reshape(rows.stop - rows.start, -1)
            scales[rows], symbols[cells].reshape(grid.shape)[:] = self.fit(grid, generator)
        return scales.astype("<f4").tobytes() + encode_symbols(symbols, alphabet=self.levels.size)

    def decode(self, reader: Reader, count: int) -> Vector:
        scales = read_scales(reader, self._blocks(count))
        symbols = decode_symbols(reader, count, alphabet=self.levels.size)
        values = np.empty(count, dtype=np.float32)
        # No encoder sends scales that overflow; what somebody else sends becomes infinite, for the receiver to refuse.
        with np.errstate(over="ignore"):
            for rows, cells in _in_blocks(count, self.block):
                grid = values[cells].reshape(rows.stop - rows.start, -1)
                np.multiply(self.levels.take(symbols[cells]).reshape(grid.shape), scales[rows, None], out=grid)
        return values

    def length(self, count: int) -> int:
        return 4 * self._blocks(count) + fixed_length(count, alphabet=self.levels.size)

    def _blocks(self, count: int) -> int:
        return -(-count // self.block) if self.block else min(count, 1)


def read_scales(reader: Reader, count: int) -> Vector:
    """float32, finite, >= 0, shape (count,). Raises DecodeError."""
    scales = reader.take(4 * count, "scales").view("<f4").astype(np.float32)
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise DecodeError("a quantisation scale is negative or not finite")
    return scales


def uniform(levels: int) -> Levels:
    """Levels -L ... L of the block's largest magnitude, rounded up or down by chance: int8 and int4 are L = 127 and 7.

    scale = max |v| / L, code = floor(v / scale + u) with u uniform in [0, 1), so that E[decoded] = v. L = 1 is TernGrad (Wen et
    al. 2017, equation 1: s_t sign(g) b with P(b = 1) = |g| / s_t, s_t = max |g|).
    """
    return Levels(_integers(levels), lambda grid, generator: _rounded(grid, np.abs(grid).max(axis=1), levels, generator))


def qsgd(levels: int) -> Levels:
    """QSGD (Alistarh et al. 2017, section 3.1): Q_s(v_i) = ||v||_2 sign(v_i) xi_i(v, s), with s levels, the Euclidean norm of
    each bucket of 1,024 values, and E[decoded] = v. The paper's Elias coding is the entropy coder here."""

    def fit(grid: Vector, generator: np.random.Generator | None) -> tuple[Vector, Symbols]:
        norms = np.sqrt(np.square(grid, dtype=np.float64).sum(axis=1))
        return _rounded(grid, np.minimum(norms, _LARGEST).astype(np.float32), levels, generator)

    return Levels(_integers(levels), fit)


def _signs(grid: Vector, _: np.random.Generator | None) -> tuple[Vector, Symbols]:
    means = np.abs(grid).mean(axis=1, dtype=np.float64).astype(np.float32)
    return means, (grid >= 0).view(np.uint8)


_PLUS_MINUS = np.array([-1, 1], dtype=np.float32)

SIGN = Levels(_PLUS_MINUS, _signs)
"""EF-signSGD (Karimireddy et al. 2019, algorithm 1): ||v||_1 / d sign(v), for each block. Biased: for error feedback only."""

STC = Levels(_PLUS_MINUS, _signs, block=None)
"""Sparse ternary compression (Sattler et al. 2019, algorithm 1): all chosen values become +mu or -mu, mu their mean magnitude."""


def _integers(levels: int) -> Vector:
    return np.arange(-levels, levels + 1, dtype=np.float32)


def _rounded(grid: Vector, norms: Vector, levels: int, generator: np.random.Generator | None) -> tuple[Vector, Symbols]:
    # Not so large that the highest level, decoded, is infinite.
    highest = np.nextafter(_LARGEST / np.float32(levels), np.float32(0))
    scales = np.minimum(norms / np.float32(levels), highest)
    # A block of denormals has a scale of zero or one that overflows the division: it is sent as zeros.
    scales[scales < _TINY] = 0
    steps = grid / np.where(scales > 0, scales, np.float32(np.inf))[:, None]
    if generator is None:
        np.rint(steps, out=steps)
    else:
        steps += generator.random(grid.shape, dtype=np.float32)
        np.floor(steps, out=steps)
    np.clip(steps, -levels, levels, out=steps)
    steps += levels
    symbols = steps.astype(np.uint8)
    symbols[scales == 0] = levels
    return scales, symbols


def _in_blocks(count: int, block: int | None) -> Iterator[tuple[slice, slice]]:
    """The blocks, and the values in them, of pieces that fit into the cache; the last block may be shorter."""
    if block is None:
        if count:
            yield slice(0, 1), slice(0, count)
        return
    whole = count // block
    for row in range(0, whole, _ROWS):
        end = min(row + _ROWS, whole)
        yield slice(row, end), slice(row * block, end * block)
    if whole * block < count:
        yield slice(whole, whole + 1), slice(whole * block, count)
