"""Evaluation of new versions on a held-out set, in a process of its own: it binds its own queue to the broadcasts, so that
however long it takes, the aggregator never waits for it.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import structlog

from broker_fl.errors import BrokerUnavailableError, NotFoundError, PublishTimeoutError, UntrustedBrokerError, first_of
from broker_fl.parameters import Vector
from broker_fl.topology import EVALUATOR, Names
from broker_fl.transports.following import Follower, ReceivedModel
from broker_fl.transports.model_log import Pending, read_newest, read_queue
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


class Observer(Protocol):
    """Who counts; called on the event loop."""

    def evaluated(self, version: int, score: Score, *, seconds: float) -> None: ...


class Evaluator:
    """Runs until the last model is evaluated or `stop` is called."""

    def __init__(
        self,
        connect: Connect,
        evaluate: Evaluate,
        *,
        federation: str,
        manifest: Manifest,
        initial: Vector,
        federation_key: str | None = None,
        clock: Callable[[], float],
        observer: Observer | None = None,
    ) -> None:
        """Frames that `federation_key` did not sign are left out. `initial` is the model that the task's seed draws."""
        self._connect = connect
        self._evaluate = evaluate
        self._names = Names(federation)
        self._follower = Follower(
            federation=federation, manifest=manifest, initial=initial, name=EVALUATOR, federation_key=federation_key
        )
        self._clock = clock
        self._observer = observer
        self._newest: ReceivedModel | None = None
        self._changed = asyncio.Event()
        self._told: tuple[str, int, bool] | None = None
        """The ledger, number and end of the last frame whose score was told."""
        self._was_up = False
        self._ended = asyncio.Event()

    def stop(self) -> None:
        self._ended.set()

    async def run(self) -> None:
        """A broker that is away is waited for.

        Raises ManifestMismatchError, AuthenticationError, and at the start UntrustedBrokerError and NotFoundError (no aggregator
        has been yet).
        """
        backoff = Backoff()
        while not self._ended.is_set():
            try:
                async with self._connect(f"evaluator:{self._names.federation}") as transport:
                    await self._session(transport, backoff)
            except* (NotFoundError, UntrustedBrokerError) as missing:
                if not self._was_up:
                    raise
                # A broker that starts again may not know its vhost or queues for a while.
                log.warning("not there now, trying again", reason=str(first_of(missing)), wait_s=round(backoff.next_s, 1))
                await backoff.wait(unless=self._ended)
            except* (BrokerUnavailableError, PublishTimeoutError) as lost:
                log.warning("no broker, trying again", reason=str(first_of(lost)), wait_s=round(backoff.next_s, 1))
                await backoff.wait(unless=self._ended)

    async def _session(self, transport: Transport, backoff: Backoff) -> None:
        pending = self._follower.new_pending()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._listen(transport, pending, backoff)),
                group.create_task(self._follow(transport, pending)),
                group.create_task(self._evaluate_models(transport)),
            ]
            await self._ended.wait()
            for task in tasks:
                task.cancel()

    async def _listen(self, transport: Transport, pending: Pending, backoff: Backoff) -> None:
        """Its own queue on the fanout; and until that gives its first frame, the log, for what was broadcast before."""
        listening = transport.listen(self._names.model, name=EVALUATOR, queue=self._names.own_of(EVALUATOR))
        async with listening as feed, asyncio.TaskGroup() as group:
            self._was_up = True
            backoff.reset()
            earlier = group.create_task(self._read_log(transport, pending))
            async with aclosing(read_queue(feed, traffic=self._follower.traffic)) as broadcasts:
                async for broadcast in broadcasts:
                    earlier.cancel()
                    pending.put(broadcast)

    async def _read_log(self, transport: Transport, pending: Pending) -> None:
        reading = read_newest(transport, self._names.model_log, name="evaluator-log", traffic=self._follower.traffic)
        async with aclosing(reading) as broadcasts:
            async for broadcast in broadcasts:
                pending.put(broadcast)

    async def _follow(self, transport: Transport, pending: Pending) -> None:
        while True:
            progress = await self._follower.next(transport, pending)
            if progress is not None:
                self._newest = progress.received
                self._changed.set()

    async def _evaluate_models(self, transport: Transport) -> None:
        while True:
            self._changed.clear()
            received = self._newest
            if received is None or self._told == (received.ledger, received.number, received.over):
                await self._changed.wait()
                continue
            began = self._clock()
            score = await asyncio.to_thread(self._evaluate, received.model)
            seconds = self._clock() - began
            if self._observer is not None:
                self._observer.evaluated(received.version, score, seconds=seconds)
            await self._report(transport, received, score, seconds=seconds)
            # Only now: a score that was lost with the broker is told after the next connection.
            self._told = (received.ledger, received.number, received.over)
            if received.over:
                self._ended.set()

    async def _report(self, transport: Transport, received: ReceivedModel, score: Score, *, seconds: float) -> None:
        log.info("model evaluated", version=received.version, accuracy=round(score.accuracy, 4), loss=round(score.loss, 4))
        event = Event(
            kind="model.evaluated",
            federation=self._names.federation,
            at=self._clock(),
            version=received.version,
            facts={
                "accuracy": score.accuracy,
                "loss": score.loss,
                "count": score.count,
                "seconds": seconds,
                "over": received.over,
            },
        )
        message = Message(self._names.events, wire.encode(event), routing_key=event.kind, mandatory=False)
        await transport.publish(message)
