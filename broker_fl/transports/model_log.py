"""Reading the broadcasts: from the log, from its newest frame on, whole or in parts."""

from collections.abc import AsyncIterator
from contextlib import aclosing

import structlog

from broker_fl.errors import DecodeError
from broker_fl.transports.parts import Assembler, GapError, part_of
from broker_fl.transports.transport import Delivery, Feed, Start, Transport

_OFFSET_GAPS = 16
"""Offsets skip some numbers where segments roll: attach this much before the computed one."""

log = structlog.get_logger(__name__)


async def whole_messages(feed: Feed) -> AsyncIterator[bytes]:
    """Bodies of a feed that began before its first part; a damaged one is logged and left out."""
    assembler = Assembler()
    while True:
        delivery = await feed.receive()
        try:
            body = assembler.add(delivery)
        except DecodeError as exc:
            log.warning("broadcast left out", reason=str(exc), message_id=delivery.message_id)
            continue
        if body is not None:
            yield body


async def follow_frames(transport: Transport, model_log: str, *, name: str) -> AsyncIterator[bytes]:
    """Bodies of the frames from the newest on, for ever; the first ones may be older than the newest.

    A log attached at `last` may begin inside a frame that came in parts: then it is attached again before the frame's first part,
    at last at the beginning of the log, and a frame whose beginning is gone by then is left out.
    """
    start: Start = "last"
    attempts: dict[str, int] = {}
    while True:
        gap: Delivery | None = None
        async with (
            transport.follow(model_log, start=start, name=name) as feed,
            aclosing(_until_gap(feed, attempts)) as bodies,
        ):
            async for body_or_gap in bodies:
                if isinstance(body_or_gap, Delivery):
                    gap = body_or_gap
                    break
                yield body_or_gap
        if gap is not None:
            start = _before(gap, attempts)


async def _until_gap(feed: Feed, attempts: dict[str, int]) -> AsyncIterator[bytes | Delivery]:
    assembler = Assembler()
    while True:
        delivery = await feed.receive()
        try:
            body = assembler.add(delivery)
        except GapError:
            if attempts.get(delivery.message_id, 0) < len(_REWINDS):
                yield delivery
            continue
        except DecodeError as exc:
            log.warning("broadcast left out", reason=str(exc), message_id=delivery.message_id)
            continue
        if body is not None:
            yield body


def _before(gap: Delivery, attempts: dict[str, int]) -> Start:
    tried = attempts.get(gap.message_id, 0)
    attempts.clear()
    attempts[gap.message_id] = tried + 1
    place = part_of(gap.headers)
    if gap.offset is None or place is None:
        return "first"
    if _REWINDS[tried] is None:
        log.warning("looking for the beginning of a frame in the whole log", message_id=gap.message_id)
        return "first"
    return max(0, gap.offset - _REWINDS[tried] * (place.index + _OFFSET_GAPS))


_REWINDS: tuple[int | None, ...] = (1, 4, None)
"""How far to go back, as multiples of the expected distance; None is the beginning of the log."""
