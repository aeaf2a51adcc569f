"""Reading the broadcasts: from the log, from its newest frame on, whole or in parts; and opening them."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from broker_fl.codecs.codec import decode, parse_codec
from broker_fl.errors import ConfigurationError, DecodeError, ManifestMismatchError
from broker_fl.parameters import Vector, digest, mismatch
from broker_fl.transports.parts import Assembler, GapError, part_of
from broker_fl.transports.transport import Delivery, Feed, Start, Transport
from schemas import wire
from schemas.frame import ModelFrame
from schemas.manifest import Manifest

_OFFSET_GAPS = 16
"""Offsets skip some numbers where segments roll: attach this much before the computed one."""

_BURST_S = 0.02
"""Frames that come within this time are one burst: only the newest is opened."""

log = structlog.get_logger(__name__)


async def whole_messages(feed: Feed) -> AsyncGenerator[bytes, None]:
    """Bodies of a queue of one's own; what began before it was bound, or is damaged, is logged and left out."""
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


async def follow_frames(transport: Transport, model_log: str, *, name: str) -> AsyncGenerator[bytes, None]:
    """Bodies of the frames from the newest on, for ever; the first ones may be older than the newest.

    A log attached at `last` may begin inside a frame that came in parts: then it is attached again before the frame's first part,
    at last at the beginning of the log, and a frame whose beginning is gone by then is left out.
    """
    start: Start = "last"
    sought: _Sought | None = None
    while True:
        gap: Delivery | None = None
        async with (
            transport.follow(model_log, start=start, name=name) as feed,
            aclosing(_until_gap(feed, sought)) as bodies,
        ):
            async for body_or_gap in bodies:
                if isinstance(body_or_gap, Delivery):
                    gap = body_or_gap
                    break
                yield body_or_gap
        if gap is not None:
            sought = _Sought(gap, sought.tried + 1 if sought is not None and sought.is_of(gap) else 1)
            start = sought.start()


async def _until_gap(feed: Feed, sought: "_Sought | None") -> AsyncGenerator[bytes | Delivery, None]:
    assembler = Assembler()
    while True:
        delivery = await feed.receive()
        try:
            body = assembler.add(delivery)
        except GapError:
            if sought is None or not sought.leaves_out(delivery):
                yield delivery
            continue
        except DecodeError as exc:
            log.warning("broadcast left out", reason=str(exc), message_id=delivery.message_id)
            continue
        if body is not None:
            yield body


@dataclass(frozen=True, slots=True)
class _Sought:
    """A part without the ones before it, and how often the log was attached again for them."""

    gap: Delivery
    tried: int

    def is_of(self, delivery: Delivery) -> bool:
        return delivery.message_id == self.gap.message_id

    def leaves_out(self, delivery: Delivery) -> bool:
        """A frame whose beginning is gone, or an older one that the log was now entered in the middle of."""
        if self.is_of(delivery):
            return self.tried >= len(_REWINDS)
        return delivery.offset is not None and self.gap.offset is not None and delivery.offset < self.gap.offset

    def start(self) -> Start:
        place = part_of(self.gap.headers)
        distance = _REWINDS[self.tried - 1]
        if self.gap.offset is None or place is None or distance is None:
            log.warning("looking for the beginning of a frame in the whole log", message_id=self.gap.message_id)
            return "first"
        return max(0, self.gap.offset - distance * (place.index + _OFFSET_GAPS))


_REWINDS: tuple[int | None, ...] = (1, 4, None)
"""How far to go back, as multiples of the expected distance; None is the beginning of the log."""


@dataclass(frozen=True, slots=True)
class ReceivedModel:
    """A frame and the model that it decodes to."""

    frame: ModelFrame
    model: Vector

    def is_newer_than(self, held: "ReceivedModel | None") -> bool:
        """Numbers count up within a ledger; another ledger starts again."""
        return held is None or self.frame.ledger != held.frame.ledger or self.frame.number > held.frame.number


def open_frame(body: bytes, *, federation: str, manifest: Manifest) -> ReceivedModel:
    """The model of a frame, for the threads that decode.

    Raises DecodeError unless it is, to the last bit, what the aggregator calls by its digest, and ManifestMismatchError if it is
    another model than this task's.
    """
    frame = wire.decode(ModelFrame, body)
    if frame.federation != federation:
        raise DecodeError(f"the frame is of federation {frame.federation!r}, not {federation!r}")
    if frame.manifest.digest != manifest.digest:
        difference = mismatch(manifest, frame.manifest)
        raise ManifestMismatchError(f"the federation trains another model than this task: {difference}; check --task and --model")
    try:
        codec = parse_codec(frame.codec)
    except ConfigurationError as exc:
        raise DecodeError(f"frame {frame.number} is in a codec that this version does not know: {exc}") from exc
    model = decode(frame.payload, codec, manifest=manifest).dense()
    if digest(model) != frame.digest:
        raise DecodeError(f"frame {frame.number} decodes to another model than its digest says")
    return ReceivedModel(frame, model)


class LatestBody:
    """A place for one frame: who takes it gets the newest of a burst."""

    def __init__(self) -> None:
        self._body = b""
        self._filled = asyncio.Event()

    def put(self, body: bytes) -> None:
        self._body = body
        self._filled.set()

    async def get(self) -> bytes:
        await self._filled.wait()
        await asyncio.sleep(_BURST_S)
        self._filled.clear()
        return self._body
