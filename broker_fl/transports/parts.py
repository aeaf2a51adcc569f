"""Messages larger than the broker takes, in parts, each a message of its own with the same id and headers.

A part says its place in the headers: `x-fl-part` (from 0), `x-fl-parts`, `x-fl-size` and `x-fl-sha256` of the whole body.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from broker_fl.errors import DecodeError
from broker_fl.transports.transport import Delivery, Header, Message

PART, PARTS, SIZE, SHA256 = "x-fl-part", "x-fl-parts", "x-fl-size", "x-fl-sha256"


@dataclass(frozen=True, slots=True)
class Part:
    index: int
    parts: int
    size: int
    """Bytes of the whole body."""
    sha256: str


def split(message: Message, *, part_bytes: int, limit_bytes: int) -> Iterator[Message]:
    """The message itself where its body is within the limit, else its parts in order."""
    body = message.body
    if len(body) <= limit_bytes:
        yield message
        return
    sha256 = hashlib.sha256(body).hexdigest()
    parts = -(-len(body) // part_bytes)
    for index in range(parts):
        place: dict[str, Header] = {PART: index, PARTS: parts, SIZE: len(body), SHA256: sha256}
        chunk = body[index * part_bytes : (index + 1) * part_bytes]
        yield replace(message, body=chunk, headers={**message.headers, **place})


def part_of(headers: Mapping[str, Header]) -> Part | None:
    """The place of a part; None for a whole message. Raises DecodeError for a place that cannot be."""
    if PART not in headers:
        return None
    index, parts, size, sha256 = (headers.get(key) for key in (PART, PARTS, SIZE, SHA256))
    if type(index) is not int or type(parts) is not int or type(size) is not int or type(sha256) is not str:
        raise DecodeError(f"a part needs the integers {PART}, {PARTS}, {SIZE} and the text {SHA256} in its headers")
    if re.fullmatch(r"[0-9a-f]{64}", sha256) is None:
        raise DecodeError(f"{SHA256} must be 64 lower-case hexadecimal digits")
    if not (0 <= index < parts <= size):
        raise DecodeError(f"part {index} of {parts}, of {size} bytes in all, cannot be")
    return Part(index, parts, size, sha256)


def join(chunks: list[bytes], place: Part) -> bytes:
    """The whole body; raises DecodeError unless size and digest are what the parts promised."""
    body = b"".join(chunks)
    if len(body) != place.size or hashlib.sha256(body).hexdigest() != place.sha256:
        raise DecodeError(f"{len(chunks)} parts give {len(body)} bytes that are not the {place.size} promised")
    return body


class GapError(DecodeError):
    """A part came whose predecessors were not seen."""


class Assembler:
    """Puts together the parts of one sender that come in order, one message after the other."""

    def __init__(self) -> None:
        self._message_id = ""
        self._chunks: list[bytes] = []

    def add(self, delivery: Delivery) -> bytes | None:
        """The whole body when it is complete. Raises GapError, and DecodeError for parts that do not fit together."""
        place = part_of(delivery.headers)
        if place is None:
            return delivery.body
        if delivery.message_id == self._message_id and place.index < len(self._chunks):
            return None  # A part that was sent again.
        if place.index == 0:
            self._message_id, self._chunks = delivery.message_id, []
        elif delivery.message_id != self._message_id or place.index != len(self._chunks):
            raise GapError(f"part {place.index} of {place.parts} of {delivery.message_id} came first")
        self._chunks.append(delivery.body)
        if len(self._chunks) < place.parts:
            return None
        chunks, self._chunks, self._message_id = self._chunks, [], ""
        return join(chunks, place)
