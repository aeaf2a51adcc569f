"""Evaluation of new versions on a held-out set, in a process of its own: it binds its own queue to the broadcasts, so that
however long it takes, the aggregator never waits for it.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import structlog

from broker_fl.errors import BrokerUnavailableError, DecodeError, PublishTimeoutError, first_of
from broker_fl.parameters import Vector
from broker_fl.topology import Names
from broker_fl.transports.model_log import LatestBody, ReceivedModel, follow_frames, open_frame, whole_messages
from broker_fl.transports.retry import Backoff
from broker_fl.transports.transport import Connect, Message, Transport
from schemas import wire
from schemas.event import Event
from schemas.manifest import Manifest

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Score:
    accuracy: float
    loss: float
    count: int


class Evaluate(Protocol):
    """Bound to a task, its held-out data and a device; runs in a thread."""

    def __call__(self, model: Vector) -> Score: ...


class Evaluator:
    """Runs until the last model is evaluated or `stop` is called."""

    def __init__(
        self, connect: Connect, evaluate: Evaluate, *, federation: str, manifest: Manifest, clock: Callable[[], float]
    ) -> None:
        self._connect = connect
        self._evaluate = evaluate
        self._names = Names(federation)
        self._manifest = manifest
        self._clock = clock
        self._newest: ReceivedModel | None = None
        self._ended = asyncio.Event()

    def stop(self) -> None:
        self._ended.set()

    async def run(self) -> None:
        """Raises ManifestMismatchError, AuthenticationError, NotFoundError; a broker that is away is waited for."""
        backoff = Backoff()
        while not self._ended.is_set():
            try:
                async with self._connect(f"evaluator:{self._names.federation}") as transport:
                    backoff.reset()
                    await self._session(transport)
            except* (BrokerUnavailableError, PublishTimeoutError) as lost:
                log.warning("no broker, trying again", reason=str(first_of(lost)), wait_s=round(backoff.next_s, 1))
                await backoff.wait(unless=self._ended)

    async def _session(self, transport: Transport) -> None:
        bodies = LatestBody()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._follow(transport, bodies)),
                group.create_task(self._evaluate_frames(transport, bodies)),
            ]
            await self._ended.wait()
            for task in tasks:
                task.cancel()

    async def _follow(self, transport: Transport, bodies: LatestBody) -> None:
        """Its own queue on the fanout; and until that gives its first frame, the log, for what was broadcast before."""
        async with transport.listen(self._names.model, name="evaluator") as feed, asyncio.TaskGroup() as group:
            earlier = group.create_task(self._read_log(transport, bodies))
            async with aclosing(whole_messages(feed)) as frames:
                async for body in frames:
                    earlier.cancel()
                    bodies.put(body)

    async def _read_log(self, transport: Transport, bodies: LatestBody) -> None:
        async with aclosing(follow_frames(transport, self._names.model_log, name="evaluator-log")) as frames:
            async for body in frames:
                bodies.put(body)

    async def _evaluate_frames(self, transport: Transport, bodies: LatestBody) -> None:
        while True:
            body = await bodies.get()
            try:
                received = await asyncio.to_thread(open_frame, body, federation=self._names.federation, manifest=self._manifest)
            except DecodeError as exc:
                log.warning("broadcast left out", reason=str(exc))
                continue
            if not received.is_newer_than(self._newest):
                continue
            began = self._clock()
            score = await asyncio.to_thread(self._evaluate, received.model)
            await self._report(transport, received, score, seconds=self._clock() - began)
            # Only now: a score that was lost with the broker is told after the next connection.
            self._newest = received
            if received.frame.over:
                self._ended.set()

    async def _report(self, transport: Transport, received: ReceivedModel, score: Score, *, seconds: float) -> None:
        frame = received.frame
        log.info("model evaluated", version=frame.version, accuracy=round(score.accuracy, 4), loss=round(score.loss, 4))
        event = Event(
            kind="model.evaluated",
            federation=frame.federation,
            at=self._clock(),
            version=frame.version,
            facts={
                "accuracy": score.accuracy,
                "loss": score.loss,
                "count": score.count,
                "seconds": seconds,
                "over": frame.over,
            },
        )
        message = Message(self._names.events, wire.encode(event), routing_key=event.kind, mandatory=False)
        await transport.publish(message)
