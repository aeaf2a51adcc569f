"""Reading the logs of the model: whole bodies as they come, or from a frame on; and what reading them cost.

A frame's place is in the headers of its messages, `x-fl-number` and those of parts, so that a log can be entered near a frame.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from broker_fl.errors import DecodeError
from broker_fl.signing import SIGNATURE
from broker_fl.transports.parts import PART, Assembler, GapError, part_of
from broker_fl.transports.transport import Delivery, Feed, Start, Transport

NUMBER, KIND, CODEC = "x-fl-number", "x-fl-kind", "x-fl-codec"

_BURST_S = 0.02
"""Frames that come within this time are one burst: they are followed in one go."""

_SLACK = 4
"""Messages to go back further than computed: offsets skip one where a segment begins, and frames may have come twice."""

_REWINDS: tuple[int | None, ...] = (0, 1, 4, 16, None)
"""How far to go back where a log was entered too late: as computed, with slack, multiples of that; None is its beginning."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a log holds a message of a frame."""

    offset: int
    number: int
    part: int
    parts: int

    def is_after_the_start_of(self, number: int, *, or_newer: bool) -> bool:
        """Whether who reads on from here misses this frame; with `or_newer`, only if it is inside of one that would do."""
        if self.number > number and not or_newer:
            return True
        return self.number >= number and self.part > 0

    def before(self, number: int, *, times: int) -> int:
        """An offset that should lie at the start of this frame or before it."""
        messages = max(0, self.number - number) * self.parts + self.part
        return max(0, self.offset - max(1, times) * messages - times * _SLACK)


@dataclass(frozen=True, slots=True)
class Broadcast:
    """The whole body of a frame."""

    body: bytes
    place: Place | None
    """Of its last message; None where it did not come from a log."""
    signature: object = None
    """As it came in the headers."""


class Traffic:
    """Counts what is read, until somebody takes the counts: all bytes, those read again too.

    `read` is told of each message: the codec that its headers name, empty without one, and its bytes.
    """

    def __init__(self, read: Callable[[str, int], None] | None = None) -> None:
        self._read = read
        self._counts: Counter[str] = Counter()

    def add(self, delivery: Delivery, *, is_whole: bool) -> None:
        if self._read is not None:
            codec = delivery.headers.get(CODEC)
            self._read(codec if isinstance(codec, str) else "", len(delivery.body))
        self._counts["bytes_down"] += len(delivery.body)
        if is_whole:
            self._counts["frames_received"] += 1
            kind = delivery.headers.get(KIND)
            if kind in ("delta", "keyframe"):
                self._counts[f"{kind}s_received"] += 1

    def take(self) -> dict[str, int]:
        counts, self._counts = self._counts, Counter()
        return dict(counts)


