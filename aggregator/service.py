"""The aggregator as a process: receive, examine, decide, answer, acknowledge; and publish what the ledger's outbox holds.

Sessions come and go with the broker's connection; the coordinator lives as long as the process. Of several aggregators of one
federation the first one leads, and the others stand by. The loop never computes: messages are decoded in a pool of threads, and
everything about the ledger and the model runs in one thread of its own.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import TypeVar

import structlog

from aggregator.admission import Limits
from aggregator.broadcast import announcement
from aggregator.coordinator import Clock, Coordinator
from aggregator.decisions import Arrival, Verdict
from aggregator.gate import Gate
from aggregator.leadership import Candidate, candidacy
from aggregator.messages import LEDGER, frame_messages, kind_of, quarantined, receipt_message, update_facts
from aggregator.observer import Observer, Unobserved, waited_s
from aggregator.reception import Reception
from aggregator.records import FrameRow
from aggregator.register import Members, Register
from broker_fl.errors import (
    BrokerUnavailableError,
    DecodeError,
    FencedError,
    NotFoundError,
    PublishTimeoutError,
    QueueInUseError,
    StorageError,
    StorageInUseError,
    StorageUnavailableError,
    UnroutableError,
    first_of,
)
from broker_fl.failpoints import reach
from broker_fl.signing import SigningKey
from broker_fl.topology import Binding, Names, Topology
from broker_fl.transports.parts import PART, split
from broker_fl.transports.retry import Backoff
from broker_fl.transports.transport import Connect, Delivery, Message, Subscription, Transport
from schemas import wire
from schemas.event import Event, EventKind, UpdateFacts

log = structlog.get_logger(__name__)

Result = TypeVar("Result")

_LOOK_WHO_LEADS_S = 2.0
_LOOKS_IN_VAIN = 3
"""A candidate that is not elected asks its ledger who leads. A leader that was just elected has some time to write itself in."""

_GROUPS_AHEAD = 16
"""Groups that are examined while a commit waits for the disk; the prefetch bounds what is in them."""

_NEWEST_FRAME_S = 0.5
_LOOK_FOR_LOGS_S = 5.0

_OPERATOR_AT_MOST_S = 30.0
_LOOK_FOR_OPERATOR_S = 0.05

_SHUT_OUT_AGAIN_S = 10.0
_EVENT_TEXT = 300

_FENCED_AT_MOST = 5
_FENCED_WITHIN_S = 60.0
"""More often than that, and two leaders take one ledger from each other, which they can only do on two brokers."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How messages are gathered and parted."""

    prefetch: int
    group_updates: int
    group_s: float
    part_bytes: int
    max_message_bytes: int
    tick_s: float = 0.1


@dataclass(frozen=True, slots=True)
class Examination:
    """Messages in the order of their tags, with what was found in them."""

    deliveries: list[Delivery]
    arrivals: list[Arrival]


@dataclass(frozen=True, slots=True)
class Decision:
    deliveries: list[Delivery]
    verdicts: list[Verdict]
    """Of the first so many deliveries; the others were not decided."""
    updates: tuple[UpdateFacts, ...]


