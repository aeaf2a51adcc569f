"""Following the model: from the frame that is held to the newest one, by the changes where they cost less, else by a keyframe.

`chain.py` says what a frame makes of a model; here is which frames to read, and what to do when one is missing or wrong.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import structlog

from broker_fl.codecs.chain import change, rounded, whole_model
from broker_fl.config import KEYFRAME_CODECS
from broker_fl.errors import DecodeError, ManifestMismatchError, nearest
from broker_fl.parameters import Vector, digest, mismatch
from broker_fl.signing import body_statement, is_signed
from broker_fl.topology import Names
from broker_fl.transports.model_log import Broadcast, Pending, Place, Traffic, read_from
from broker_fl.transports.transport import Transport
from schemas import wire
from schemas.frame import ModelFrame, Plan
from schemas.manifest import Manifest

_PATIENCE_S = 30.0
_LEAST_PENDING_BYTES = 1 << 20
_LEAST_BYTES_PER_S = 4000
"""What the slowest line gives: so much longer than its patience somebody waits for what a log has to send."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class ReceivedModel:
    """What a frame left behind: the model, shape (manifest.size,), which is shared and not to be written to, and its facts."""

    ledger: str
    number: int
    version: int
    digest: str
    over: bool
    log_bytes: int
    plan: Plan
    model: Vector


