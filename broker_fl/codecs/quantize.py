"""Values to few bits and back.

The integer quantizers are uniform and stochastic (QSGD, Alistarh et al. 2017, without its norm coding): per block of 1,024 values
a float32 scale = max |v| / L, codes floor(v / scale + u) with u uniform in [0, 1), so that E[decoded] = v.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_fl.errors import DecodeError
from broker_fl.parameters import Vector

BLOCK = 1024
"""Values that share a scale: 1/32 bit a value."""


@dataclass(frozen=True, slots=True)
class Quantizer:
    """`encode(values, generator)` to exactly `length(count)` bytes; `decode(bytes, count)` to float32, shape (count,)."""

    encode: Callable[[Vector, np.random.Generator], bytes]
    decode: Callable[[bytes, int], Vector]
    length: Callable[[int], int]


def _encode_float32(values: Vector, _: np.random.Generator) -> bytes:
    return values.astype("<f4", copy=False).tobytes()


def _decode_float32(data: bytes, count: int) -> Vector:
    return np.frombuffer(data, "<f4", count=count).astype(np.float32)


def _encode_bfloat16(values: Vector, _: np.random.Generator) -> bytes:
    bits = values.view(np.uint32)
    nearest_even = bits + 0x7FFF + ((bits >> 16) & 1)
    # A finite value just under the largest would round up to infinity: cut it off instead.
    rounded = np.where((nearest_even & 0x7F800000) == 0x7F800000, bits, nearest_even)
    return (rounded >> 16).astype("<u2").tobytes()


def _decode_bfloat16(data: bytes, count: int) -> Vector:
    return (np.frombuffer(data, "<u2", count=count).astype(np.uint32) << 16).view(np.float32)


def _levels(values: Vector, generator: np.random.Generator, levels: int) -> tuple[Vector, NDArray[np.int8]]:
    blocks = -(-values.size // BLOCK)
    padded = np.zeros(blocks * BLOCK, dtype=np.float32)
    padded[: values.size] = values
    grid = padded.reshape(blocks, BLOCK)
    # Not so large that the highest level, decoded, is infinite.
    highest = np.nextafter(np.finfo(np.float32).max / np.float32(levels), np.float32(0))
    scales = np.minimum(np.abs(grid).max(axis=1) / np.float32(levels), highest)
    # A block of denormals has a scale of zero or one that overflows the division: it is sent as zeros.
    usable = scales >= np.finfo(np.float32).tiny
    scales = np.where(usable, scales, np.float32(0))
    steps = grid / np.where(usable, scales, np.float32(1))[:, None]
    steps += generator.random(grid.shape, dtype=np.float32)
    codes = np.clip(np.floor(steps), -levels, levels).astype(np.int8)
    return scales, codes.reshape(-1)[: values.size] * np.repeat(usable, BLOCK)[: values.size]


def _scale_bytes(count: int) -> int:
    return 4 * (-(-count // BLOCK))


def _scales(data: bytes, count: int) -> Vector:
    scales = np.frombuffer(data, "<f4", count=-(-count // BLOCK)).astype(np.float32)
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise DecodeError("a quantisation scale is negative or not finite")
    return scales


def _scaled(steps: Vector, scales: Vector) -> Vector:
    whole = steps.size // BLOCK * BLOCK
    # No encoder sends scales that overflow; what somebody else sends becomes infinite, for the receiver to refuse.
    with np.errstate(over="ignore"):
        if whole:
            steps[:whole].reshape(-1, BLOCK)[:] *= scales[: whole // BLOCK, None]
        if whole < steps.size:
            steps[whole:] *= scales[-1]
    return steps


def _encode_int8(values: Vector, generator: np.random.Generator) -> bytes:
    scales, codes = _levels(values, generator, 127)
    return scales.astype("<f4").tobytes() + codes.tobytes()


def _decode_int8(data: bytes, count: int) -> Vector:
    codes = np.frombuffer(data, np.int8, count=count, offset=_scale_bytes(count))
    return _scaled(codes.astype(np.float32), _scales(data, count))


def _encode_int4(values: Vector, generator: np.random.Generator) -> bytes:
    scales, codes = _levels(values, generator, 7)
    nibbles = np.full(codes.size + codes.size % 2, 8, dtype=np.uint8)
    nibbles[: codes.size] = (codes + 8).astype(np.uint8)
    return scales.astype("<f4").tobytes() + ((nibbles[0::2] << 4) | nibbles[1::2]).tobytes()


_INT4_PAIRS = np.array([[(byte >> 4) - 8, (byte & 15) - 8] for byte in range(256)], dtype=np.float32)


def _decode_int4(data: bytes, count: int) -> Vector:
    packed = np.frombuffer(data, np.uint8, count=(count + 1) // 2, offset=_scale_bytes(count))
    steps = np.take(_INT4_PAIRS, packed, axis=0).reshape(-1)[:count]
    return _scaled(steps, _scales(data, count))


QUANTIZERS: dict[str, Quantizer] = {
    "float32": Quantizer(_encode_float32, _decode_float32, lambda count: 4 * count),
    "bfloat16": Quantizer(_encode_bfloat16, _decode_bfloat16, lambda count: 2 * count),
    "int8": Quantizer(_encode_int8, _decode_int8, lambda count: _scale_bytes(count) + count),
    "int4": Quantizer(_encode_int4, _decode_int4, lambda count: _scale_bytes(count) + (count + 1) // 2),
}

FOR_SMALL_TENSORS: dict[str, str] = {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8", "int4": "int8"}
"""Biases and normalisation statistics are few and matter: they never get fewer than 8 bits."""