class Aggregator:
    """Runs until the federation is over, `seconds` have passed, or `stop` is called.

    `on_lead` is called when it begins to lead; `register` says who is enrolled; `key` signs frames and receipts; `gate` bounds
    what one party may send. Without them nobody is asked, nothing is signed, and anything goes.
    """

    def __init__(
        self,
        connect: Connect,
        coordinator: Coordinator,
        *,
        topology: Topology,
        limits: Limits,
        pace: Pace,
        clock: Clock,
        seconds: float | None = None,
        on_lead: Callable[[], None] = lambda: None,
        register: Register | None = None,
        key: SigningKey | None = None,
        gate: Gate | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._connect = connect
        self._coordinator = coordinator
        self._topology = topology
        self._limits = limits
        self._names: Names = limits.names
        self._pace = pace
        self._clock = clock
        self._seconds = seconds
        self._on_lead = on_lead
        self._members = Members(register)
        self._key = key
        self._suspends = asyncio.Event()
        self._told_suspended: set[str] = set()
        self._dropped: Counter[str] = Counter()
        """Messages of suspended parties, until they are logged."""
        self._observer: Observer = observer or Unobserved()
        self._winding_down = asyncio.Event()
        self._stopped = asyncio.Event()
        self._frame_waits = asyncio.Event()
        self._failure: Exception | None = None
        self._is_open = self._is_elected = False
        self._has_led = asyncio.Event()
        self._fenced_at: list[float] = []
        self._ledger_thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")
        gate = gate or Gate(per_minute=0, part_bytes=pace.part_bytes, max_update_bytes=limits.max_update_bytes)
        self._reception = Reception(limits, self._members, gate, self._decoders)

    def stop(self) -> None:
        """Cleanly: what was decided is answered, now or after the next start; what was not stays in the queue."""
        self._stopped.set()
        self._winding_down.set()

    async def run(self, open_state: Callable[[], None]) -> None:
        """`open_state` opens the coordinator, in the ledger's thread, each time that this aggregator begins to lead.

        Raises StorageError, and BrokerError if the broker can't be reached at the start; later losses are mended.
        """
        try:
            async with asyncio.TaskGroup() as group:
                timer = group.create_task(self._finish_after_seconds())
                await self._sessions(open_state)
                timer.cancel()
            await self._close()
        finally:
            for executor in (self._decoders, self._ledger_thread):
                await asyncio.shield(asyncio.to_thread(executor.shutdown, cancel_futures=True))

    async def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            try:
                await self._in_ledger(self._coordinator.close)
            except FencedError as exc:
                log.warning("another one leads now", reason=str(exc))

    async def _sessions(self, open_state: Callable[[], None]) -> None:
        """Until one ends by itself. A federation that is over stays until its last frame is out."""
        backoff, ledger_backoff = Backoff(), Backoff()
        was_up = is_done = False
        while not (is_done or self._stopped.is_set()):
            try:
                async with (
                    self._connect(f"aggregator:{self._names.federation}") as transport,
                    candidacy(transport, self._names, name=self._coordinator.holder) as candidate,
                ):
                    was_up = True
                    backoff.reset()
                    self._is_elected = await self._election(transport, candidate)
                    if self._is_elected:
                        await self._begin_to_lead(open_state)
                        ledger_backoff.reset()
                        with self._observed_lead():
                            await self._session(transport, candidate)
                        # Before the lead is given up: whoever takes it finds all that we have.
                        await self._close()
                    is_done = True
            except* (BrokerUnavailableError, PublishTimeoutError, NotFoundError, UnroutableError) as lost:
                if not was_up:
                    raise
                # A broker that starts again may not know its vhost or queues for a while, or still know our last connection. A
                # log that somebody deleted takes no frame, and the next session declares it again.
                log.warning("broker lost, trying again", reason=str(first_of(lost)), wait_s=round(backoff.next_s, 1))
                # Not unless winding down: a federation that is over waits for its broker too, and must not do so without a pause.
                await backoff.wait(unless=self._stopped)
            except* (StorageUnavailableError, StorageInUseError) as lost:
                # In use: a leader that is frozen in the middle of a commit keeps SQLite's lock until it is thawed or killed.
                self._forget_state()
                log.warning("ledger lost, trying again", reason=str(first_of(lost)), wait_s=round(ledger_backoff.next_s, 1))
                await ledger_backoff.wait(unless=self._stopped)
            except* FencedError as fenced:
                self._forget_state()
                log.warning("the ledger was taken: standing by", reason=str(first_of(fenced)))
                await self._count_fence(fenced)

    def _forget_state(self) -> None:
        """It is made anew from the ledger when this aggregator leads again."""
        self._is_elected = False
        self._failure = None
        self._is_open = False

    async def _count_fence(self, fenced: BaseException) -> None:
        """Not of an operator's command, however many there are."""
        try:
            lead = await self._in_ledger(self._coordinator.lead)
        except StorageError:
            return  # The next session says what is wrong.
        if lead is not None and lead.is_brief:
            return
        now = asyncio.get_running_loop().time()
        self._fenced_at = [at for at in self._fenced_at if now - at < _FENCED_WITHIN_S] + [now]
        if len(self._fenced_at) > _FENCED_AT_MOST:
            raise FencedError(
                f"another aggregator takes this ledger again and again, though federation {self._names.federation!r} has one "
                "leader on this broker: does it work on another broker?"
            ) from fenced

    async def _election(self, transport: Transport, candidate: Candidate) -> bool:
        """Waits until nobody else leads; False if it is stopped before."""
        async with asyncio.TaskGroup() as group:
            election = group.create_task(candidate.elected())
            others = [group.create_task(service) for service in (self._stopped.wait(), self._look_who_leads(transport))]
            await asyncio.wait((election, others[0]), return_when=asyncio.FIRST_COMPLETED)
            is_elected = election.done()
            for task in (election, *others):
                task.cancel()
        return is_elected

    async def _look_who_leads(self, transport: Transport) -> None:
        """Raises QueueInUseError where the leader has another ledger: two models would go into one log, one after the other."""
        for _ in range(_LOOKS_IN_VAIN):
            await asyncio.sleep(_LOOK_WHO_LEADS_S)
            lead = await self._in_ledger(self._coordinator.other_leader)
            # One that was killed leaves its lead in the ledger; whose frames are in the log tells more.
            if lead is not None and await self._newest_ledger(transport) in (None, self._coordinator.ledger_id):
                log.info("standing by: another aggregator leads", federation=self._names.federation, leader=lead.holder)
                return
        raise QueueInUseError(
            f"another aggregator, with another ledger, is at work on federation {self._names.federation!r}: end it first, name "
            "its ledger to stand by for it, or take another name"
        )

    async def _newest_ledger(self, transport: Transport) -> str | None:
        """That of the newest frames in the log; None where there are none."""
        ledger = None
        with suppress(NotFoundError, TimeoutError):
            async with (
                transport.follow(self._names.model_log, start="last", name="aggregator-standby") as feed,
                asyncio.timeout(_NEWEST_FRAME_S),
            ):
                while True:
                    found = (await feed.receive()).headers.get(LEDGER)
                    ledger = found if isinstance(found, str) else ledger
        return ledger

    async def _begin_to_lead(self, open_state: Callable[[], None]) -> None:
        """With the state in memory, where nobody else led since; else with what the ledger has."""
        if not (self._is_open and await self._in_ledger(self._coordinator.is_leading)):
            self._is_open = False
            await self._let_operator_finish()
            await self._in_ledger(open_state)
            self._is_open = True
        self._has_led.set()
        self._members.recall(await self._in_ledger(self._coordinator.members))
        self._suspends.set()
        if not self._coordinator.is_over:
            self._on_lead()
        if self._coordinator.goal_reached():
            await self._finish()

    @contextmanager
    def _observed_lead(self) -> Iterator[None]:
        self._observer.leads(True)
        self._observer.has_version(self._coordinator.version)
        try:
            yield
        finally:
            self._observer.leads(False)

    async def _let_operator_finish(self) -> None:
        """One who was killed in the middle is not waited for for ever: nothing of a command counts before its one commit."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_OPERATOR_AT_MOST_S):
                # What is waited for happens in another process.
                while (lead := await self._in_ledger(self._coordinator.other_leader)) is not None and lead.is_brief:  # noqa: ASYNC110
                    await asyncio.sleep(_LOOK_FOR_OPERATOR_S)

    async def _session(self, transport: Transport, candidate: Candidate) -> None:
        await self._declare(transport)
        await self._tell(transport, "aggregator.started", {"over": self._coordinator.is_over})
        log.info("aggregator is up", federation=self._names.federation, version=self._coordinator.version)
        if not await self._publish_outbox(transport, with_last=self._coordinator.is_over):
            await self._announce_newest(transport)
        if self._coordinator.is_over:
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(self._publish_frames(transport))
            beside = (
                self._watch_accuracy(transport),
                self._tick(),
                candidate.keep(),
                self._watch_parties(transport),
                self._watch_logs(transport),
                self._shut_parties_out(transport),
            )
            others = [group.create_task(service) for service in beside]
            await self._merge_updates(transport)
            for task in others:
                task.cancel()
            # Not cancelled: a frame that is on its way would be sent twice.
            self._frame_waits.set()
        await self._publish_outbox(transport, with_last=True)
        await self._tell(transport, "aggregator.stopped", {"over": self._coordinator.is_over})

    async def _declare(self, transport: Transport) -> None:
        """What is shared."""
        if not await transport.has_queue(self._names.updates):
            log.warning("the updates queue is not there: it is made, and the parties are bound to it")
        await transport.declare(self._topology)

    async def _watch_logs(self, transport: Transport) -> None:
        """Raises NotFoundError where one was deleted: without it no worker trains, and no update makes the next broadcast."""
        while True:
            await asyncio.sleep(_LOOK_FOR_LOGS_S)
            for log_name in (self._names.model_log, self._names.keyframe_log):
                if not await transport.has_queue(log_name):
                    raise NotFoundError(f"somebody deleted {log_name}")

    async def _watch_parties(self, transport: Transport) -> None:
        await self._members.refresh()
        await self._bind_parties(transport)
        await self._members.refresh_for_ever()

    async def _shut_parties_out(self, transport: Transport) -> None:
        """What the ledger decided about parties, done on the broker too; until it is, it is tried again."""
        while True:
            self._suspends.clear()
            suspended = self._members.still_out(await self._in_ledger(self._coordinator.shut_out))
            self._reception.shut_out(suspended)
            for party, suspension in suspended.items():
                if party not in self._told_suspended:
                    self._told_suspended.add(party)
                    await self._tell(transport, "party.suspended", {"party": party, "reason": suspension.reason[:_EVENT_TEXT]})
            self._told_suspended &= suspended.keys()
            for party in await self._members.shut_out(suspended):
                log.warning("a suspended party's connections were closed", party=party)
            with suppress(TimeoutError):
                async with asyncio.timeout(_SHUT_OUT_AGAIN_S):
                    await self._suspends.wait()
            for party, messages in self._dropped.items():
                log.warning("what a suspended party had sent was dropped", party=party, messages=messages)
            self._dropped.clear()

    async def _bind_parties(self, transport: Transport) -> None:
        """In every session: where somebody deleted the updates queue, the bindings of the parties went with it, they may not
        bind, and whoever declared it again may have been killed in the middle."""
        parties = await self._known_parties()
        bindings = tuple(Binding(self._names.up(party), self._names.updates) for party in parties)
        try:
            await transport.declare(Topology(bindings=bindings))
        except NotFoundError:
            for party, binding in zip(parties, bindings, strict=True):
                await self._bind(transport, party, binding)

    async def _bind(self, transport: Transport, party: str, binding: Binding) -> None:
        try:
            await transport.declare(Topology(bindings=(binding,)))
        except NotFoundError:
            log.info("a party that sent updates is enrolled no more", party=party)

    async def _merge_updates(self, transport: Transport) -> None:
        """Three stages that work at the same time; each group of messages passes through them in order.

        Until winding down; then no message is taken any more, and what was decided is answered.
        """
        examined: asyncio.Queue[Examination | None] = asyncio.Queue(maxsize=_GROUPS_AHEAD)
        decided: asyncio.Queue[Decision | None] = asyncio.Queue(maxsize=2)
        async with (
            transport.consume(self._names.updates, prefetch=self._pace.prefetch, name=self._coordinator.holder) as subscription,
            asyncio.TaskGroup() as group,
        ):
            examining = group.create_task(self._examine_groups(subscription, examined))
            group.create_task(self._decide_groups(examined, decided))
            group.create_task(self._answer_groups(transport, subscription, decided))
            await self._winding_down.wait()
            examining.cancel()
            await examined.put(None)

    async def _examine_groups(self, subscription: Subscription, examined: asyncio.Queue[Examination | None]) -> None:
        while True:
            deliveries = await self._without_shut_out(subscription, await self._next_group(subscription))
            if deliveries:
                await examined.put(Examination(deliveries, await self._reception.examine(deliveries)))

    async def _without_shut_out(self, subscription: Subscription, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """What is left of a flood when its party is suspended: asking the ledger for each group would keep the others waiting."""
        others = []
        for delivery in deliveries:
            party = self._reception.shut_out_party(delivery)
            if party is None:
                others.append(delivery)
            else:
                await subscription.acknowledge(delivery.tag)
                self._dropped[party] += 1
        return others

    async def _next_group(self, subscription: Subscription) -> list[Delivery]:
        group = [await subscription.receive()]
        try:
            async with asyncio.timeout(self._pace.group_s):
                while len(group) < self._pace.group_updates:
                    group.append(subscription.receive_nowait() or await subscription.receive())
        except TimeoutError:
            return group
        return group

    async def _decide_groups(self, examined: asyncio.Queue[Examination | None], decided: asyncio.Queue[Decision | None]) -> None:
        while (group := await examined.get()) is not None:
            # What came while the last commit waited for the disk shares the next one.
            while len(group.arrivals) < self._pace.group_updates and not examined.empty():
                if (more := examined.get_nowait()) is None:
                    examined.put_nowait(None)
                    break
                group = Examination(group.deliveries + more.deliveries, group.arrivals + more.arrivals)
            decision = await self._in_ledger(self._decide, group)
            self._frame_waits.set()
            if any(verdict.suspends or verdict.is_late_suspension for verdict in decision.verdicts):
                self._suspends.set()
            await decided.put(decision)
        await decided.put(None)

    def _decide(self, group: Examination) -> Decision:
        """In the ledger's thread: what is committed is told, also where nobody waits for it any more."""
        began = monotonic()
        verdicts = self._coordinator.decide(group.arrivals)
        seconds, now = monotonic() - began, self._clock()
        updates = update_facts(verdicts)
        answered = [delivery for delivery, verdict in zip(group.deliveries, verdicts, strict=False) if verdict.receipt]
        waits = [waited for delivery in answered if (waited := waited_s(delivery.headers, now=now)) is not None]
        suspensions = sum(verdict.suspends for verdict in verdicts)
        self._observer.decided(updates, waits_s=waits, seconds=seconds, suspensions=suspensions)
        self._observer.has_version(self._coordinator.version)
        return Decision(group.deliveries, verdicts, updates)

    async def _answer_groups(
        self, transport: Transport, subscription: Subscription, decided: asyncio.Queue[Decision | None]
    ) -> None:
        """Receipts and quarantine first, then the acknowledgement: after a crash in between, they are sent again."""
        while (group := await decided.get()) is not None:
            answered = [
                (one, self._not_too_often(one, verdict)) for one, verdict in zip(group.deliveries, group.verdicts, strict=False)
            ]
            receipts = await asyncio.to_thread(self._receipts, [verdict for _, verdict in answered])
            answers = zip(answered, receipts, strict=True)
            await asyncio.gather(*(self._answer(transport, *pair, receipt) for pair, receipt in answers))
            reach("aggregator.answered")
            if answered:
                await subscription.acknowledge(answered[-1][0].tag, multiple=True)
                reach("aggregator.acknowledged")
                await self._tell(transport, "updates.decided", {}, updates=group.updates)
            if self._coordinator.goal_reached():
                await self._finish()

    async def _known_parties(self) -> Sequence[str]:
        return sorted({*await self._in_ledger(self._coordinator.parties), *self._members.parties()})

    def _not_too_often(self, delivery: Delivery, verdict: Verdict) -> Verdict:
        is_answered = not verdict.is_duplicate or self._reception.answers_again(delivery)
        return verdict if is_answered else replace(verdict, receipt=None)

    def _receipts(self, verdicts: Sequence[Verdict]) -> list[Message | None]:
        """In a thread: they are signed."""
        made = (verdict.receipt for verdict in verdicts)
        return [None if receipt is None else receipt_message(self._names, receipt, key=self._key) for receipt in made]

    async def _answer(self, transport: Transport, delivery: Delivery, verdict: Verdict, receipt: Message | None) -> None:
        # After a crash before the answers went out, a redelivered duplicate is the second chance for quarantine.
        is_new = not verdict.is_duplicate or delivery.redelivered
        if verdict.refused is not None and is_new and self._reception.keeps(delivery, verdict.refused):
            log.warning(
                "update refused", reason=verdict.refused.reason, detail=verdict.refused.detail, exchange=delivery.exchange
            )
            most_bytes = self._limits.max_update_bytes
            await transport.publish(quarantined(self._names, delivery, verdict.refused, most_bytes=most_bytes))
        if receipt is not None:
            try:
                await transport.publish(receipt)
            except UnroutableError:
                log.warning("no inbox for a receipt: was the party removed?", party=receipt.routing_key)

    async def _publish_frames(self, transport: Transport) -> None:
        """Until winding down."""
        while not self._winding_down.is_set():
            self._frame_waits.clear()
            await self._publish_outbox(transport, with_last=False)
            await self._frame_waits.wait()

    async def _publish_outbox(self, transport: Transport, *, with_last: bool) -> bool:
        """In order; gives whether the last one that went out has a keyframe.

        The federation's last frame goes out after all receipts, since workers end with it.
        """
        has_keyframe = False
        while (frame := await self._in_ledger(self._coordinator.unpublished)) is not None:
            if frame.over and self._coordinator.is_over and not with_last:
                break
            reach("aggregator.frame")
            await self._publish_frame(transport, frame)
            self._observer.published(frame, seconds=max(0.0, self._clock() - frame.at))
            reach("aggregator.published")
            await self._in_ledger(self._coordinator.published, frame.number)
            await self._tell_published(transport, frame)
            has_keyframe = frame.keyframe is not None
        return has_keyframe

    async def _announce_newest(self, transport: Transport) -> None:
        """Logs that lost their frames, or never had them, get one to begin with; who has it leaves it out by its number."""
        frame = await self._in_ledger(self._coordinator.standing_alone)
        if frame is None or frame.published_at is None:
            return
        body = await asyncio.to_thread(announcement, frame.keyframe or b"")
        announced = replace(frame, base=None, codec=frame.keyframe_codec or "", size=len(body), body=body)
        await self._publish_frame(transport, announced)
        self._observer.published(announced, seconds=None)
        await self._tell_published(transport, announced)

    async def _publish_frame(self, transport: Transport, frame: FrameRow) -> None:
        for message in await asyncio.to_thread(self._frame_messages, frame):
            await self._publish_in_parts(transport, message)
            if message.exchange == self._names.keyframes:
                reach("aggregator.keyframe")

    def _frame_messages(self, frame: FrameRow) -> list[Message]:
        """In a thread: they are signed."""
        return list(frame_messages(self._names, frame, ledger_id=self._coordinator.ledger_id, key=self._key))

    async def _publish_in_parts(self, transport: Transport, message: Message) -> None:
        parts = split(message, part_bytes=self._pace.part_bytes, limit_bytes=self._pace.max_message_bytes)
        # In a thread: the first part comes when the digest of all of them is made.
        while (part := await asyncio.to_thread(next, parts, None)) is not None:
            await transport.publish(part)
            if PART in part.headers:
                reach("aggregator.frame-part")

    async def _tell_published(self, transport: Transport, frame: FrameRow) -> None:
        log.info("model broadcast", version=frame.version, kind=kind_of(frame), bytes=frame.size, over=frame.over)
        facts: dict[str, int | float | str | bool] = {
            "number": frame.number,
            "kind": kind_of(frame),
            "bytes": frame.size,
            "codec": frame.codec,
            "over": frame.over,
        }
        if frame.keyframe is not None:
            facts |= {"keyframe_bytes": len(frame.keyframe), "keyframe_codec": frame.keyframe_codec or ""}
        await self._tell(transport, "frame.published", facts, version=frame.version)

    async def _watch_accuracy(self, transport: Transport) -> None:
        own, name = self._names.own_of("aggregator"), "aggregator-watch"
        async with transport.listen(self._names.events, routing_key="model.evaluated", name=name, queue=own) as feed:
            while True:
                delivery = await feed.receive()
                try:
                    event = wire.decode(Event, delivery.body)
                except DecodeError as exc:
                    log.warning("event left out", reason=str(exc), user=delivery.user_id)
                    continue
                accuracy = event.facts.get("accuracy")
                if isinstance(accuracy, float | int) and self._coordinator.goal_reached(accuracy):
                    log.info("goal reached", version=event.version, accuracy=round(accuracy, 4))
                    await self._finish()

    async def _tick(self) -> None:
        while True:
            await self._in_ledger(self._coordinator.tick)
            self._observer.has_version(self._coordinator.version)
            self._frame_waits.set()
            # A buffer that was merged by its timeout may have made the last version, and no update may come any more.
            if self._coordinator.goal_reached():
                await self._finish()
            await asyncio.sleep(self._pace.tick_s)

    async def _finish(self) -> None:
        await self._in_ledger(self._coordinator.finish)
        self._winding_down.set()

    async def _finish_after_seconds(self) -> None:
        """From when it first leads: one that stands by leaves the end of the federation to the leader."""
        if self._seconds is None:
            return
        await self._has_led.wait()
        await asyncio.sleep(self._seconds)
        backoff = Backoff()
        while not self._winding_down.is_set():
            try:
                if self._is_open:
                    await self._finish()
                elif not self._is_elected:
                    self.stop()
            except FencedError:
                self._is_open = False
            except (StorageUnavailableError, StorageInUseError):
                log.warning("the federation's time is over, and its ledger does not answer: trying again")
            await backoff.wait(unless=self._winding_down)

    async def _tell(
        self,
        transport: Transport,
        kind: EventKind,
        facts: dict[str, int | float | str | bool],
        *,
        version: int | None = None,
        updates: tuple[UpdateFacts, ...] = (),
    ) -> None:
        """Events are for whoever listens; nobody has to."""
        event = Event(
            kind=kind,
            federation=self._names.federation,
            at=self._clock(),
            version=self._coordinator.version if version is None else version,
            facts=facts,
            updates=updates,
        )
        await transport.publish(Message(self._names.events, wire.encode(event), routing_key=kind, mandatory=False))

    async def _in_ledger(self, call: Callable[..., Result], *arguments: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._ledger_thread, self._guarded, call, arguments)

    def _guarded(self, call: Callable[..., Result], arguments: tuple[object, ...]) -> Result:
        """In the ledger's thread. After a failure the model in memory may be ahead of the ledger: nothing is done any more, even
        where nobody waited for what failed, as when the broker was lost meanwhile."""
        if self._failure is not None:
            raise self._failure
        try:
            return call(*arguments)
        except Exception as exc:
            self._failure = exc
            raise