@dataclass(frozen=True, slots=True)
class Progress:
    received: ReceivedModel
    bodies: tuple[bytes, ...]
    """Of the frames that made it, in order."""
    is_anew: bool
    """They did not start from the model that was held before."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """A frame as it came."""

    facts: ModelFrame
    body: bytes
    place: Place | None

    @property
    def number(self) -> int:
        return self.facts.number

    @property
    def is_announcement(self) -> bool:
        return self.facts.base is None


class _AnotherLedgerError(Exception):
    """Ends a wait for a keyframe that nobody will miss any more."""


class Follower:
    """Holds the model of the newest frame that it could follow to; lives longer than any connection.

    `initial` is the model that the task's seed draws: where the federation began with the same, no keyframe is needed. `read` is
    told of every message that is read, see Traffic. Where there is a `federation_key`, what it did not sign is left out, whatever
    the broker says. Nothing is decoded or added up on the event loop. One call of `next` at a time.
    """

    def __init__(
        self,
        *,
        federation: str,
        manifest: Manifest,
        initial: Vector,
        name: str,
        federation_key: str | None = None,
        patience_s: float = _PATIENCE_S,
        read: Callable[[str, int], None] | None = None,
    ) -> None:
        self._federation = federation
        self._names = Names(federation)
        self._manifest = manifest
        self._initial = initial
        self._name = name
        self._federation_key = federation_key
        self._patience_s = patience_s
        self._own_digests: dict[str | None, str] = {}
        self._begun_otherwise = ""
        """A ledger that began with another model than the task's seed draws."""
        self._given_up: ModelFrame | None = None
        """The frame whose keyframe led nowhere: there is nothing to be done until another one comes."""
        self.held: ReceivedModel | None = None
        self.traffic = Traffic(read)

    def new_pending(self) -> Pending:
        """For one connection. More than a whole model is not kept waiting."""
        return Pending(most_bytes=max(_LEAST_PENDING_BYTES, 4 * self._manifest.size))

    async def next(self, transport: Transport, pending: Pending) -> Progress | None:
        """Takes what is pending, and what that needs from the logs; None where it leads nowhere.

        A frame of the very number that is held is progress too: it may have another plan, or say that the federation is over.
        Raises ManifestMismatchError if the federation trains another model.
        """
        came = await asyncio.to_thread(self._frames, await pending.take())
        # What another ledger sent before is history.
        came = [frame for frame in came if frame.facts.ledger == came[-1].facts.ledger]
        if not came:
            return None
        newest = max(reversed(came), key=lambda frame: frame.number)
        held = self._held_of(newest.facts.ledger)
        if held is not None and newest.number < held.number:
            return None
        progress = None if held is None else await self._go_on(transport, held, came, newest.facts)
        progress = progress or await self._begin_anew(transport, pending, came, newest.facts)
        if progress is not None:
            self.held = progress.received
        return progress

    def _held_of(self, ledger: str) -> ReceivedModel | None:
        return self.held if self.held is not None and self.held.ledger == ledger else None

    async def _go_on(self, transport: Transport, held: ReceivedModel, came: list[_Frame], newest: ModelFrame) -> Progress | None:
        """From the held model, by what came and, where that costs less than a keyframe, what the log has before it."""
        if any(frame.number == held.number and frame.facts.digest != held.digest for frame in came):
            log.error("what is held is not what the aggregator has under its number", number=held.number)
            return None
        steps = steps_from(held.number, came)
        if steps is None and not self._is_given_up(newest) and deltas_cost_less(held.log_bytes, newest):
            steps = await self._steps_through_the_log(transport, held, came)
            if steps is None:
                log.warning("changes since the held frame are gone from the log", held=held.number, newest=newest.number)
        return None if steps is None else await self._applied(held, steps)

    async def _begin_anew(
        self, transport: Transport, pending: Pending, came: list[_Frame], newest: ModelFrame
    ) -> Progress | None:
        if self._is_given_up(newest):
            return None
        progress = await self._from_own_seed(transport, came, newest)
        if progress is None:
            keyframe = await self._keyframe(transport, pending, newest)
            progress = None if keyframe is None else await self._from_keyframe(transport, keyframe, came)
            self._given_up = newest if progress is None else None
            if progress is None and keyframe is not None:
                # With no way on, and still better than what was held.
                progress = Progress(keyframe, (), is_anew=True)
        return None if progress is None else replace(progress, is_anew=True)

    def _is_given_up(self, newest: ModelFrame) -> bool:
        """Until a newer keyframe, or an announcement, promises more."""
        failed = self._given_up
        return (
            failed is not None
            and newest.base is not None
            and (newest.ledger, newest.keyframe.number) == (failed.ledger, failed.keyframe.number)
        )

    async def _from_own_seed(self, transport: Transport, came: list[_Frame], newest: ModelFrame) -> Progress | None:
        """From the model that this party draws itself, if an announcement says that it is the one."""
        for index, frame in enumerate(came):
            if frame.is_announcement and await asyncio.to_thread(self._draws, frame.facts):
                steps = steps_from(frame.number, came[index + 1 :])
                return None if steps is None else await self._applied(None, [frame, *steps])
            if frame.is_announcement and frame.number == 1:
                self._begun_otherwise = frame.facts.ledger
        if self._begun_otherwise == newest.ledger or not deltas_cost_less(0, newest):
            return None
        steps = await self._steps_through_the_log(transport, None, came)
        return None if steps is None else await self._applied(None, steps)

    def _draws(self, announced: ModelFrame) -> bool:
        if announced.rounding not in self._own_digests:
            self._own_digests[announced.rounding] = digest(self._drawn(announced.rounding))
        return self._own_digests[announced.rounding] == announced.digest

    def _drawn(self, rounding: str | None) -> Vector:
        return self._initial if rounding is None else rounded(self._initial, rounding, manifest=self._manifest)[1]

    async def _from_keyframe(self, transport: Transport, keyframe: ReceivedModel, came: list[_Frame]) -> Progress | None:
        steps = steps_from(keyframe.number, came)
        if steps is None:
            steps = await self._steps_through_the_log(transport, keyframe, came)
        if steps is None:
            log.error("changes since the keyframe are gone from the log", keyframe=keyframe.number, newest=came[-1].number)
            return None
        return await self._applied(keyframe, steps)

    async def _applied(self, start: ReceivedModel | None, steps: list[_Frame]) -> Progress | None:
        try:
            received = await asyncio.to_thread(self._apply, start, steps)
        except DecodeError as exc:
            log.error("frames lead to another model than they say", reason=str(exc))  # noqa: TRY400 - one line says it all
            return None
        return Progress(received, tuple(frame.body for frame in steps), is_anew=start is None)

    def _apply(self, start: ReceivedModel | None, steps: list[_Frame]) -> ReceivedModel:
        frames = [frame.facts for frame in steps]
        if start is not None:
            return advance(start, frames, manifest=self._manifest)
        return advance(received_by(frames[0], self._drawn(frames[0].rounding)), frames[1:], manifest=self._manifest)

    async def _steps_through_the_log(
        self, transport: Transport, start: ReceivedModel | None, came: Sequence[_Frame]
    ) -> list[_Frame] | None:
        """What leads from there (None is the model that the own seed draws) to the newest; None where some of it is gone."""
        came = unbroken_end(came)
        missing = await self._missing(transport, start, came[0])
        if start is not None:
            return steps_from(start.number, [*missing, *came])
        if not missing:
            return None
        steps = steps_from(missing[0].number, [*missing[1:], *came])
        return None if steps is None else [missing[0], *steps]

    async def _missing(self, transport: Transport, start: ReceivedModel | None, first: _Frame) -> list[_Frame]:
        """What the model log holds from this frame on, to before `first`.

        The frame itself is among them: it may have been announced again later on, with another plan.
        """
        number, log_bytes = (0, 0) if start is None else (start.number, start.log_bytes)
        # A message comes whole or not at all: on a slow line a large one is long in coming, and the others share the line.
        patience_s = self._patience_s + max(0, first.facts.log_bytes - log_bytes) / _LEAST_BYTES_PER_S
        found: list[_Frame] = []
        reading = read_from(
            transport, self._names.model_log, max(number, 1), near=first.place, name=self._name, traffic=self.traffic
        )
        async with aclosing(reading) as broadcasts:
            while True:
                try:
                    async with asyncio.timeout(patience_s):
                        broadcast = await anext(broadcasts)
                except TimeoutError:
                    log.warning("the model log gives nothing more", wanted=first.number, waited_s=round(patience_s, 1))
                    return found
                for frame in await asyncio.to_thread(self._frames, [broadcast]):
                    if frame.facts.ledger != first.facts.ledger or frame.number < number:
                        continue
                    if frame.number > first.number or (frame.number, frame.facts.base) == (first.number, first.facts.base):
                        return found
                    if not found and not await asyncio.to_thread(self._may_begin, frame, number):
                        return found
                    found.append(frame)

    def _may_begin(self, frame: _Frame, number: int) -> bool:
        if number > 0:
            return frame.number <= number + 1
        if frame.number == 1 and frame.is_announcement and not self._draws(frame.facts):
            self._begun_otherwise = frame.facts.ledger
            return False
        return frame.number == 1 and frame.is_announcement

    async def _keyframe(self, transport: Transport, pending: Pending, newest: ModelFrame) -> ReceivedModel | None:
        """The one that `newest` knows of or a newer one; None if it is wrong, or its ledger is history meanwhile."""
        found = None
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._watch(pending, newest))
                found = await self._read_keyframe(transport, newest)
                watch.cancel()
        except* _AnotherLedgerError:
            log.info("another ledger goes on: its frames are followed", left=newest.ledger)
        return found

    async def _watch(self, pending: Pending, newest: ModelFrame) -> None:
        """Says that a keyframe is long in coming: on a slow line that is as it is, and asking again would begin from scratch."""
        while True:
            await asyncio.sleep(self._patience_s)
            log.warning("the keyframe has not come yet, waiting on", number=newest.keyframe.number, bytes=newest.keyframe.bytes)
            waiting = pending.newest()
            frames = [] if waiting is None else await asyncio.to_thread(self._frames, [waiting])
            if frames and frames[-1].facts.ledger != newest.ledger:
                raise _AnotherLedgerError

    async def _read_keyframe(self, transport: Transport, newest: ModelFrame) -> ReceivedModel | None:
        number = newest.keyframe.number
        reading = read_from(
            transport, self._names.keyframe_log, number, or_newer=True, near=None, name=self._name, traffic=self.traffic
        )
        async with aclosing(reading) as broadcasts:
            async for broadcast in broadcasts:
                for frame in await asyncio.to_thread(self._frames, [broadcast]):
                    if frame.facts.ledger == newest.ledger and frame.number >= number:
                        return await asyncio.to_thread(self._opened, frame.facts)
        return None

    def _opened(self, keyframe: ModelFrame) -> ReceivedModel | None:
        try:
            model = whole_model(keyframe, manifest=self._manifest)
            if digest(model) != keyframe.digest:
                raise DecodeError(f"keyframe {keyframe.number} decodes to another model than its digest says")
        except DecodeError as exc:
            log.error("keyframe left out", reason=str(exc))  # noqa: TRY400 - one line says it all
            return None
        return received_by(keyframe, model)

    def _frames(self, broadcasts: Sequence[Broadcast]) -> list[_Frame]:
        """Of this federation and model; what is none is logged and left out."""
        frames = []
        for broadcast in broadcasts:
            try:
                self._expect_signature(broadcast)
                facts = parse_frame(broadcast.body, federation=self._federation, manifest=self._manifest)
            except DecodeError as exc:
                log.error("broadcast left out", reason=str(exc))  # noqa: TRY400 - one line says it all
            else:
                frames.append(_Frame(facts, broadcast.body, broadcast.place))
        return frames

    def _expect_signature(self, broadcast: Broadcast) -> None:
        """Before anything is read of it."""
        key = self._federation_key
        if key is not None and not is_signed("frame", body_statement(broadcast.body), broadcast.signature, by=key):
            raise DecodeError(
                f"it is not signed by the federation's key {key[:12]}: somebody else sent it, or the federation has another key "
                "than at enrolment (`broker-fl party rotate` makes a new party file)"
            )


