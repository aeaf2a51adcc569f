"""Rice coding of ascending indices in split bit streams, without a loop over the indices.

The gaps between neighbours (minus one) come in blocks of 512, each with its own parameter r, since real top-k is uneven over a
model. A gap is cut at r: the low r bits go to planes of one bit per gap, the rest q is written in unary (q zeros and a one) in
the high stream. All bits are packed most significant first. Where r is 0 the high stream is a bitmap, which is what dense choices
get; where all or none are chosen, nothing is written but their number. Source: Rice 1979; Golomb 1966 for geometric gaps. On
uniform choices the cost is 0.6 to 1.9 % over log2 C(n, k) / k.
"""

import math

import numpy as np
from numpy.typing import NDArray

from broker_fl.codecs.layout import Indices
from broker_fl.codecs.reader import Reader, varint
from broker_fl.errors import DecodeError

GAPS = 512
"""Gaps that share a parameter: 1/64 bit an index."""

MAX_RICE_BITS = 24
"""A gap of 2^31 then takes 128 bits of the high stream; and no sum of hostile gaps can overflow 64 bits."""


def encode_indices(indices: Indices, *, size: int | None = None) -> bytes:
    """Strictly ascending indices from 0 on, below `size`, shape (k,), to: varint k; unless k is 0 or `size`, a byte r for each
    block of gaps, varint bytes of the high stream, planes, high stream."""
    if indices.size in (0, size):
        return varint(indices.size)
    gaps = np.diff(indices, prepend=-1) - 1
    bits = _best_bits(gaps)
    grid = np.zeros((bits.size, GAPS), dtype=np.int64)
    grid.reshape(-1)[: gaps.size] = gaps
    ends = np.cumsum((grid >> bits[:, None].astype(np.int64)).reshape(-1)[: gaps.size] + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, dtype=np.bool_)
    unary[ends] = True
    high_stream = np.packbits(unary).tobytes()
    planes = []
    for bit in range(int(bits.max())):
        rows, count = _in_plane(bits, bit, gaps.size)
        planes.append(np.packbits(((grid[rows] >> bit).astype(np.uint8) & 1).reshape(-1)[:count]).tobytes())
    return b"".join([varint(gaps.size), bits.tobytes(), varint(len(high_stream)), *planes, high_stream])


def decode_indices(reader: Reader, *, size: int) -> Indices:
    """Ascending indices below `size`, shape (k,). Raises DecodeError before memory is taken for nonsense."""
    count = reader.varint("number of indices", most=size)
    if not count:
        return np.empty(0, dtype=np.int64)
    if count == size:
        return np.arange(size)
    bits = reader.take(-(-count // GAPS), "Rice parameters")
    if bits.max() > MAX_RICE_BITS:
        raise DecodeError(f"a Rice parameter of {bits.max()} is over {MAX_RICE_BITS}")
    high_bytes = reader.varint("bytes of the high stream", most=(count + (size >> int(bits.min())) + 7) // 8)
    octets = _low_bits(reader, bits, count)
    ends = np.flatnonzero(np.unpackbits(reader.take(high_bytes, "high stream")).view(np.bool_))
    if ends.size != count:
        raise DecodeError(f"the high stream ends {ends.size} gaps, not {count}")
    gaps = np.empty(bits.size * GAPS, dtype=np.int64)
    gaps[0] = ends[0]
    np.subtract(ends[1:], ends[:-1], out=gaps[1:count])
    gaps[1:count] -= 1
    gaps[count:] = 0
    np.left_shift(gaps.reshape(-1, GAPS), bits[:, None].astype(np.int64), out=gaps.reshape(-1, GAPS))
    for first, octet in octets:
        gaps += octet if not first else octet.astype(np.int64) << first
    # An index is the sum of the gaps up to it, and one for each index before it.
    gaps[1:] += 1
    indices = np.cumsum(gaps[:count])
    if indices[-1] >= size:
        raise DecodeError(f"index {indices[-1]} is beyond {size} elements")
    return indices


def entropy_bits_per_index(*, size: int, count: int) -> float:
    """log2 C(size, count) / count: what no index coding can beat on average."""
    ln_choose = math.lgamma(size + 1) - math.lgamma(count + 1) - math.lgamma(size - count + 1)
    return ln_choose / math.log(2) / count


def _best_bits(gaps: Indices) -> NDArray[np.uint8]:
    """The cheapest r of each block, shape (blocks,)."""
    starts = np.arange(0, gaps.size, GAPS)
    lengths = np.diff(starts, append=gaps.size)
    means = np.add.reduceat(gaps, starts) / lengths
    guess = np.log2(np.maximum(means * math.log(2), 1)).astype(np.int64)
    best, least = np.zeros_like(guess), np.full(guess.shape, np.iinfo(np.int64).max)
    for offset in (-1, 0, 1):
        bits = np.clip(guess + offset, 0, MAX_RICE_BITS)
        cost = bits * lengths + np.add.reduceat(gaps >> np.repeat(bits, lengths), starts)
        best = np.where(cost < least, bits, best)
        least = np.minimum(cost, least)
    return best.astype(np.uint8)


def _low_bits(reader: Reader, bits: NDArray[np.uint8], count: int) -> list[tuple[int, NDArray[np.uint8]]]:
    """Eight planes at a time as bytes, shape (blocks x GAPS,), and by how many bits they are to be shifted."""
    octets = []
    for first in range(0, int(bits.max()), 8):
        octet = np.zeros((bits.size, GAPS), dtype=np.uint8)
        for bit in range(first, min(first + 8, int(bits.max()))):
            rows, within = _in_plane(bits, bit, count)
            packed = reader.take((within + 7) // 8, f"plane {bit} of the indices")
            # Beyond `count` there are zeros or what pads the plane: nobody looks there.
            plane = np.unpackbits(packed, count=-(-within // GAPS) * GAPS)
            plane *= np.uint8(1 << bit - first)  # NumPy shifts bytes ten times as slowly.
            octet[rows] |= plane.reshape(-1, GAPS)
        octets.append((first, octet.reshape(-1)))
    return octets


def _in_plane(bits: NDArray[np.uint8], bit: int, count: int) -> tuple[slice | NDArray[np.int64], int]:
    """The blocks that have this low bit, and how many of `count` gaps are in them: all blocks but the last are full."""
    if bit < bits.min():
        return slice(None), count
    rows = np.flatnonzero(bits > bit)
    beyond = bits.size * GAPS - count if rows[-1] == bits.size - 1 else 0
    return rows, rows.size * GAPS - beyond