class Pending:
    """Broadcasts that wait to be followed: who takes them gets all of a burst.

    What costs more than `most_bytes` is not worth keeping: the oldest go, since whoever lacks them finds them in the log.
    """

    def __init__(self, *, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._waiting: deque[Broadcast] = deque()
        self._bytes = 0
        self._filled = asyncio.Event()

    def put(self, broadcast: Broadcast) -> None:
        self._waiting.append(broadcast)
        self._bytes += len(broadcast.body)
        while self._bytes > self._most_bytes and len(self._waiting) > 1:
            self._bytes -= len(self._waiting.popleft().body)
            log.info("a frame waited too long for those before it: it will be read again if it is needed")
        self._filled.set()

    async def take(self) -> list[Broadcast]:
        await self._filled.wait()
        await asyncio.sleep(_BURST_S)
        burst = list(self._waiting)
        self._waiting.clear()
        self._bytes = 0
        self._filled.clear()
        return burst

    def newest(self) -> Broadcast | None:
        """It goes on waiting."""
        return self._waiting[-1] if self._waiting else None


async def read_queue(feed: Feed, *, traffic: Traffic) -> AsyncGenerator[Broadcast, None]:
    """What comes through a queue of one's own; what began before it was bound, or is damaged, is logged and left out."""
    reader = _Reader(feed, traffic)
    while True:
        read = await reader.next()
        if read.is_gap:
            _leave_out(read.delivery, "its beginning came before this queue was bound")
        if read.body is not None:
            yield Broadcast(read.body, None, read.delivery.headers.get(SIGNATURE))


async def read_newest(transport: Transport, model_log: str, *, name: str, traffic: Traffic) -> AsyncGenerator[Broadcast, None]:
    """From the newest frame of a log on, for ever; the first ones may be older than the newest.

    A log entered at `last` may begin inside of a frame that came in parts: then that frame is read from its beginning, and left
    out where that is gone.
    """
    sought = ""
    async with transport.follow(model_log, start="last", name=name) as feed:
        reader = _Reader(feed, traffic)
        while True:
            read = await reader.next()
            found = read.broadcast()
            if read.is_gap and read.delivery.message_id != sought:
                sought = read.delivery.message_id
                found = await _read_whole(transport, model_log, read.delivery, name=name, traffic=traffic)
            if found is not None:
                yield found


async def read_from(
    transport: Transport,
    log_name: str,
    number: int,
    *,
    or_newer: bool = False,
    near: Place | None,
    name: str,
    traffic: Traffic,
) -> AsyncGenerator[Broadcast, None]:
    """A log in its order, for ever, from some frame before this number on, from this one, or from the beginning of the log.

    `near` is a known place; without one the log is entered at `last`. Where that was too late, it is entered again, ever
    further back. With `or_newer`, a whole frame of a higher number is good enough to begin with.
    """
    start: Start = "last" if near is None else near.before(number, times=1)
    rewinds = iter(_REWINDS)
    while True:
        async with transport.follow(log_name, start=start, name=name) as feed:
            reader = _Reader(feed, traffic)
            read = await reader.next()
            place = read.place()
            if start in ("first", 0) or place is None or not place.is_after_the_start_of(number, or_newer=or_newer):
                while True:
                    found = read.broadcast()
                    if found is not None:
                        yield found
                    read = await reader.next()
        times = next(rewinds)
        if times is None:
            log.warning("looking for a frame in the whole log", log=log_name, number=number)
        number = place.number if or_newer else number
        start = "first" if times is None else place.before(number, times=times)


async def _read_whole(transport: Transport, model_log: str, inside: Delivery, *, name: str, traffic: Traffic) -> Broadcast | None:
    """The frame of which a log was entered in the middle; None where its beginning is gone."""
    place = place_of(inside)
    if place is None:
        _leave_out(inside, f"a part without its beginning, and without {NUMBER} to find that by")
        return None
    async with aclosing(read_from(transport, model_log, place.number, near=place, name=name, traffic=traffic)) as broadcasts:
        async for found in broadcasts:
            if found.place is not None and found.place.number == place.number:
                return found
            if found.place is not None and found.place.number > place.number:
                _leave_out(inside, "its beginning is gone from the log")
                break
    return None


def place_of(delivery: Delivery) -> Place | None:
    """None for what is not of a log, or has no number."""
    number = delivery.headers.get(NUMBER)
    if delivery.offset is None or type(number) is not int:
        return None
    part = part_of(delivery.headers)
    return Place(delivery.offset, number, 0, 1) if part is None else Place(delivery.offset, number, part.index, part.parts)


@dataclass(frozen=True, slots=True)
class _Read:
    """One message, and the body that it completes."""

    delivery: Delivery
    body: bytes | None
    is_gap: bool
    """A part whose predecessors were not read."""

    def place(self) -> Place | None:
        return place_of(self.delivery)

    def broadcast(self) -> Broadcast | None:
        return None if self.body is None else Broadcast(self.body, self.place(), self.delivery.headers.get(SIGNATURE))


class _Reader:
    """Puts parts together, counts what is read, and leaves out, with a warning, what is damaged."""

    def __init__(self, feed: Feed, traffic: Traffic) -> None:
        self._feed = feed
        self._traffic = traffic
        self._assembler = Assembler()

    async def next(self) -> _Read:
        while True:
            delivery = await self._feed.receive()
            body, is_gap, damage = None, False, ""
            try:
                # In a thread: the last part is followed by the digest of all of them.
                is_part = PART in delivery.headers
                body = await asyncio.to_thread(self._assembler.add, delivery) if is_part else delivery.body
            except GapError:
                is_gap = True
            except DecodeError as exc:
                damage = str(exc)
            self._traffic.add(delivery, is_whole=body is not None)
            if not damage:
                return _Read(delivery, body, is_gap)
            _leave_out(delivery, damage)


def _leave_out(delivery: Delivery, reason: str) -> None:
    log.warning("broadcast left out", reason=reason, message_id=delivery.message_id)
