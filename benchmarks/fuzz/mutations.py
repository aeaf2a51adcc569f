"""Bytes become other bytes: near enough to valid ones to get past the first checks. All chance comes from `random`."""

import re
import struct
from collections.abc import Callable, Sequence, Sized
from copy import copy
from random import Random

import msgpack

from benchmarks.fuzz.samples import CODECS, MIXED

INTERESTING = (0, 1, 7, 8, 31, 32, 63, 64, 127, 128, 255, 1023, 1024, 1025, MIXED.size, 2**16 - 1, 2**31, 2**32 - 1, 2**64 - 1)
FLOATS = (0.0, -0.0, -1.0, 1e-45, 3.4e38, float("nan"), float("inf"), float("-inf"))
ODD: tuple[object, ...] = (None, True, -1, 2**53, *INTERESTING, *FLOATS, "", "\n", "x" * 70, b"", b"x", [], [[]], {}, {"a": 1})
ARGUMENTS = ("", " 1", "0", "1", "2", "7", "-1", "0.01", "1e-99", "1e999", "nan", "inf", "-0.0", "9" * 20, "1_0", "0x1", "\u0661")
"""Of a codec's stage, in its name."""


def mutated(body: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Now and then spliced with one of the others, or nothing of it left."""
    kind = random.random()
    if kind < 0.02:
        return random.randbytes(int(2 ** random.uniform(0, 10)))
    data = bytearray(body)
    if kind < 0.1:
        other = random.choice(others)
        data[_place(data, random) :] = other[_place(other, random) :]
    for _ in range(random.randint(1, 3)):
        random.choice(_MUTATIONS)(data, random)
    return bytes(data)


def mutated_fields(body: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Of msgpack: mostly a part of what it says is another, so that the rest stays well formed."""
    if random.random() < 0.7:
        try:
            return bytes(msgpack.packb(_mutated_field(msgpack.unpackb(body, strict_map_key=False), random)))
        except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException):
            pass  # Broken already, or out of msgpack's range: its bytes are changed instead.
    return mutated(body, others, random)


def mutated_named(body: bytes, others: Sequence[bytes], random: Random) -> bytes:
    """Of a codec's name, a zero byte and a payload: half of the time, the name alone is another."""
    if random.random() < 0.5:
        name, _, payload = body.partition(b"\x00")
        return _mutated_name(name.decode("utf-8", "replace"), random).encode() + b"\x00" + payload
    return mutated(body, others, random)


def _mutated_name(name: str, random: Random) -> str:
    if random.random() < 0.5:
        return random.choice(CODECS)
    return re.sub(r"(?<=:)[^+:]*", lambda _: random.choice(ARGUMENTS), name if ":" in name else f"{name}:")


def _mutated_field(value: object, random: Random) -> object:
    """`value` with one part of it replaced or gone, at any depth."""
    match value:
        case dict() | list() if value and random.random() < 0.9:
            keys: Sequence[object] = list(value) if isinstance(value, dict) else range(len(value))
            key, copied = random.choice(keys), copy(value)
            if random.random() < 0.1:
                del copied[key]
            else:
                copied[key] = _mutated_field(value[key], random)
            return copied
        case bytes() if random.random() < 0.9:
            return mutated(value, [value], random)
        case str() if random.random() < 0.5:
            return _mutated_name(value, random)
        case int() if random.random() < 0.5:
            return value + random.choice((-2, -1, 1, 2))
    return random.choice(ODD)


def _place(data: Sized, random: Random) -> int:
    """Headers are at the beginning, so that half of all changes are near it."""
    reach = len(data) if random.random() < 0.5 else min(len(data), 48)
    return random.randrange(max(reach, 1))


def _flip(data: bytearray, random: Random) -> None:
    for _ in range(random.randint(1, 8) if data else 0):
        data[_place(data, random)] ^= 1 << random.randrange(8)


def _truncate(data: bytearray, random: Random) -> None:
    del data[_place(data, random) if random.random() < 0.5 else max(0, len(data) - random.randint(1, 8)) :]


def _extend(data: bytearray, random: Random) -> None:
    count = int(2 ** random.uniform(0, 12))
    data += random.choice((bytes(count), b"\xff" * count, random.randbytes(count)))


def _number(data: bytearray, random: Random) -> None:
    """A length, count or scale becomes another."""
    at, width = _place(data, random), random.choice((1, 2, 4, 8))
    if random.random() < 0.2:
        packed = struct.pack("<d" if random.random() < 0.2 else "<f", random.choice(FLOATS))
    else:
        packed = (random.choice(INTERESTING) % 256**width).to_bytes(width, random.choice(("little", "big")))
    data[at : at + len(packed)] = packed


def _step(data: bytearray, random: Random) -> None:
    """A count that is a little off."""
    if data:
        at = _place(data, random)
        data[at] = (data[at] + random.choice((-2, -1, 1, 2))) % 256


def _span(data: bytearray, random: Random) -> None:
    """A few bytes go, come twice, or become others."""
    start = _place(data, random)
    span = bytes(data[start : start + int(2 ** random.uniform(0, 10))])
    count = len(span)
    data[start : start + count] = random.choice((b"", span * 2, random.randbytes(count), bytes(count), b"\xff" * count))


_MUTATIONS: tuple[Callable[[bytearray, Random], None], ...] = (_flip, _truncate, _extend, _number, _number, _step, _span)