def parse_frame(body: bytes, *, federation: str, manifest: Manifest) -> ModelFrame:
    """Raises DecodeError for what is no frame of the federation, and ManifestMismatchError for a frame of another model."""
    frame = wire.decode(ModelFrame, body)
    if frame.federation != federation:
        raise DecodeError(f"the frame is of federation {frame.federation!r}, not {federation!r}")
    if frame.rounding is not None and frame.rounding not in KEYFRAME_CODECS:
        raise DecodeError(f"frame {frame.number} is rounded by {frame.rounding!r}: {nearest(frame.rounding, KEYFRAME_CODECS)}")
    if frame.manifest is not None and frame.manifest.digest != manifest.digest:
        difference = mismatch(manifest, frame.manifest)
        # Where there is a plan, it says whether BatchNorm is replaced.
        noised = frame.plan is not None and frame.plan.privacy is not None
        privacy = ', and that [privacy] mechanism = "dp-sgd" is set here, as in the federation' if noised else ""
        raise ManifestMismatchError(
            f"the federation trains another model than this task: {difference}; check --task and --model{privacy}"
        )
    return frame


def deltas_cost_less(held_log_bytes: int, newest: ModelFrame) -> bool:
    """Whether the changes since a frame cost no more than the newest keyframe and the changes since that."""
    keyframe = newest.keyframe
    return newest.log_bytes - held_log_bytes <= keyframe.bytes + newest.log_bytes - keyframe.log_bytes


