"""A payload, read from its start to its end. Nothing is read, or made room for, that is not there."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from broker_fl.errors import DecodeError

_LONGEST_VARINT = 5


@dataclass(slots=True)
class Reader:
    payload: bytes
    at: int = 0

    def take(self, count: int, what: str) -> NDArray[np.uint8]:
        """The next `count` bytes, a view. Raises DecodeError where there are fewer."""
        start, end = self.at, self.at + count
        if end > len(self.payload):
            raise DecodeError(f"{what}: {count} bytes expected, {len(self.payload) - start} are left of the payload")
        self.at = end
        return np.frombuffer(self.payload, np.uint8, count=count, offset=start)

    def byte(self, what: str) -> int:
        return int(self.take(1, what)[0])

    def varint(self, what: str, *, most: int) -> int:
        """Seven bits a byte, the lowest first, the top bit set on all but the last (LEB128), in as few bytes as there can be."""
        value = 0
        for position in range(_LONGEST_VARINT):
            byte = self.byte(what)
            value |= (byte & 0x7F) << 7 * position
            if byte < 0x80:
                if position and not byte:
                    raise DecodeError(f"{what}: a number in more bytes than it needs")
                if value > most:
                    raise DecodeError(f"{what}: at most {most} expected, not {value}")
                return value
        raise DecodeError(f"{what}: a number of more than {_LONGEST_VARINT} bytes")

    def finish(self) -> None:
        if self.at != len(self.payload):
            raise DecodeError(f"the payload should have {self.at} bytes, not {len(self.payload)}")


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
