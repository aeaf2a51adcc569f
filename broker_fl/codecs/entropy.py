"""Symbols to bytes: in a fixed number of bits each, or by their histogram where that is shorter. The only constriction.

The entropy coder is ANS (Duda 2013) with a static model: 64 bits of state, 32-bit words, frequencies that sum to 2^24.
Constriction takes probabilities as floats: a frequency of f goes in as f - 1, which it scales by exactly 1 and raises by 1, so
that what it codes by are our integers, to the bit, on every machine. A test decodes without it.
"""

import math

import constriction
import numpy as np
from numpy.typing import NDArray

from broker_fl.codecs.reader import Reader, varint
from broker_fl.errors import DecodeError

Symbols = NDArray[np.uint8]

FIXED, ANS = 0, 1
PRECISION = 24
WORTH_IT = 0.98
"""Entropy coding has to save 2 % of the bytes to be worth its time."""

_MANTISSA = 16


def encode_symbols(symbols: Symbols, *, alphabet: int) -> bytes:
    """Symbols below `alphabet` (at most 256), shape (n,), to a mode byte and, by its mode, fixed() or ans()."""
    fixed_bytes = fixed_length(symbols.size, alphabet=alphabet)
    if symbols.size:
        counts = np.bincount(symbols, minlength=alphabet)
        used = np.flatnonzero(counts)
        first = min(int(used[0]), alphabet - 2)
        last = max(int(used[-1]), first + 1)
        weights = _weights(counts[first : last + 1])
        frequencies = _frequencies(weights)
        bits = float(np.dot(counts[first : last + 1], PRECISION - np.log2(frequencies)))
        if bits / 8 + weights.size + 12 < WORTH_IT * fixed_bytes:
            return bytes([ANS, first, last]) + weights.tobytes() + _ans(symbols - np.uint8(first), frequencies)
    return bytes([FIXED]) + _packed(symbols, _width(alphabet))


def decode_symbols(reader: Reader, count: int, *, alphabet: int) -> Symbols:
    """Shape (count,), all below `alphabet`. Raises DecodeError."""
    mode = reader.byte("mode of the values")
    if mode == FIXED:
        width = _width(alphabet)
        symbols = _unpacked(reader.take(_packed_bytes(count, width), "values"), width, count)
    elif mode == ANS:
        symbols = _read_ans(reader, count, alphabet=alphabet)
    else:
        raise DecodeError(f"the values are in an unknown mode, {mode}")
    if alphabet < 1 << _width(alphabet) and count and symbols.max() >= alphabet:
        raise DecodeError(f"a value of {symbols.max()} is not below {alphabet}")
    return symbols


def fixed_length(count: int, *, alphabet: int) -> int:
    """Bytes of `count` symbols with their mode byte, at most: the entropy coder is used where it takes fewer."""
    return 1 + _packed_bytes(count, _width(alphabet))


def _width(alphabet: int) -> int:
    """Bits of a symbol, rounded up to what divides a byte."""
    return next(width for width in (1, 2, 4, 8) if alphabet <= 1 << width)


def _packed_bytes(count: int, width: int) -> int:
    return (count * width + 7) // 8


def _packed(symbols: Symbols, width: int) -> bytes:
    """The first symbol in the highest bits of its byte; zeros fill up."""
    if width == 1:
        return np.packbits(symbols).tobytes()
    in_a_byte = 8 // width
    if in_a_byte == 1:
        return symbols.tobytes()
    padded = np.zeros(-(-symbols.size // in_a_byte) * in_a_byte, dtype=np.uint8)
    padded[: symbols.size] = symbols
    packed = padded[::in_a_byte].copy()
    for at in range(1, in_a_byte):
        packed <<= width
        packed |= padded[at::in_a_byte]
    return packed.tobytes()


def _unpacked(packed: NDArray[np.uint8], width: int, count: int) -> Symbols:
    if width == 1:
        return np.unpackbits(packed, count=count)
    in_a_byte = 8 // width
    if in_a_byte == 1:
        return packed
    symbols = np.empty((packed.size, in_a_byte), dtype=np.uint8)
    for at in range(in_a_byte):
        np.bitwise_and(packed >> (8 - width * (at + 1)), (1 << width) - 1, out=symbols[:, at])
    return symbols.reshape(-1)[:count]


def _weights(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Each count in a byte, four bits of exponent and four of mantissa; 0 for symbols that do not occur."""
    # The largest becomes 31 x 2^15; a hundredth of a millionth of that still counts as one that occurs.
    scaled = counts * ((_MANTISSA * 2 - 1) * 2.0**15 / counts.max())
    exponents = np.clip(np.floor(np.log2(np.maximum(scaled, 1) / _MANTISSA)), 0, 15)
    mantissas = np.clip(np.rint(scaled / 2**exponents), _MANTISSA, 2 * _MANTISSA - 1) - _MANTISSA
    codes = (exponents * _MANTISSA + mantissas).astype(np.uint8)
    return np.where(counts > 0, np.maximum(codes, 1), 0).astype(np.uint8)


def _frequencies(weights: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Integers >= 1 that sum to 2^24: 1 + floor(w (2^24 - n) / sum w), and what is missing to the first of the largest."""
    numbers = weights.astype(np.int64)
    numbers = np.where(weights > 0, (_MANTISSA + numbers % _MANTISSA) << numbers // _MANTISSA, 0)
    total = int(numbers.sum())
    if not total:
        raise DecodeError("a histogram of nothing but zeros")
    frequencies = 1 + numbers * ((1 << PRECISION) - weights.size) // total
    frequencies[np.argmax(frequencies)] += (1 << PRECISION) - int(frequencies.sum())
    return frequencies


def _model(frequencies: NDArray[np.int64]) -> constriction.stream.model.Categorical:
    return constriction.stream.model.Categorical((frequencies - 1).astype(np.float64), perfect=False)


def _ans(symbols: Symbols, frequencies: NDArray[np.int64]) -> bytes:
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32), _model(frequencies))
    words = coder.get_compressed().astype("<u4")
    encoded: bytes = words.tobytes()
    return varint(words.size) + encoded


def _read_ans(reader: Reader, count: int, *, alphabet: int) -> Symbols:
    first, last = reader.byte("first symbol"), reader.byte("last symbol")
    if not first < last < alphabet:
        raise DecodeError(f"a histogram from {first} to {last} of {alphabet} symbols")
    frequencies = _frequencies(reader.take(last - first + 1, "histogram"))
    most = math.ceil(count * PRECISION / 32) + 2
    words = reader.take(4 * reader.varint("words of the values", most=most), "values").view("<u4").astype(np.uint32)
    if words.size and not words[-1]:
        raise DecodeError("the last word of the values is zero")
    try:
        coder = constriction.stream.stack.AnsCoder(words)
        symbols: Symbols = coder.decode(_model(frequencies), count).astype(np.uint8)
    except (ValueError, AssertionError) as exc:
        # None is known that the checks above let through.
        raise DecodeError(f"the values cannot be decoded: {exc}") from exc
    if not coder.is_empty():
        raise DecodeError(f"the values do not end after {count} symbols")
    symbols += np.uint8(first)
    return symbols
