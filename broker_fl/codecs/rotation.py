"""EDEN: one to four bits a value by a random rotation, without bias (Vargaftik et al. 2022; one bit is DRIVE, 2021).

A block x of d values is rotated by R = H D / sqrt(d), H a Hadamard matrix and D random signs; its coordinates are then about
normal, so that the best centroids for N(0, 1) serve every block: Q. The decoder returns S R^-1 Q with S = ||x||^2 / <R x, Q>,
which makes the estimate unbiased. What is sent for S is s = S / sqrt(d) = ||x||^2 / <H D x, Q>, and the decoder's x is D H (s Q).

That is exact for a uniformly random rotation. H D comes near it for values that are spread over the block, as after a sparsifier;
of a block with a few values beside zeros a part of the error stays the same in every rotation, for error feedback to make up.

H is applied by butterflies of float32 additions in a fixed order, h = 1, 2, 4, ...: (a, b) becomes (a + b, a - b), h apart. There
is no sum whose order a machine could choose, so that decoding gives the same bits everywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_fl.codecs.entropy import Symbols, decode_symbols, encode_symbols, fixed_length
from broker_fl.codecs.quantize import BLOCK, read_scales
from broker_fl.codecs.reader import Reader
from broker_fl.codecs.splitmix import SEED_BYTES, draw_seed, read_seed, seed_bytes, splitmix64
from broker_fl.parameters import Vector

_ROWS = 64
_SIDE = 32

_CENTROIDS = {
    1: (0.7978846,),
    2: (0.4527800, 1.5104176),
    3: (0.2450942, 0.7560052, 1.3439093, 2.1519457),
    4: (0.1283950, 0.3880483, 0.6567591, 0.9423404, 1.2562312, 1.6180464, 2.0690172, 2.7325896),
}
"""Lloyd-Max for N(0, 1), the positive half, by bits (Max 1960, table 1)."""


@dataclass(frozen=True, slots=True)
class Eden:
    """8 bytes of seed, a float32 scale s for each block, the symbols. Zeros fill up the last block to a power of two."""

    centroids: Vector

    def encode(self, values: Vector, generator: np.random.Generator | None) -> bytes:
        """Raises ConfigurationError without a generator."""
        seed = draw_seed(generator, used_for="eden")
        scales, symbols = [], []
        for grid, signs in _blocks(values, seed):
            scale, symbol = self._fit(grid, signs)
            scales.append(scale)
            symbols.append(symbol.reshape(-1))
        return b"".join(
            [
                seed_bytes(seed),
                *(scale.astype("<f4").tobytes() for scale in scales),
                encode_symbols(np.concatenate([np.empty(0, np.uint8), *symbols]), alphabet=self.centroids.size),
            ]
        )

    def decode(self, reader: Reader, count: int) -> Vector:
        seed = read_seed(reader)
        scales = read_scales(reader, -(-count // BLOCK))
        symbols = decode_symbols(reader, _padded(count), alphabet=self.centroids.size)
        values = self.centroids.take(symbols)
        # Scales that overflow make infinities, for the receiver to refuse.
        with np.errstate(over="ignore", invalid="ignore"):
            row = 0
            for grid, signs in _blocks(values, seed):
                np.multiply(grid, scales[row : row + grid.shape[0], None], out=grid)
                hadamard(grid)
                _flip(grid, signs)
                row += grid.shape[0]
        return values[:count]

    def length(self, count: int) -> int:
        return SEED_BYTES + 4 * -(-count // BLOCK) + fixed_length(_padded(count), alphabet=self.centroids.size)

    def _fit(self, grid: Vector, signs: NDArray[np.uint32]) -> tuple[Vector, Symbols]:
        """Blocks, shape (rows, d), to scales, shape (rows,), and symbols, shape (rows, d)."""
        largest = np.abs(grid).max(axis=1)
        usable = largest >= np.finfo(np.float32).tiny
        rotated: Vector = np.divide(grid, np.where(usable, largest, np.float32(np.inf))[:, None])
        norms = np.square(rotated, dtype=np.float64).sum(axis=1)
        _flip(rotated, signs)
        hadamard(rotated)
        unit = np.sqrt(np.where(usable, norms, 1)).astype(np.float32)
        symbols = np.zeros(grid.shape, dtype=np.uint8)
        for edge in (self.centroids[1:] + self.centroids[:-1]) / 2:
            symbols += rotated > (edge * unit)[:, None]
        along = np.multiply(rotated, self.centroids.take(symbols), dtype=np.float64).sum(axis=1)
        scales = largest * np.where(usable, norms / np.where(usable, along, 1), 0)
        # Not so large that a sum of d of them is infinite.
        most = np.finfo(np.float32).max / (2 * grid.shape[1] * self.centroids[-1])
        return np.minimum(scales, most).astype(np.float32), symbols


def eden(bits: int) -> Eden:
    half = np.array(_CENTROIDS[bits], dtype=np.float32)
    return Eden(np.concatenate([-half[::-1], half]))


def hadamard(grid: Vector) -> None:
    """Each row, of a power of two of values, times the Hadamard matrix of natural order, in place. Not normalised."""
    rows, width = grid.shape
    if width != _SIDE * _SIDE:
        _butterflies(grid, first=1)
        return
    # Steps over fewer than 32 neighbours are slow in numpy: they are made where those lie 32 apart.
    aside = np.ascontiguousarray(grid.reshape(rows, _SIDE, _SIDE).transpose(0, 2, 1)).reshape(rows, width)
    _butterflies(aside, first=_SIDE)
    grid[:] = aside.reshape(rows, _SIDE, _SIDE).transpose(0, 2, 1).reshape(rows, width)
    _butterflies(grid, first=_SIDE)


def _butterflies(grid: Vector, *, first: int) -> None:
    rows, width = grid.shape
    source, target = grid, np.empty_like(grid)
    step = first
    while step < width:
        pairs = source.reshape(rows, -1, 2, step)
        into = target.reshape(rows, -1, 2, step)
        np.add(pairs[:, :, 0], pairs[:, :, 1], out=into[:, :, 0])
        np.subtract(pairs[:, :, 0], pairs[:, :, 1], out=into[:, :, 1])
        source, target = target, source
        step *= 2
    if source is not grid:
        grid[:] = source


def _flip(grid: Vector, signs: NDArray[np.uint32]) -> None:
    bits = grid.view(np.uint32)
    bits ^= signs


def _blocks(values: Vector, seed: int) -> Iterator[tuple[Vector, NDArray[np.uint32]]]:
    """Pieces of some blocks each, shape (rows, d), views where they are whole, and their signs as the top bits of words."""
    whole = values.size // BLOCK
    for row in range(0, whole, _ROWS):
        end = min(row + _ROWS, whole)
        grid = values[row * BLOCK : end * BLOCK].reshape(-1, BLOCK)
        yield grid, _sign_bits(seed, start=row * BLOCK, count=grid.size).reshape(grid.shape)
    rest = values[whole * BLOCK :]
    if rest.size:
        padded = _padded(rest.size)
        if rest.size < padded:
            rest = np.concatenate([rest, np.zeros(padded - rest.size, dtype=np.float32)])
        yield rest.reshape(1, -1), _sign_bits(seed, start=whole * BLOCK, count=padded).reshape(1, -1)


def _sign_bits(seed: int, *, start: int, count: int) -> NDArray[np.uint32]:
    """Element e is flipped where bit e mod 64, from the lowest, of splitmix64's output e / 64 is set; `start` begins one."""
    words = splitmix64(seed, start=start // 64, count=-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=count, bitorder="little")
    return np.left_shift(bits, 31, dtype=np.uint32)


def _padded(count: int) -> int:
    """Symbols of `count` values: the last block has a power of two."""
    whole, rest = divmod(count, BLOCK)
    return whole * BLOCK + (1 << (rest - 1).bit_length() if rest else 0)