def steps_from(number: int, frames: Sequence[_Frame]) -> list[_Frame] | None:
    """Those of the frames that lead on from this one, without what is repeated; None where one is missing in between."""
    steps = []
    for frame in frames:
        if frame.number < number or (frame.number == number and not frame.is_announcement):
            continue
        if frame.number > number and frame.facts.base != number:
            return None
        steps.append(frame)
        number = frame.number
    return steps


def unbroken_end(frames: Sequence[_Frame]) -> Sequence[_Frame]:
    """From the last frame on that the one before it does not lead to."""
    start, number = 0, frames[0].number
    for index, frame in enumerate(frames):
        if frame.number > number and frame.facts.base != number:
            start = index
        number = max(number, frame.number)
    return frames[start:]


def received_by(frame: ModelFrame, model: Vector) -> ReceivedModel:
    """Of a frame that stands alone."""
    if frame.plan is None:
        raise DecodeError(f"frame {frame.number} has no plan, and none came before it")
    return _received(frame, frame.plan, model)


def advance(start: ReceivedModel, frames: Sequence[ModelFrame], *, manifest: Manifest) -> ReceivedModel:
    """What the frames, each the change to the one before it, make of a model, which is left as it is.

    An announcement of the frame that is reached changes the plan and whether it is over. Raises DecodeError unless the result is,
    to the last bit, what the last frame calls by its digest.
    """
    reached, model = start, start.model
    for frame in frames:
        if frame.base is None and frame.digest != reached.digest:
            raise DecodeError(f"frame {frame.number} is announced with another digest than it had before")
        if frame.base is not None and (frame.payload or frame.rounding is not None):
            model = model.copy() if model is start.model else model
            change(model, frame, manifest=manifest)
        reached = _received(frame, frame.plan or reached.plan, model)
    if reached.digest != (start.digest if model is start.model else digest(model)):
        raise DecodeError(f"frame {reached.number} yields another model than its digest says")
    return reached


def _received(frame: ModelFrame, plan: Plan, model: Vector) -> ReceivedModel:
    return ReceivedModel(
        ledger=frame.ledger,
        number=frame.number,
        version=frame.version,
        digest=frame.digest,
        over=frame.over,
        log_bytes=frame.log_bytes,
        plan=plan,
        model=model,
    )
